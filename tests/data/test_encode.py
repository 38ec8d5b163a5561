"""`prepare`: what it caches, what makes it encode again, and that it can be interrupted, shared and trusted."""

import gc
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan

from longtake.data.cache import Cache, Manifest
from longtake.data.encode import load_manifest
from longtake.data.video import Window, read_clip
from longtake.errors import CacheError, DataError
from longtake.models.wan.encoders import encode_video, load_vae, normalise_pixels
from longtake.models.wan.tiny import build_tiny
from runs import CPU, SIDE, Recorder, Scene, contents, draw_clip, scene, with_a_clip_that_breaks_off

Make = Callable[..., Scene]


@pytest.fixture
def make(tiny_root: Callable[[str], Path], tmp_path: Path) -> Make:
    """A scene of a few clips with an empty cache."""
    return lambda model="tiny-i2v", count=2: scene(model, tiny_root(model), tmp_path, count)


def entries(cache: Path) -> dict[str, bytes]:
    """Every entry's content by its name."""
    found = {path.relative_to(cache).as_posix(): path.read_bytes() for path in cache.rglob("*.safetensors")}
    return dict(sorted(found.items()))


def made_by(scene: Scene, **sections: Any) -> set[str]:
    """Kinds and keys of the entries that preparing anew adds."""
    before = entries(scene.cache)
    scene.prepare(scene.config(scene.cache / "run", **sections))
    after = entries(scene.cache)
    assert all(after[name] == content for name, content in before.items())
    return after.keys() - before.keys()


def kinds(names: set[str]) -> dict[str, int]:
    """How many entries of each kind."""
    return {kind: sum(name.startswith(f"{kind}/") for name in names) for kind in ("latents", "images", "texts")}


@pytest.mark.parametrize(
    ("model", "latents", "images"),
    [
        ("tiny-t2v", {"latents": (16, 2, 4, 4)}, None),
        ("tiny-ti2v", {"latents": (48, 2, 2, 2)}, None),
        ("tiny-i2v", {"latents": (16, 2, 4, 4), "condition": (20, 2, 4, 4)}, (17, 64)),
        ("tiny-flf2v", {"latents": (16, 2, 4, 4), "condition": (20, 2, 4, 4)}, (34, 64)),
    ],
)
def test_an_entry_holds_what_its_task_needs_and_no_more(
    make: Make, model: str, latents: dict[str, Any], images: tuple[int, int] | None
) -> None:
    scene = make(model)
    manifest = scene.prepare(scene.config(scene.cache / "run"))
    cache = Cache(scene.cache)
    for entry in manifest.entries:
        tensors = cache.read("latents", entry.latents)
        assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == latents
        assert bool(entry.image) == (images is not None)
        if images is not None:
            assert tuple(cache.read("images", entry.image)["image_embeds"].shape) == images
        assert len(cache.read("texts", entry.text)["prompt_embeds"]) == len(entry.prompt) + 1
    assert len(cache.read("texts", manifest.empty_text)["prompt_embeds"]) == 1
    assert (scene.cache / "images").exists() == (images is not None)


def test_the_latents_are_the_vaes_of_the_window_and_the_condition_its_first_frame(make: Make) -> None:
    scene = make()
    manifest = scene.prepare(scene.config(scene.cache / "run"))
    vae, cache = load_vae(scene.root, CPU), Cache(scene.cache)
    first = next(entry for entry in manifest.entries if entry.prompt == "clip 0")
    tensors = cache.read("latents", first.latents)
    windows = [read_clip(scene.source / "0.mp4", Window(i / 1000, 5, 16.0), (SIDE, SIDE)) for i in range(0, 1190, 62)]
    starts = [frames for frames in windows if torch.equal(_encoded(vae, frames), tensors["latents"])]
    assert starts, "the latents are those of a window of the clip"
    grey = torch.zeros(1, 3, 5, SIDE, SIDE)
    grey[:, :, 0] = normalise_pixels(starts[0][0])
    assert torch.equal(tensors["condition"][4:], encode_video(vae, grey)[0])
    assert torch.equal(tensors["condition"][:4, 0], torch.ones(4, 4, 4))
    assert not tensors["condition"][:4, 1:].any()


def _encoded(vae: AutoencoderKLWan, frames: torch.Tensor) -> torch.Tensor:
    return encode_video(vae, normalise_pixels(frames).permute(1, 0, 2, 3)[None])[0]


