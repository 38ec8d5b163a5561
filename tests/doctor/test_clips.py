"""What the doctor says of clips is what `prepare` does with them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from longtake.config.load import load_config
from longtake.config.schema import RunConfig
from longtake.data import split
from longtake.data.encode import prepare
from longtake.data.regular_files import content_hash
from longtake.doctor.clips import Examination, Finding, examine
from longtake.doctor.document import reason_of
from longtake.errors import DataError
from longtake.models.wan.variants import variant
from runs import Recorder, draw_clip

SPEC = variant("tiny-t2v").spec


def examined(config: RunConfig) -> Examination:
    return examine(config.data, SPEC, config.training.seed, Recorder())


def named(examination: Examination) -> dict[str, Finding]:
    """Findings by the stem of the file."""
    return {Path(finding.where).stem: finding for finding in examination.findings}


def test_buckets_split_and_reasons_are_those_of_a_real_prepare(config: RunConfig) -> None:
    examination, recorder = examined(config), Recorder()
    manifest = prepare(config, SPEC, Path(config.model.path), torch.device("cpu"), recorder, (0, 1))
    entries = {(entry.where, entry.bucket, entry.stages, entry.clip) for entry in manifest.entries}
    found = {
        (finding.where, (bucket.frames, bucket.height, bucket.width), fit.placed.stages, finding.clip)
        for finding in examination.used
        for fit in finding.fits
        for bucket in [fit.placed.clip.bucket]
    }
    assert found == entries
    assert len({frames for _, (frames, _, _), _, _ in found}) > 2, "stages, shorter buckets and stills"
    _, held = split.split(manifest.entries, config.data.validation, config.training.seed)
    assert {each.where for each in examination.used if each.split == "validation"} == {entry.where for entry in held}
    problems = [problem for each in examination.findings for problem in (*each.left_out, *each.notes)]
    said = {line.removeprefix("left out or changed: ") for line in recorder.having("left out or changed")}
    assert said == {*map(str, problems), *examination.remarks}


def test_tokens_and_what_is_cut_away_follow_from_the_picture_as_it_is_shown(config: RunConfig) -> None:
    found = named(examined(config))
    turned = found["turned"]
    assert turned.info is not None
    assert (turned.info.width, turned.info.height, turned.info.rotation) == (48, 64, 90)
    bucket = turned.fits[-1].placed.clip.bucket
    assert (bucket.height, bucket.width) == (64, 32)
    assert turned.fits[-1].cropped == pytest.approx(1 / 3)
    assert turned.fits[-1].scale == 1
    assert turned.fits[-1].tokens == 5 * 2 * 4
    assert found["wide"].fits[-1].cropped == pytest.approx(1 - 64 * 32 / (133 * 32))
    assert found["still"].fits[-1].placed.clip.bucket.frames == 1


def test_codec_and_pixels_are_named(config: RunConfig) -> None:
    found = named(examined(config))
    names = {stem: (info.codec, info.pixel_format) for stem in ("0", "still") if (info := found[stem].info)}
    assert names == {"0": ("h264", "yuv420p"), "still": ("PNG", "RGB")}


def test_a_clip_too_short_is_shown_and_not_counted_toward_the_limit(config: RunConfig) -> None:
    examination = examined(config)
    short, damaged = named(examination)["short"], named(examination)["damaged"]
    assert short.info is not None
    assert damaged.info is None
    assert [reason_of(problem) for problem in short.left_out] == [
        "short.mp4 has 3 frames at 16 fps; give a clip of 5 or more, or leave it out [clip-too-short]"
    ]
    assert [(check.step, check.bad, check.rows, check.stops) for check in examination.checks] == [
        ("rows", 0, 19, False),
        ("files", 1, 19, False),
    ]


def test_hashes_are_where_prepare_finds_them(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    examined(config)
    read: list[Path] = []

    def again(path: Path) -> str:
        read.append(path)
        return content_hash(path)

    monkeypatch.setattr("longtake.data.hashes.content_hash", again)
    manifest = prepare(config, SPEC, Path(config.model.path), torch.device("cpu"), Recorder(), (0, 1))
    assert manifest.entries
    assert read == []


@pytest.mark.parametrize(("bad", "stops"), [(1, False), (2, True)])
def test_the_limit_is_where_prepare_has_it(
    tmp_path: Path, config_file: Callable[..., Path], bad: int, stops: bool
) -> None:
    source = tmp_path / "clips"
    source.mkdir()
    for index in range(10):
        draw_clip(source / f"{index}.mp4", index)
    for index in range(bad):
        (source / f"bad{index}.mp4").write_bytes(b"no video")
        (source / f"bad{index}.txt").write_text("bad")
    config = load_config(config_file(source), [])
    examination = examined(config)
    assert len(examination.used) == 10
    assert bool(examination.refusals) == stops
    if stops:
        with pytest.raises(DataError) as raised:
            prepare(config, SPEC, Path(config.model.path), torch.device("cpu"), Recorder(), (0, 1))
        assert raised.value.problems == examination.refusals[0].problems


def test_rows_of_a_validation_source_are_its_own_even_under_equal_names(
    tmp_path: Path, config_file: Callable[..., Path]
) -> None:
    for parent in ("one", "other"):
        (tmp_path / parent / "clips").mkdir(parents=True)
        for index in range(2):
            draw_clip(tmp_path / parent / "clips" / f"{index}.mp4", index)
    source, held = tmp_path / "one" / "clips", tmp_path / "other" / "clips"
    examination = examined(load_config(config_file(source, validation=str(held)), []))
    assert [(each.source, each.split, each.where) for each in examination.findings] == [
        ("train", "train", "clips/0.mp4"),
        ("train", "train", "clips/1.mp4"),
        ("validation", "validation", "clips/0.mp4"),
        ("validation", "validation", "clips/1.mp4"),
    ]
