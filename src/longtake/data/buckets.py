"""Buckets: which shape each clip is trained at, and which window of it. Pure; needs no torch."""

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from longtake.data.metadata import ClipRecord
from longtake.data.sniff import ClipInfo, Window
from longtake.errors import ConfigError, Problem
from longtake.models.spec import ModelSpec

__all__ = ["LADDER", "Bucket", "BucketedClip", "Window", "assign", "check_shape", "stage_frames"]

LADDER = (5, 9, 13, 17, 33, 49, 65, 81, 97, 113, 129)
"""Frames of the buckets that clips too short for the wanted count may go to."""


@dataclass(frozen=True)
class Bucket:
    """The shape that a batch's clips share, in frames and pixels."""

    frames: int
    height: int
    width: int


@dataclass(frozen=True)
class BucketedClip:
    """A clip, the bucket it is trained in, and its window; it is cropped to the bucket's width and height."""

    record: ClipRecord
    info: ClipInfo
    bucket: Bucket
    window: Window


def check_shape(spec: ModelSpec, num_frames: int, size: tuple[int, int]) -> list[Problem]:
    """What keeps `spec` from training at `num_frames` frames of `size` (width, height), with the nearest that do."""
    problems = []
    stride, divisor = spec.temporal_stride, spec.size_divisor
    if num_frames < 1 or (num_frames - 1) % stride:
        near = _nearest(num_frames - 1, stride, lambda steps: stride * steps + 1, least=0)
        what = f"{num_frames} frames is not {stride}n+1"
        problems.append(Problem(what, "data.num_frames", f"take {near}", code="frames-not-4n1"))
    elif num_frames == 1 and not _takes_stills(spec):
        remedy = f"take {stride + 1} or more"
        what = f"{spec.name} cannot learn from single frames"
        problems.append(Problem(what, "data.num_frames", remedy, code="frames-single"))
    for side, pixels in zip(("width", "height"), size, strict=True):
        if pixels < divisor or pixels % divisor:
            near = _nearest(pixels, divisor, lambda steps: divisor * steps, least=1)
            what = f"{side} {pixels} does not divide by {divisor}, as {spec.name} needs"
            problems.append(Problem(what, "data.size", f"take {near}", code="size-indivisible"))
    return problems


def stage_frames(num_frames: int, schedule: tuple[tuple[int, int], ...]) -> list[tuple[int, int]]:
    """The curriculum as (from this step on, frames), beginning at step 0.

    An empty `schedule` is `num_frames` throughout. Raises ConfigError where the steps do not rise from 0.
    """
    if not schedule:
        return [(0, num_frames)]
    steps = [step for step, _ in schedule]
    if steps[0] != 0 or steps != sorted(set(steps)):
        what = f"the schedule's steps are {steps}"
        remedy = "begin at step 0 and let the steps rise"
        raise ConfigError(Problem(what, "data.frames_schedule", remedy, code="schedule-order"))
    return list(schedule)


def assign(
    records: Sequence[ClipRecord],
    infos: Sequence[ClipInfo],
    spec: ModelSpec,
    frames: Sequence[int],
    size: tuple[int, int],
    seed: int,
) -> tuple[list[BucketedClip], list[Problem]]:
    """Each clip's buckets, one for each of the wanted counts of `frames`, and what there is to say about them.

    `size` is (width, height); clips that stand where it lies, or the reverse, get it swapped. A clip too short for a
    count goes to the longest bucket that it fills. A problem whose `where` has no clip in the result says why it was
    left out, the others inform. Windows that the data does not fix are drawn from `seed`, the file's fingerprint and
    the count, and from the caption where rows of several captions have the same content: each has a window of its own.
    Names and the order of rows change nothing, so that what is encoded stays of use when they do.
    """
    clips: dict[BucketedClip, None] = {}
    problems: list[Problem] = []
    swapped = 0
    for record, info, key in zip(records, infos, _keys_of_draws(records, infos, seed), strict=True):
        counts, problem = _counts(record, info, spec, frames)
        problems += [problem] if problem else []
        width, height = size[::-1] if _stands_across(info, size) else size
        swapped += bool(counts) and (width, height) != size
        for count in counts:
            window = Window(_start(record, info, count, spec, key), count, float(spec.fps))
            clips[BucketedClip(record, info, Bucket(count, height, width), window)] = None
    if swapped:
        what = f"{swapped} of {len(records)} clips are {'upright' if size[0] > size[1] else 'lying'}"
        what = f"{what} and are trained at {size[1]}x{size[0]}"
        problems.append(Problem(what, "data.size", code="clips-turned"))
    return list(clips), problems