def test_a_second_time_nothing_is_encoded(make: Make) -> None:
    scene = make()
    config = scene.config(scene.cache / "run")
    first = scene.prepare(config)
    said = Recorder()
    assert scene.prepare(config, said) == first
    assert said.lines == ["video latents: all 2 cached", "images: all 2 cached", "captions: all 3 cached"]
    assert load_manifest(config, scene.spec, scene.root, print) == first


def test_no_training_flag_is_in_a_key(make: Make) -> None:
    scene = make()
    assert kinds(made_by(scene)) == {"latents": 2, "images": 2, "texts": 3}
    flags: dict[str, Any] = {
        "lora": None,
        "training": {"steps": 9, "learning_rate": 1.0, "precision": "bf16", "shift": 5.0, "ema": 0.5},
        "data": {"caption_dropout": 0.5, "validation": 0.5},
        "memory": {"gradient_checkpointing": "none"},
        "validation": {"every": 3},
        "output": {"run": "elsewhere", "keep": 9},
    }
    for section, changes in flags.items():
        assert not made_by(scene, **{section: changes}), section


def test_what_matters_encodes_exactly_the_entries_concerned(make: Make, tmp_path: Path) -> None:
    scene = make()
    made_by(scene)
    assert kinds(made_by(scene, data={"size": (64, 32)})) == {"latents": 2, "images": 2, "texts": 0}
    assert kinds(made_by(scene, data={"num_frames": 9}))["texts"] == 0
    assert kinds(made_by(scene, data={"num_frames": 9, "frames_schedule": ((0, 5), (1, 9))})) == dict.fromkeys(
        ("latents", "images", "texts"), 0
    )
    (scene.source / "0.txt").write_text("another caption")
    assert kinds(made_by(scene))["texts"] == 1
    draw_clip(scene.source / "1.mp4", 7)
    (scene.source / "1.txt").write_text("clip 1")
    assert kinds(made_by(scene)) == {"latents": 1, "images": 1, "texts": 0}


@pytest.mark.parametrize(
    ("component", "expected"),
    [
        ("vae", {"latents": 2, "images": 0, "texts": 0}),
        ("image_encoder", {"latents": 0, "images": 2, "texts": 0}),
        ("text_encoder", {"latents": 0, "images": 0, "texts": 3}),
        ("transformer", {"latents": 0, "images": 0, "texts": 0}),
    ],
)
def test_another_encoder_encodes_what_it_encodes(
    make: Make, tmp_path: Path, component: str, expected: dict[str, int]
) -> None:
    scene = make()
    made_by(scene)
    changed = tmp_path / "changed"
    shutil.copytree(scene.root, changed)
    shutil.rmtree(changed / component)
    shutil.copytree(build_tiny("tiny-i2v", tmp_path / "other", seed=1) / component, changed / component)
    assert kinds(made_by(Scene(scene.model, changed, scene.source, scene.cache))) == expected


def test_equal_clips_and_equal_captions_are_stored_once(make: Make) -> None:
    scene = make(count=1)
    shutil.copy(scene.source / "0.mp4", scene.source / "0-again.mp4")
    (scene.source / "0-again.txt").write_text("clip 0")
    manifest = scene.prepare(scene.config(scene.cache / "run", data={"num_frames": 21}))
    assert len(manifest.entries) == 2
    assert kinds(set(entries(scene.cache)))["texts"] == 2
    assert len({entry.clip for entry in manifest.entries}) == 1, "they are held out together"


