"""Frames come by timestamp, upright, square-pixelled and cropped alike for clips and images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import clips
from longtake.data.decoding import SLACK_SECONDS, pick_by_time
from longtake.data.regular_files import content_hash
from longtake.data.video import Window, cover_and_crop, probe, read_clip, read_image, write_clip
from longtake.errors import DataError, RunError

SIZE = (64, 48)


def shown(path: Path, window: Window) -> list[int]:
    """The index of the source frame that each frame of the window is, for a clip of `clips.levels`."""
    grey = read_clip(path, window, SIZE).float().mean((1, 2, 3))
    return [round((level - 16) / clips.STEP) for level in grey.tolist()]


@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.mkv", "A.MP4"])
def test_at_the_clips_own_rate_each_frame_comes_once(tmp_path: Path, name: str) -> None:
    path = clips.write(tmp_path / name, clips.levels(24))
    assert shown(path, Window(0.0, 24, 24.0)) == list(range(24))


def test_a_lower_rate_takes_the_last_frame_at_or_before_each_time(tmp_path: Path) -> None:
    path = clips.write(tmp_path / "a.mp4", clips.levels(24))
    assert shown(path, Window(0.0, 16, 16.0)) == [index * 24 // 16 for index in range(16)]


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_a_variable_frame_rate_is_resampled_by_timestamp(tmp_path: Path, name: str) -> None:
    times = [0, 40, 80, 500, 540, 1000, 1020, 1500, 1510, 1520, 1530, 1800]
    path = clips.write(tmp_path / name, clips.levels(len(times)), milliseconds=times)
    asked = [index * 100 for index in range(18)]
    expected = [max(i for i, time in enumerate(times) if time <= ask) for ask in asked]
    assert shown(path, Window(0.0, 18, 10.0)) == expected


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])
def test_a_window_far_into_the_clip_equals_reading_from_its_beginning(tmp_path: Path, name: str) -> None:
    codec = "mpeg4" if name.endswith("avi") else "libx264"
    path = clips.write(tmp_path / name, clips.levels(120), codec=codec)
    whole = read_clip(path, Window(0.0, 120, 24.0), SIZE)
    assert torch.equal(read_clip(path, Window(95 / 24, 9, 24.0), SIZE), whole[95:104])


def test_the_first_timestamp_is_second_zero(tmp_path: Path) -> None:
    late = clips.write(tmp_path / "late.mkv", clips.levels(10), milliseconds=[5000 + 40 * i for i in range(10)])
    assert shown(late, Window(0.0, 10, 25.0)) == list(range(10))
    assert probe(late, "row 2").duration == pytest.approx(0.4, abs=0.01)


def test_a_window_beyond_the_end_names_the_clip(tmp_path: Path) -> None:
    path = clips.write(tmp_path / "short.mp4", clips.levels(12))
    assert len(read_clip(path, Window(0.0, 12, 24.0), SIZE)) == 12
    with pytest.raises(DataError, match=r"short\.mp4 ends before 0\.500 s"):
        read_clip(path, Window(0.0, 13, 24.0), SIZE)
    with pytest.raises(DataError, match="ends before"):
        read_clip(path, Window(60.0, 1, 24.0), SIZE)


@given(st.lists(st.integers(1, 500), min_size=1, max_size=30), st.integers(1, 40), st.floats(1, 60))
def test_the_picture_of_a_time_is_the_last_that_began(gaps: list[int], count: int, fps: float) -> None:
    begins = [sum(gaps[:index]) / 1000 for index in range(len(gaps))]
    pictures = [(begin, gap / 1000, index) for index, (begin, gap) in enumerate(zip(begins, gaps, strict=True))]
    times = [index / fps for index in range(count)]
    picked = list(pick_by_time(pictures, times))
    until = max(sum(gaps) / 1000 - SLACK_SECONDS, begins[-1] + SLACK_SECONDS)
    inside = [time for time in times if time < until]
    assert picked == [max(i for i, b in enumerate(begins) if b <= t + SLACK_SECONDS) for t in inside]


@pytest.mark.parametrize("degrees", [0, 90, 180, -90])
@pytest.mark.parametrize("mirrored", [False, True])
def test_the_display_matrix_is_honoured(tmp_path: Path, degrees: int, mirrored: bool) -> None:
    path = clips.write(tmp_path / "a.mp4", clips.quadrants(6), degrees=degrees, mirrored=mirrored)
    turned = np.rot90(clips.quadrants(1)[0], degrees // 90)
    expected = turned[:, ::-1] if mirrored else turned
    info = probe(path, "row 2")
    assert (info.width, info.height) == (expected.shape[1], expected.shape[0])
    frame = read_clip(path, Window(0.0, 1, 24.0), (info.width, info.height))[0].permute(1, 2, 0).numpy()
    assert np.abs(frame.astype(int) - expected)[np.ix_((8, -8), (8, -8))].max() < 12


def test_anamorphic_pixels_are_made_square(tmp_path: Path) -> None:
    path = clips.write(tmp_path / "a.mp4", clips.quadrants(3), aspect=(2, 1))
    info = probe(path, "row 2")
    assert (info.width, info.height) == (128, 48)
    assert read_clip(path, Window(0.0, 1, 24.0), (128, 48)).shape == (1, 3, 48, 128)


def test_probing_tells_size_rate_and_duration(tmp_path: Path) -> None:
    info = probe(clips.write(tmp_path / "a.mp4", clips.levels(30, 80, 46), fps=15), "row 2")
    assert (info.width, info.height, info.fps, info.frames, info.is_image) == (80, 46, 15.0, 30, False)
    assert info.duration == pytest.approx(2.0, abs=1e-3)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_the_duration_is_that_of_the_pictures_not_of_the_sound(tmp_path: Path, name: str) -> None:
    path = clips.write(tmp_path / name, clips.levels(24), tone=5)
    assert probe(path, "row 2").duration == pytest.approx(1.0, abs=0.01)


def test_black_grey_and_white_come_back_as_they_were(tmp_path: Path) -> None:
    frames = torch.stack([torch.full((3, 48, 64), level, dtype=torch.uint8) for level in (0, 64, 128, 200, 255)])
    write_clip(frames, tmp_path / "a.mp4", 16.0)
    back = read_clip(tmp_path / "a.mp4", Window(0.0, 5, 16.0), SIZE)
    assert (back.int() - frames.int()).abs().max() <= 1


@pytest.mark.parametrize("size", [(64, 48), (1280, 720)])
def test_colours_survive_writing_and_reading(tmp_path: Path, size: tuple[int, int]) -> None:
    frames = torch.from_numpy(clips.quadrants(3, *size).copy()).permute(0, 3, 1, 2)
    write_clip(frames, tmp_path / "a.mp4", 16.0)
    back = read_clip(tmp_path / "a.mp4", Window(0.0, 3, 16.0), size)
    for row, column in ((0.25, 0.25), (0.25, 0.75), (0.75, 0.25), (0.75, 0.75)):
        y, x = int(row * size[1]), int(column * size[0])
        assert (back[:, :, y, x].int() - frames[:, :, y, x].int()).abs().max() <= 3


def test_a_clip_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    target.mkdir()
    with pytest.raises(RunError, match="cannot write the video"):
        write_clip(torch.zeros(2, 3, 48, 64, dtype=torch.uint8), target, 16.0)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    with pytest.raises(DataError, match="even sides"):
        write_clip(torch.zeros(2, 3, 47, 64, dtype=torch.uint8), tmp_path / "a.mp4", 16.0)


@pytest.mark.parametrize("size", [(64, 48), (48, 64), (32, 16), (112, 64), (160, 160)])
@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_an_image_of_a_clips_first_frame_gives_the_same_bytes(
    tmp_path: Path, size: tuple[int, int], codec: str
) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (5, 66, 98, 3), np.uint8)
    path = clips.write(tmp_path / "a.mp4", noise, codec=codec)
    frame = read_clip(path, Window(0.0, 1, 24.0), (98, 66))[0]
    Image.fromarray(frame.permute(1, 2, 0).numpy()).save(tmp_path / "first.png")
    clip = read_clip(path, Window(0.0, 5, 24.0), size)
    assert torch.equal(read_image(tmp_path / "first.png", size), clip[0])


@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 6), st.integers(1, 6))
def test_covering_fills_the_size_and_keeps_a_flat_colour(width: int, height: int, columns: int, rows: int) -> None:
    size = (columns * 16, rows * 16)
    frames = torch.full((2, 3, height, width), 201, dtype=torch.uint8)
    result = cover_and_crop(frames, size)
    assert result.shape == (2, 3, size[1], size[0])
    assert result.unique().tolist() == [201]


def test_the_centre_is_what_is_kept() -> None:
    frames = torch.zeros(1, 3, 16, 48, dtype=torch.uint8)
    frames[..., 16:32] = 255
    assert cover_and_crop(frames, (16, 16)).unique().tolist() == [255]


def test_a_frame_alone_is_scaled_to_the_same_bytes_as_among_others() -> None:
    frames = torch.randint(0, 256, (5, 3, 50, 70), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(cover_and_crop(frames, SIZE)[3:4], cover_and_crop(frames[3:4], SIZE))


def test_an_images_orientation_tag_is_honoured(tmp_path: Path) -> None:
    picture = Image.fromarray(clips.quadrants(1)[0])
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "a.jpg", exif=exif, quality=95)
    info = probe(tmp_path / "a.jpg", "row 2")
    assert (info.width, info.height, info.frames, info.is_image) == (48, 64, 1, True)
    turned = read_image(tmp_path / "a.jpg", (48, 64)).permute(1, 2, 0).numpy().astype(int)
    expected = np.rot90(clips.quadrants(1)[0], -1)
    assert np.abs(turned - expected)[8:16, 8:16].max() < 20
    assert np.abs(turned - expected)[40:56, 30:44].max() < 20


def test_transparent_parts_lie_over_black_and_16_bits_keep_their_scale(tmp_path: Path) -> None:
    Image.new("RGBA", SIZE, (200, 100, 50, 0)).save(tmp_path / "clear.png")
    assert read_image(tmp_path / "clear.png", SIZE).max() == 0
    Image.fromarray(np.full((48, 64), 128 * 256, np.uint16)).save(tmp_path / "deep.png")
    assert read_image(tmp_path / "deep.png", SIZE).unique().tolist() == [128]
    Image.new("P", SIZE, 3).save(tmp_path / "palette.png")
    assert read_image(tmp_path / "palette.png", SIZE).shape == (3, 48, 64)


def test_a_hash_depends_on_the_content_alone(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 100_000)
    (tmp_path / "b").write_bytes(b"x" * 100_000)
    (tmp_path / "c").write_bytes(b"x" * 99_999 + b"y")
    a, b, c = (content_hash(tmp_path / name) for name in "abc")
    assert a == b != c
