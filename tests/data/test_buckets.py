"""Every clip gets the bucket it can fill and a window that depends on nothing but the seed and itself."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longtake.data.buckets import LADDER, Bucket, BucketedClip, assign, check_shape, stage_frames
from longtake.data.metadata import ClipRecord
from longtake.data.sniff import ClipInfo
from longtake.errors import ConfigError, Problem
from longtake.models.wan.variants import variant

T2V = variant("wan2.1-t2v-14b").spec
I2V = variant("wan2.1-i2v-14b-480p").spec
TI2V = variant("wan2.2-ti2v-5b").spec
SIZE = (832, 480)
STILL = ClipInfo(640, 480, 0.0, 0.0, 1, is_image=True)


def record(
    name: str = "a.mp4", start: float | None = None, frames: int | None = None, fps: float | None = None
) -> ClipRecord:
    return ClipRecord(Path("set") / name, f"caption of {name}", start, frames, fps, f"clips.csv:{name}")


def clip(seconds: float, width: int = 1280, height: int = 720, fps: float = 24.0, fingerprint: str = "one") -> ClipInfo:
    return ClipInfo(width, height, seconds, fps, round(seconds * fps), fingerprint=fingerprint)


def placed(row: ClipRecord, info: ClipInfo, *frames: int, seed: int = 0) -> tuple[list[BucketedClip], list[Problem]]:
    return assign([row], [info], I2V, frames, SIZE, seed)


def line_of(problem: Problem) -> str:
    """What is said of it before its code."""
    assert problem.code
    return str(problem).removesuffix(f" [{problem.code}]")


@pytest.mark.parametrize(
    ("num_frames", "size", "lines"),
    [
        (81, (832, 480), []),
        (80, (832, 480), ["data.num_frames: 80 frames is not 4n+1; take 77 or 81"]),
        (0, (832, 480), ["data.num_frames: 0 frames is not 4n+1; take 1 or 5"]),
        (1, (832, 480), ["data.num_frames: wan2.1-i2v-14b-480p cannot learn from single frames; take 5 or more"]),
        (
            82,
            (830, 8),
            [
                "data.num_frames: 82 frames is not 4n+1; take 81 or 85",
                "data.size: width 830 does not divide by 16, as wan2.1-i2v-14b-480p needs; take 816 or 832",
                "data.size: height 8 does not divide by 16, as wan2.1-i2v-14b-480p needs; take 16 or 32",
            ],
        ),
    ],
)
def test_an_impossible_shape_names_the_nearest_possible(
    num_frames: int, size: tuple[int, int], lines: list[str]
) -> None:
    assert [line_of(problem) for problem in check_shape(I2V, num_frames, size)] == lines


def test_the_divisor_is_the_models() -> None:
    assert "take 704 or 736" in str(check_shape(TI2V, 121, (1280, 720))[0])
    assert check_shape(T2V, 1, (1280, 720)) == []


def test_a_schedule_is_its_stages_and_none_is_one() -> None:
    assert stage_frames(81, ()) == [(0, 81)]
    assert stage_frames(49, ((0, 17), (200, 33), (500, 49))) == [(0, 17), (200, 33), (500, 49)]


@pytest.mark.parametrize("schedule", [((10, 17), (20, 33)), ((0, 17), (0, 33)), ((0, 17), (50, 33), (40, 49))])
def test_a_schedule_rises_from_step_zero(schedule: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(ConfigError, match="begin at step 0"):
        stage_frames(49, schedule)


def test_a_long_clip_serves_every_stage() -> None:
    clips, problems = placed(record(), clip(10.0), 17, 49, 81)
    assert [item.bucket for item in clips] == [Bucket(frames, 480, 832) for frames in (17, 49, 81)]
    assert problems == []
    for item in clips:
        assert item.window.frames == item.bucket.frames
        assert item.window.fps == 16
        assert 0 <= item.window.start <= 10 - item.bucket.frames / 16


def test_a_clip_too_short_goes_to_a_shorter_bucket_once_and_is_reported() -> None:
    clips, (problem,) = placed(record(), clip(2.5), 17, 49, 81)
    assert [item.bucket.frames for item in clips] == [17, 33]
    assert line_of(problem) == "clips.csv:a.mp4: a.mp4 has 40 frames at 16 fps: it is used at 33 instead of 49, 81"


def test_a_clip_of_exactly_the_frames_fits_whatever_the_containers_rounding() -> None:
    for seconds in (81 / 16, 5.062, 5.063):
        (only,), problems = placed(record(), clip(seconds), 81)
        assert (only.bucket.frames, only.window.start, problems) == (81, 0.0, [])


@pytest.mark.parametrize("frames", [1, 4])
def test_a_clip_of_up_to_four_frames_is_left_out_and_reported(frames: int) -> None:
    clips, (problem,) = placed(record(), clip(frames / 16), 17)
    assert clips == []
    assert line_of(problem) == (
        f"clips.csv:a.mp4: a.mp4 has {frames} frames at 16 fps; give a clip of 5 or more, or leave it out"
    )


def test_stills_are_clips_of_one_frame_for_t2v_and_refused_for_i2v() -> None:
    for spec in (T2V, TI2V):
        (only,), problems = assign([record("a.png")], [STILL], spec, [17, 81], (640, 480), 0)
        assert (only.bucket, only.window.frames, problems) == (Bucket(1, 480, 640), 1, [])
    clips, (problem,) = assign([record("a.png")], [STILL], I2V, [17], SIZE, 0)
    assert clips == []
    assert "is a still image; leave it out" in str(problem)


def test_upright_clips_get_the_size_swapped_and_are_counted_once() -> None:
    rows = [record(name) for name in ("a.mp4", "b.mp4", "c.mp4", "square.mp4")]
    infos = [clip(9.0, 720, 1280), clip(9.0, 1280, 720), clip(9.0, 480, 900), clip(9.0, 500, 500)]
    clips, (problem,) = assign(rows, infos, I2V, [17, 49], SIZE, 0)
    assert {(item.record.path.name, item.bucket.width, item.bucket.height) for item in clips} == {
        ("a.mp4", 480, 832),
        ("b.mp4", 832, 480),
        ("c.mp4", 480, 832),
        ("square.mp4", 832, 480),
    }
    assert line_of(problem) == "data.size: 2 of 4 clips are upright and are trained at 480x832"


def test_the_data_fixes_where_a_window_begins_and_how_long_it_may_be() -> None:
    (only,), _ = placed(record(start=6.0, frames=81, fps=16.0), clip(600.0), 81)
    assert (only.window.start, only.window.frames) == (6.0, 81)
    (only,), (problem,) = placed(record(start=6.0, frames=81, fps=24.0), clip(600.0), 81)
    assert (only.window.start, only.window.frames) == (6.0, 49)
    assert "has 54 frames at 16 fps: it is used at 49 instead of 81" in str(problem)
    (only,), _ = placed(record(frames=81), clip(600.0), 81)
    assert only.window.start == 0.0


def test_a_start_beyond_the_end_is_left_out_and_reported() -> None:
    clips, (problem,) = placed(record(start=12.0), clip(10.0), 17)
    assert clips == []
    assert line_of(problem) == "clips.csv:a.mp4: start is 12 s, and a.mp4 ends at 10.00 s; correct start"


def starts(rows: list[ClipRecord], infos: list[ClipInfo], seed: int = 3, frames: int = 49) -> list[float]:
    return [item.window.start for item in assign(rows, infos, I2V, [frames], SIZE, seed)[0]]


def test_free_windows_are_a_function_of_seed_content_and_count_alone() -> None:
    rows = [record(f"{index}.mp4") for index in range(8)]
    infos = [clip(60.0, fingerprint=f"content {index}") for index in range(8)]
    drawn = starts(rows, infos)
    assert len({*drawn, *starts(rows, infos, frames=17)}) == 16
    other = [ClipRecord(Path("elsewhere") / f"other-{row.path.name}", "mended", None, None, None, "x") for row in rows]
    assert starts(other[::-1], infos[::-1]) == drawn[::-1]
    assert [starts([row], [info])[0] for row, info in zip(other, infos, strict=True)] == drawn
    assert all(start != before for start, before in zip(starts(rows, infos, seed=4), drawn, strict=True))
    changed = [replace(info, fingerprint=f"new {info.fingerprint}") for info in infos]
    assert all(start != before for start, before in zip(starts(rows, changed), drawn, strict=True))


def test_rows_of_one_content_with_captions_of_their_own_have_windows_of_their_own() -> None:
    rows, infos = [record("a.mp4"), record("b.mp4"), record("c.mp4")], [clip(60.0)] * 3
    drawn = starts(rows, infos)
    assert len(set(drawn)) == 3
    assert starts(rows[::-1], infos) == drawn[::-1]
    mended = [rows[0], replace(rows[1], prompt="mended"), rows[2]]
    assert [start == before for start, before in zip(starts(mended, infos), drawn, strict=True)] == [True, False, True]


def test_rows_that_need_no_window_of_their_own_leave_those_of_others_alone() -> None:
    drawn = starts([record("a.mp4")], [clip(60.0)])
    fixed, short = record("b.mp4", start=2.0), record("c.mp4", frames=81)
    assert starts([record("a.mp4"), fixed, short], [clip(60.0)] * 3) == [*drawn, 2.0, 0.0]
    again = replace(record("a.mp4"), path=Path("copy.mp4"), where="copy")
    assert starts([record("a.mp4"), again], [clip(60.0)] * 2) == drawn * 2


def test_a_row_given_twice_is_one_clip() -> None:
    clips, _ = assign([record(), record()], [clip(9.0), clip(9.0)], I2V, [17], SIZE, 0)
    assert len(clips) == 1


@given(st.floats(0.01, 20), st.sets(st.sampled_from([17, 33, 49, 81, 121]), min_size=1), st.integers(0, 5))
def test_every_window_lies_inside_its_clip(seconds: float, frames: set[int], seed: int) -> None:
    clips, problems = placed(record(), clip(seconds), *sorted(frames), seed=seed)
    assert clips or problems
    for item in clips:
        assert item.bucket.frames in {*LADDER, *frames}
        assert item.bucket.frames % 4 == 1
        assert item.window.start >= 0
        assert item.window.start + (item.window.frames - 1) / item.window.fps < seconds