def _counts(
    record: ClipRecord, info: ClipInfo, spec: ModelSpec, frames: Sequence[int]
) -> tuple[list[int], Problem | None]:
    """The clip's frame counts without repetition; and why there are none, or why one is less than wanted."""
    if info.is_image:
        if _takes_stills(spec):
            return [1], None
        remedy = "leave it out: this model learns from clips, whose first frame it is given"
        return [], Problem(f"{record.path.name} is a still image", record.where, remedy, code="clip-still")
    start = record.start or 0.0
    if start >= info.duration:
        what = f"start is {start:g} s, and {record.path.name} ends at {info.duration:.2f} s"
        return [], Problem(what, record.where, "correct start", code="row-start-late")
    room = _room(record, info, spec)
    what = f"{record.path.name} has {room} frames at {spec.fps} fps"
    if room < LADDER[0]:
        remedy = f"give a clip of {LADDER[0]} or more, or leave it out"
        return [], Problem(what, record.where, remedy, code="clip-too-short")
    counts = [_longest(room, wanted, frames) for wanted in frames]
    short = sorted({wanted for wanted, count in zip(frames, counts, strict=True) if count < wanted})
    if not short:
        return list(dict.fromkeys(counts)), None
    wanted = ", ".join(str(count) for count in short)
    used = f"it is used at {_longest(room, short[0], frames)} instead of {wanted}"
    return list(dict.fromkeys(counts)), Problem(f"{what}: {used}", record.where, code="clip-shorter")


def _room(record: ClipRecord, info: ClipInfo, spec: ModelSpec) -> int:
    """Frames at the model's rate that the usable part of the clip holds."""
    seconds = info.duration - (record.start or 0.0)
    if record.frames is not None:
        seconds = min(seconds, record.frames / (record.fps or spec.fps))
    # A frame is shown until the next: the last one needs only its beginning, give or take a rounded timestamp.
    return math.ceil(seconds * spec.fps - 0.05)


def _longest(room: int, wanted: int, frames: Sequence[int]) -> int:
    """The largest count that fits into `room` and is not above `wanted`."""
    if wanted <= room:
        return wanted
    return max(count for count in (*LADDER, *frames) if 1 < count <= room and count < wanted)


def _keys_of_draws(records: Sequence[ClipRecord], infos: Sequence[ClipInfo], seed: int) -> list[str]:
    """For each clip what its window is drawn from, but for the count."""
    captions: defaultdict[str, set[str]] = defaultdict(set)
    for record, info in zip(records, infos, strict=True):
        if _begins_anywhere(record):
            captions[info.fingerprint].add(record.prompt)
    keys = (f"{seed}\0{info.fingerprint}" for info in infos)
    return [
        f"{key}\0{record.prompt}" if len(captions[info.fingerprint]) > 1 else key
        for key, record, info in zip(keys, records, infos, strict=True)
    ]


def _begins_anywhere(record: ClipRecord) -> bool:
    return record.start is None and record.frames is None


def _start(record: ClipRecord, info: ClipInfo, count: int, spec: ModelSpec, key: str) -> float:
    """Seconds at which the window begins: as the data says, else anywhere in the clip by `key` and `count`."""
    slack = info.duration - count / spec.fps
    if not _begins_anywhere(record) or info.is_image or slack <= 0:
        return record.start or 0.0
    draw = int.from_bytes(hashlib.sha256(f"{count}\0{key}".encode()).digest()[:8], "big") / 2**64
    return math.floor(draw * slack * 1000) / 1000


def _stands_across(info: ClipInfo, size: tuple[int, int]) -> bool:
    return (info.width - info.height) * (size[0] - size[1]) < 0


def _takes_stills(spec: ModelSpec) -> bool:
    return spec.task in ("t2v", "ti2v")


def _nearest(value: int, step: int, make: Callable[[int], int], least: int) -> str:
    below = max(value // step, least)
    return " or ".join(str(make(steps)) for steps in dict.fromkeys((below, max(below + 1, least))))
