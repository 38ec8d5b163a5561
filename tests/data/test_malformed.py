"""Each malformed input gives one clear line, wherever it is noticed: in the listing, the file, or its pictures."""

import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import clips
from longtake.data.metadata import read_source
from longtake.data.video import Window, content_hash, probe, read_clip
from longtake.errors import DataError

SIZE = (64, 48)


def only_line(call: Callable[[], object]) -> str:
    """The single line of the DataError that `call` raises."""
    with pytest.raises(DataError) as raised:
        call()
    assert raised.value.exit_status == 2
    (problem,) = raised.value.problems
    line = str(problem)
    assert problem.what
    assert problem.remedy
    assert "\n" not in line
    assert len(line) < 400
    return line


def refused(path: Path) -> str:
    """What probing says of `path`, which names the row and the file."""
    line = only_line(lambda: probe(path, "clips.csv:row 3"))
    assert line.startswith("clips.csv:row 3: ")
    assert path.name in line
    return line


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    assert "gone.mp4 does not exist" in refused(tmp_path / "gone.mp4")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.mp4")
    assert "is a pipe or a device" in refused(tmp_path / "a.mp4")
    (tmp_path / "clips.csv").write_text("video,prompt\na.mp4,A\n")
    _, (problem,) = read_source(tmp_path / "clips.csv", False)
    assert "is a pipe or a device" in str(problem)


def test_a_name_that_is_not_utf_8_costs_only_its_row(tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    folder.mkdir()
    for name in (b"\xff", b"kite"):
        clips.write(folder / "clip.mp4", clips.levels(8)).rename(folder / os.fsdecode(name + b".mp4"))
        (folder / os.fsdecode(name + b".txt")).write_text("a kite")
    (record,), (problem,) = read_source(folder, False)
    assert record.path.name == "kite.mp4"
    assert (problem.what, problem.where) == ("the path is not UTF-8", "clips/\\udcff.mp4")
    (folder / "clips.jsonl").write_text('{"video": "\\udcff.mp4", "caption": "a kite"}')
    _, (problem,) = read_source(folder / "clips.jsonl", False)
    assert (problem.what, problem.where) == ("the path is not UTF-8", "clips.jsonl:line 1")


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    clips.write(tmp_path / "real.mp4", clips.levels(6))
    (tmp_path / "a.mp4").symlink_to("real.mp4")
    assert "is a link" in refused(tmp_path / "a.mp4")
    only_line(lambda: read_clip(tmp_path / "a.mp4", Window(0.0, 1, 24.0), SIZE))
    only_line(lambda: content_hash(tmp_path / "a.mp4"))


def test_one_frame_and_odd_sizes_are_read(tmp_path: Path) -> None:
    info = probe(clips.write(tmp_path / "one.mp4", clips.levels(1)), "row 2")
    assert (info.frames, info.is_image) == (1, False)
    odd = np.random.default_rng(0).integers(0, 255, (4, 37, 53, 3), np.uint8)
    path = tmp_path / "odd.mkv"
    clips.write(path, odd, codec="mpeg4")
    assert (probe(path, "row 2").width, probe(path, "row 2").height) == (53, 37)
    assert read_clip(path, Window(0.0, 4, 24.0), (48, 32)).shape == (4, 3, 32, 48)


def test_a_header_that_states_a_smaller_picture_than_follows(tmp_path: Path) -> None:
    path = clips.write(tmp_path / "a.mp4", clips.levels(6, 128, 96))
    content = path.read_bytes()
    stated = struct.pack(">HH", 128, 96)
    assert stated in content
    path.write_bytes(content.replace(stated, struct.pack(">HH", 64, 48), 1))
    info = probe(path, "row 2")
    assert (info.width, info.height) == (128, 96)


@pytest.mark.parametrize("side", [8193, 9500, 13000])
def test_images_just_beyond_the_limit_warn_nobody(tmp_path: Path, side: int) -> None:
    assert "huge.png" in refused(clips.write_huge_png(tmp_path / "huge.png", side))


def source_line(tmp_path: Path, name: str, content: str | bytes) -> str:
    (tmp_path / "a.mp4").write_bytes(b"content")
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return only_line(lambda: read_source(tmp_path / name, False))


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("clips.csv", f"video,prompt\na.mp4,{'x' * 200_000}\n", "broken CSV"),
        ("clips.csv", b"video,prompt\na.mp4,\xff\xfe\xff\n", "not valid UTF-8 or GBK"),
    ],
)
def test_a_listing_that_is_broken_as_a_whole(tmp_path: Path, name: str, content: str | bytes, what: str) -> None:
    assert what in source_line(tmp_path, name, content)


def test_sources_that_are_no_listing(tmp_path: Path) -> None:
    assert "does not exist" in only_line(lambda: read_source(tmp_path / "gone", False))
    assert "is a URL" in only_line(lambda: read_source(Path("https://example.org/clips.csv"), False))
    (tmp_path / "empty").mkdir()
    assert "has no clips" in only_line(lambda: read_source(tmp_path / "empty", False))
    (tmp_path / "empty" / "metadata.csv").write_text("video,prompt\n")
    assert "metadata.csv" in only_line(lambda: read_source(tmp_path / "empty", False))
    os.mkfifo(tmp_path / "pipe.csv")
    assert "is a pipe or a device" in only_line(lambda: read_source(tmp_path / "pipe.csv", False))


def test_a_broken_line_costs_only_its_row(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"content")
    lines = ['{"video": "a.mp4", "prompt": "A"}', '{"video": "a.mp4", "prompt"', '{"video": "a.mp4", "prompt": "B"}']
    (tmp_path / "clips.jsonl").write_text("\n".join(lines))
    records, (problem,) = read_source(tmp_path / "clips.jsonl", False)
    assert [record.prompt for record in records] == ["A", "B"]
    assert str(problem).startswith("clips.jsonl:line 2: broken JSON")


def test_a_caption_with_a_bare_comma_costs_only_its_row(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"content")
    (tmp_path / "clips.csv").write_text("video,prompt\na.mp4,A hill, green\na.mp4,B\n")
    records, (problem,) = read_source(tmp_path / "clips.csv", False)
    assert [record.prompt for record in records] == ["B"]
    assert str(problem).startswith("clips.csv:row 2: has 3 fields, the header has 2")
