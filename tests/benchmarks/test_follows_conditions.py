"""Models trained from random weights do what captions and images say that they were not trained on."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

ROWS = ("tiny-t2v", "tiny-i2v", "tiny-flf2v", "tiny-ti2v", "tiny-t2v-a14b", "tiny-i2v-a14b")


@pytest.fixture(scope="module")
def benchmark(script: Callable[[str], Any]) -> Any:
    return script("follows_conditions")


@pytest.fixture(scope="module")
def motion(script: Callable[[str], Any]) -> Any:
    return script("synthetic_motion")


def row(rows: Any, name: str) -> Any:
    return next(row for row in rows if row.name == name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_held_out_captions_and_images_are_followed_and_not_after_training_on_shuffled_ones(
    benchmark: Any, name: str, tmp_path: Path
) -> None:
    found = benchmark.measured(row(benchmark.ROWS, name), tmp_path)
    assert all(result.holds for result in found), found


@pytest.mark.long
def test_less_than_a_minute_of_training_is_enough_to_follow_held_out_captions(benchmark: Any, tmp_path: Path) -> None:
    found = benchmark.measured(benchmark.SHORT, tmp_path, ("untrained", "trained"))
    assert all(result.holds for result in found), found


def test_every_row_of_the_table_is_tested(benchmark: Any) -> None:
    assert [row.name for row in benchmark.ROWS] == [*ROWS]


def test_no_held_out_pair_of_colour_and_way_is_trained_on_but_every_colour_and_every_way_is(motion: Any) -> None:
    trained = {(case.colour, case.way) for case in motion.training_cases(96)}
    held_out = {(case.colour, case.way) for case in motion.held_out_cases(32)}
    assert not trained & held_out
    assert {colour for colour, _ in trained} == {colour for colour, _ in held_out} == {*motion.COLOURS}
    assert {way for _, way in trained} == {way for _, way in held_out} == {*motion.WAYS}


def test_the_way_of_every_drawn_clip_is_told(benchmark: Any, motion: Any) -> None:
    clips = {case: motion.Canvas(32, 5, 0.28).draw(case).float() for case in motion.held_out_cases(32)}
    assert all(benchmark.way_of(clip) == case.way for case, clip in clips.items())


def test_clips_as_the_vae_shows_them_pass_every_measure_and_other_objects_and_ways_do_not(
    benchmark: Any, motion: Any, script: Callable[[str], Any], tmp_path: Path
) -> None:
    chosen = row(benchmark.ROWS, "tiny-i2v")
    runs = script("condition_runs").Runs(chosen.name, tmp_path, chosen.canvas, replace(chosen.settings, clips=1), False)
    cases = motion.held_out_cases(8)
    judge = benchmark.Judge(runs, cases)
    own = [runs.shown(case) for case in cases]
    others = [runs.shown(replace(cases[index - 1], way=case.way)) for index, case in enumerate(cases)]
    back = {"left": "right", "right": "left", "up": "down", "down": "up"}
    turned = [runs.shown(replace(case, way=back[case.way])) for case in cases]
    shifted = own[-1:] + own[:-1]
    for measure, wrong in {"way": turned, "object": others, "first": shifted, "last": shifted}.items():
        assert judge.share(measure, own) == 1, measure
        assert judge.share(measure, wrong) == 0, measure


@pytest.mark.parametrize("name", ["tiny-flf2v", "tiny-ti2v"])
def test_shuffling_gives_each_clip_the_caption_and_the_images_of_one_other(
    benchmark: Any, script: Callable[[str], Any], name: str, tmp_path: Path
) -> None:
    chosen, module = row(benchmark.ROWS, name), script("condition_runs")
    runs = module.Runs(name, tmp_path, chosen.canvas, replace(chosen.settings, clips=8), False)
    manifest = runs.prepare()
    source, target = runs.caches
    shuffled = module.shuffle(manifest, source, target, runs.spec.task)
    assert sorted(entry.text for entry in manifest.entries) == sorted(entry.text for entry in shuffled.entries)
    others = {given_images(source, entry): (entry.image, entry.text) for entry in manifest.entries}
    moved = 0
    for before, after in zip(manifest.entries, shuffled.entries, strict=True):
        own = source.read("latents", before.latents)["latents"]
        assert torch.equal(target.read("latents", after.latents)["latents"][:, 1:], own[:, 1:])
        assert others[given_images(target, after)] == (after.image, after.text)
        moved += given_images(target, after) != given_images(source, before)
    assert moved >= 4


def given_images(cache: Any, entry: Any) -> bytes:
    """What the transformer is given of an entry's images."""
    tensors = cache.read("latents", entry.latents)
    return bytes(tensors.get("condition", tensors["latents"][:, :1]).contiguous().numpy().tobytes())
