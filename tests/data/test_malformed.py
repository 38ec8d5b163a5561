"""Each malformed input gives one clear line, wherever it is noticed: in the listing, the file, or its pictures."""

import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import clips
from longtake.data.metadata import read_source
from longtake.data.video import Window, content_hash, probe, read_clip, read_image
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


@pytest.mark.parametrize("name", ["a.mp4", "a.png"])
def test_zero_bytes(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    assert "is empty (0 bytes)" in refused(tmp_path / name)


@pytest.mark.parametrize("content", [b"just text\n" * 50, b"\0" * 5000, b"%PDF-1.7", bytes(range(256)) * 20])
def test_what_is_no_video(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.mp4").write_bytes(content)
    assert "is not a video" in refused(tmp_path / "a.mp4")


@pytest.mark.parametrize(
    "content",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile secret.mp4\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
    ],
)
def test_a_playlist_opens_no_other_file(tmp_path: Path, content: str) -> None:
    clips.write(tmp_path / "secret.mp4", clips.levels(6))
    (tmp_path / "a.mp4").write_text(content)
    assert "is not a video" in refused(tmp_path / "a.mp4")


def test_sound_without_pictures(tmp_path: Path) -> None:
    assert "has no pictures" in refused(clips.write_sound_only(tmp_path / "song.mp4"))


def test_a_folder_named_like_a_video(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").mkdir()
    assert "is a folder" in refused(tmp_path / "a.mp4")


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


@pytest.mark.parametrize("movflags", ["", "faststart"])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.9])
def test_a_truncated_mp4(tmp_path: Path, movflags: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (48, 48, 64, 3), np.uint8)
    whole = clips.write(tmp_path / "whole.mp4", noise, movflags=movflags)
    assert "cut.mp4" in refused(clips.write_truncated(tmp_path / "cut.mp4", whole, share))


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_damage_in_the_middle_is_not_painted_over(tmp_path: Path, name: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (48, 48, 64, 3), np.uint8)
    path = clips.write(tmp_path / name, noise)
    content = np.frombuffer(path.read_bytes(), np.uint8).copy()
    content[np.random.default_rng(1).integers(len(content) // 4, len(content) * 3 // 4, 20)] ^= 0x55
    path.write_bytes(content.tobytes())
    line = only_line(lambda: read_clip(path, Window(0.0, 48, 24.0), SIZE))
    assert name in line
    assert "damaged" in line


def test_one_frame_and_odd_sizes_are_read(tmp_path: Path) -> None:
    info = probe(clips.write(tmp_path / "one.mp4", clips.levels(1)), "row 2")
    assert (info.frames, info.is_image) == (1, False)
    odd = np.random.default_rng(0).integers(0, 255, (4, 37, 53, 3), np.uint8)
    path = tmp_path / "odd.mkv"
    clips.write(path, odd, codec="mpeg4")
    assert (probe(path, "row 2").width, probe(path, "row 2").height) == (53, 37)
    assert read_clip(path, Window(0.0, 4, 24.0), (48, 32)).shape == (4, 3, 32, 48)


def test_an_avi_that_lost_the_order_of_its_frames(tmp_path: Path) -> None:
    path = clips.write(tmp_path / "a.avi", clips.levels(24))
    assert "does not say when its pictures are shown" in refused(path)


def test_pictures_beyond_the_limit(tmp_path: Path) -> None:
    path = clips.write(tmp_path / "a.mp4", clips.levels(2, 8208, 16))
    assert "8208x16, more than the limit" in refused(path)


def test_a_pixel_aspect_that_makes_pictures_huge(tmp_path: Path) -> None:
    path = clips.write(tmp_path / "a.mp4", clips.levels(2, 64, 240), aspect=(200, 1))
    assert "12800x240, more than the limit" in refused(path)


def test_a_header_that_states_a_smaller_picture_than_follows(tmp_path: Path) -> None:
    path = clips.write(tmp_path / "a.mp4", clips.levels(6, 128, 96))
    content = path.read_bytes()
    stated = struct.pack(">HH", 128, 96)
    assert stated in content
    path.write_bytes(content.replace(stated, struct.pack(">HH", 64, 48), 1))
    info = probe(path, "row 2")
    assert (info.width, info.height) == (128, 96)


def test_an_image_of_30000_by_30000_is_refused_by_its_header(tmp_path: Path) -> None:
    path = clips.write_huge_png(tmp_path / "huge.png")
    assert "more than" in refused(path)
    assert "huge.png" in only_line(lambda: read_image(path, SIZE))


@pytest.mark.parametrize("side", [8193, 9500, 13000])
def test_images_just_beyond_the_limit_warn_nobody(tmp_path: Path, side: int) -> None:
    assert "huge.png" in refused(clips.write_huge_png(tmp_path / "huge.png", side))


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_truncated_image_is_named_when_it_is_read(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (90, 90, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / f"whole.{suffix}")
    path = clips.write_truncated(tmp_path / f"cut.{suffix}", tmp_path / f"whole.{suffix}", 0.5)
    assert f"cut.{suffix} is a damaged image" in only_line(lambda: read_image(path, SIZE))


def test_an_image_header_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert "is a damaged image" in refused(tmp_path / "a.png")


def test_an_animated_gif_is_no_clip(tmp_path: Path) -> None:
    Image.new("P", SIZE).save(tmp_path / "a.gif", save_all=True, append_images=[Image.new("P", SIZE, 5)])
    assert "is not a video" in refused(tmp_path / "a.gif")


def source_line(tmp_path: Path, name: str, content: str | bytes) -> str:
    (tmp_path / "a.mp4").write_bytes(b"content")
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return only_line(lambda: read_source(tmp_path / name, False))


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("clips.csv", "", "clips.csv is empty (0 bytes)"),
        ("clips.csv", "\n \n", "has no rows"),
        ("clips.csv", "video,prompt\n", "has no rows"),
        ("clips.csv", "video,prompt\n,\n\n", "has no rows"),
        ("clips.csv", "video,text\na.mp4,A\n", "has no column prompt or caption"),
        ("clips.csv", "vido,prompt\na.mp4,A\n", "rename 'vido' to 'video'"),
        ("clips.csv", "video,prompt,prompt\na.mp4,A,B\n", "clips.csv:row 1: column 'prompt' is there twice"),
        ("clips.csv", "video;prompt\na.mp4;A\n", "not separated by commas"),
        ("clips.csv", 'video,prompt\na.mp4,"A\nb.mp4,B\n', "broken CSV"),
        ("clips.csv", f"video,prompt\na.mp4,{'x' * 200_000}\n", "broken CSV"),
        ("clips.csv", b"video,prompt\na.mp4,\xff\xfe\xff\n", "not valid UTF-8 or GBK"),
        ("clips.json", "[]", "has no rows"),
        ("clips.json", "{}", "is not a list"),
        ("clips.json", '[{"video": "a.mp4", "prompt": "A"},', "broken JSON"),
        ("clips.json", '[{"video": "a.mp4", "video": "b.mp4", "prompt": "A"}]', "a key is there twice"),
        ("clips.json", "[" * 100_000, "broken JSON"),
        ("clips.txt", "a.mp4 A", "a source may not be a .txt"),
        ("clips", "a.mp4 A", "a source may not be a file without ending"),
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