class Interrupted(Recorder):
    """Ends like Ctrl-C after `count` entries."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.left = count

    @contextmanager
    def bar(self, title: str, total: int, unit: str, done: int = 0) -> Iterator[Callable[[int, str], None]]:
        """A bar that interrupts."""

        def advance(_done: int, _text: str) -> None:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt

        yield advance


def test_it_goes_on_where_it_was_interrupted(make: Make, tmp_path: Path) -> None:
    scene = make(count=3)
    config = scene.config(scene.cache / "run")
    for count, expected in ((2, 2), (1, 3), (4, 7)):
        with pytest.raises(KeyboardInterrupt):
            scene.prepare(config, Interrupted(count))
        assert len(entries(scene.cache)) == expected
        with pytest.raises(CacheError):
            load_manifest(config, scene.spec, scene.root, print)
    interrupted = entries(scene.cache)
    manifest = scene.prepare(config)
    whole = Scene(scene.model, scene.root, scene.source, tmp_path / "whole")
    assert whole.prepare(whole.config(tmp_path)) == manifest
    assert entries(scene.cache) == entries(whole.cache)
    assert all(entries(scene.cache)[name] == content for name, content in interrupted.items())


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_whose_others_never_come_makes_the_same_cache_as_one_process(
    make: Make, tmp_path: Path, rank: int
) -> None:
    scene = make(count=3)
    manifest = scene.prepare(scene.config(scene.cache / "run"), ranks=(rank, 2))
    whole = Scene(scene.model, scene.root, scene.source, tmp_path / "whole")
    assert whole.prepare(whole.config(tmp_path)) == manifest
    assert contents(scene.cache) == contents(whole.cache)


def test_another_rank_finds_everything_done_and_says_nothing(make: Make) -> None:
    scene, said = make(count=3), Recorder()
    config = scene.config(scene.cache / "run")
    manifest = scene.prepare(config, ranks=(0, 2))
    before = contents(scene.cache)
    assert scene.prepare(config, said, ranks=(1, 2)) == manifest
    assert contents(scene.cache) == before
    assert not said.lines


@pytest.mark.parametrize(("rank", "prefix"), [((0, 1), ""), ((0, 2), ""), ((1, 2), "rank 1: ")])
def test_a_clip_that_cannot_be_encoded_is_left_out_and_said(make: Make, rank: tuple[int, int], prefix: str) -> None:
    scene = with_a_clip_that_breaks_off(make("tiny-t2v", 20))
    said = Recorder()
    manifest = scene.prepare(scene.config(scene.cache / "run"), said, ranks=rank)
    assert {entry.prompt for entry in manifest.entries} == {f"clip {index}" for index in range(20)}
    lines = sorted(said.having("left out"))
    assert len(lines) == 2
    assert all(line.startswith(f"{prefix}left out: clips/") for line in lines)
    assert all(f" {name}.mp4 " in line for name, line in zip(("broken", "copy"), lines, strict=True))
    assert all(line.endswith(("[clip-undecodable]", "[clip-damaged-picture]")) for line in lines)


def test_what_was_rejected_before_is_said_again_and_tried_again_by_one_process_only(make: Make) -> None:
    scene = with_a_clip_that_breaks_off(make("tiny-t2v", 20))
    config = scene.config(scene.cache / "run")
    first = scene.prepare(config)
    rejection = next((scene.cache / "latents").glob("*.rejected.json"))
    for ranks, made_again in (((0, 1), True), ((0, 2), False)):
        before, said = rejection.stat().st_ino, Recorder()
        assert scene.prepare(config, said, ranks=ranks) == first
        assert len(said.having("left out: ")) == 2
        assert (rejection.stat().st_ino != before) == made_again
        assert bool(said.having("video latents: all 20 cached")) != made_again


def test_too_many_of_them_are_an_error(make: Make) -> None:
    scene = make("tiny-t2v", 3)
    with_a_clip_that_breaks_off(scene)
    with pytest.raises(DataError, match="2 of 5 clips cannot be used, more than 10%"):
        scene.prepare(scene.config(scene.cache / "run"))


class Watching(Recorder):
    """Counts the VAEs in memory when each pass begins."""

    def __init__(self) -> None:
        super().__init__()
        self.vaes: dict[str, int] = {}

    @contextmanager
    def bar(self, title: str, total: int, unit: str, done: int = 0) -> Iterator[Callable[[int, str], None]]:
        """A bar that looks around."""
        self.vaes[title] = sum(type(found) is AutoencoderKLWan for found in gc.get_objects())
        yield lambda _done, _text: None


def test_one_encoder_at_a_time_is_in_memory(make: Make) -> None:
    scene, watching = make(), Watching()
    gc.collect()
    before = sum(type(found) is AutoencoderKLWan for found in gc.get_objects())
    scene.prepare(scene.config(scene.cache / "run"), watching)
    assert watching.vaes == {"video latents": before + 1, "images": before, "captions": before}


def test_a_manifest_lists_clips_in_their_buckets(make: Make) -> None:
    scene = make()
    schedule = {"num_frames": 9, "frames_schedule": ((0, 5), (1, 9))}
    manifest = scene.prepare(scene.config(scene.cache / "run", data=schedule))
    assert isinstance(manifest, Manifest)
    assert sorted((entry.prompt, entry.bucket, entry.stages) for entry in manifest.entries) == [
        (f"clip {index}", (frames, SIDE, SIDE), (frames,)) for index in range(2) for frames in (5, 9)
    ]
