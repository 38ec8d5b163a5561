"""What the sources hold: clips in the buckets of each stage, and settings that identify a cache."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from longtake.config.schema import DataConfig
from longtake.data.dataset import cache_settings, place, read_sources
from longtake.errors import DataError
from longtake.models.wan.variants import variant
from runs import draw_clip

SPEC = variant("tiny-i2v").spec
ENCODERS = {"vae": "v", "text_encoder": "t"}


def folder(path: Path, lengths: dict[str, int]) -> Path:
    """Clips of so many frames."""
    path.mkdir()
    for index, (name, frames) in enumerate(lengths.items()):
        draw_clip(path / f"{name}.mp4", index, frames)
    return path


def data(source: Path, **changes: Any) -> DataConfig:
    """Stages of 5 and 17 frames."""
    table = {"source": str(source), "num_frames": 17, "size": (32, 32), "frames_schedule": ((0, 5), (9, 17))}
    return DataConfig.model_validate(table | changes)


def settings(
    chosen: DataConfig, seed: int = 0, encoders: dict[str, str] = ENCODERS, spec: Any = SPEC
) -> dict[str, Any]:
    return cache_settings(chosen, spec, seed, encoders, read_sources(chosen, spec, print))


def test_a_clip_is_in_the_bucket_of_each_stage_or_in_a_shorter_one_that_is_said(tmp_path: Path) -> None:
    chosen, said = data(folder(tmp_path / "clips", {"long": 24, "short": 10, "tiny": 6})), []
    placed = place(read_sources(chosen, SPEC, print), chosen, SPEC, 0, said.append)
    found = {(item.clip.record.path.stem, item.clip.bucket.frames, item.stages) for item in placed}
    assert found == {
        ("long", 5, (5,)),
        ("long", 17, (17,)),
        ("short", 5, (5,)),
        ("short", 9, (17,)),
        ("tiny", 5, (5, 17)),
    }
    assert any("short.mp4 has 10 frames" in line for line in said)


def test_a_validation_source_is_read_beside_the_training_source(tmp_path: Path) -> None:
    training = folder(tmp_path / "training", {"a": 24})
    held = folder(tmp_path / "held", {"b": 24, "c": 24})
    chosen = data(training, validation=str(held))
    sources = read_sources(chosen, SPEC, print)
    assert {split: [record.path.stem for record in records] for split, records in sources.items()} == {
        "train": ["a"],
        "validation": ["b", "c"],
    }
    placed = place(sources, chosen, SPEC, 0, print)
    assert {(item.clip.record.path.stem, item.split) for item in placed} == {
        ("a", "train"),
        ("b", "validation"),
        ("c", "validation"),
    }


def test_a_window_stays_where_it_is_whatever_the_clip_is_called_and_said_to_show(tmp_path: Path) -> None:
    clips = folder(tmp_path / "clips", {"a": 24, "b": 24})

    def starts(chosen: DataConfig) -> list[float]:
        placed = place(read_sources(chosen, SPEC, print), chosen, SPEC, 0, print)
        return [item.clip.window.start for item in placed if item.clip.bucket.frames == 5]

    first, second = starts(data(clips))
    assert first != second, "the clips are as long as each other"
    (clips / "a.mp4").rename(clips / "z.mp4")
    (clips / "a.txt").rename(clips / "z.txt")
    (clips / "b.txt").write_text("another caption")
    assert starts(data(clips)) == [second, first]


def test_shapes_that_the_model_cannot_take_are_named_all_at_once(tmp_path: Path) -> None:
    chosen = data(tmp_path, num_frames=18, size=(30, 33), frames_schedule=())
    with pytest.raises(DataError) as raised:
        read_sources(chosen, SPEC, print)
    assert [problem.where for problem in raised.value.problems] == ["data.num_frames", "data.size", "data.size"]


def test_an_unusable_clip_is_left_out_and_said(tmp_path: Path) -> None:
    clips = folder(tmp_path / "clips", {f"clip{index}": 24 for index in range(10)})
    (clips / "bad.mp4").write_bytes(b"no video")
    (clips / "bad.txt").write_text("bad")
    said: list[str] = []
    placed = place(read_sources(data(clips), SPEC, print), data(clips), SPEC, 0, said.append)
    assert {item.clip.record.path.stem for item in placed} == {f"clip{index}" for index in range(10)}
    (line,) = said
    assert line.startswith("left out or changed: clips/bad.mp4: ")


@pytest.mark.parametrize("stills", [{"one", "two"}, {"one"}])
def test_stills_alone_are_trained_on_and_said_to_teach_no_motion(tmp_path: Path, stills: set[str]) -> None:
    clips = folder(tmp_path / "clips", dict.fromkeys({"one", "two"} - stills, 24))
    for name in stills:
        Image.new("RGB", (40, 40), (200, 30, 30)).save(clips / f"{name}.png")
        (clips / f"{name}.txt").write_text(name)
    spec, said = variant("tiny-t2v").spec, []
    placed = place(read_sources(data(clips), spec, print), data(clips), spec, 0, said.append)
    assert {item.clip.record.path.stem for item in placed if item.clip.bucket.frames == 1} == stills
    warned = [line for line in said if "no motion" in line]
    assert len(warned) == (stills == {"one", "two"})


def test_too_many_unusable_clips_are_an_error_with_every_one_of_them(tmp_path: Path) -> None:
    clips = folder(tmp_path / "clips", {"a": 24, "b": 24})
    for name in ("bad", "worse"):
        (clips / f"{name}.mp4").write_bytes(b"no video")
        (clips / f"{name}.txt").write_text("bad")
    with pytest.raises(DataError) as raised:
        place(read_sources(data(clips), SPEC, print), data(clips), SPEC, 0, print)
    assert [problem.where for problem in raised.value.problems][:2] == ["clips/bad.mp4", "clips/worse.mp4"]


def test_only_what_decides_an_entry_is_in_the_settings(tmp_path: Path) -> None:
    clips = folder(tmp_path / "clips", {"a": 24, "b": 24})
    before = settings(data(clips))
    assert settings(data(clips, cache="/elsewhere", caption_dropout=0.9, validation=0.5)) == before
    assert settings(data(clips, frames_schedule=((0, 17), (3, 5), (8, 17)))) == before
    moved = clips.rename(tmp_path / "moved")
    assert settings(data(moved)) == before


def test_whatever_decides_an_entry_changes_the_settings(tmp_path: Path) -> None:
    clips = folder(tmp_path / "clips", {"a": 24, "b": 24})
    before = settings(data(clips))
    assert settings(data(clips), seed=1) != before, "windows are drawn by seed"
    others = [
        settings(data(clips, size=(64, 32))),
        settings(data(clips, num_frames=9, frames_schedule=())),
        settings(data(clips), encoders=ENCODERS | {"vae": "other"}),
        settings(data(clips), spec=variant("tiny-t2v").spec),
    ]
    (clips / "a.txt").write_text("another caption")
    others.append(settings(data(clips)))
    draw_clip(clips / "c.mp4", 2)
    others.append(settings(data(clips)))
    assert before not in others
    assert len({str(other) for other in others}) == len(others)


def test_training_and_validation_sources_are_not_interchangeable(tmp_path: Path) -> None:
    one, other = folder(tmp_path / "one", {"a": 24}), folder(tmp_path / "other", {"b": 24})
    assert settings(data(one, validation=str(other))) != settings(data(other, validation=str(one)))
