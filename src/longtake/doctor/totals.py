"""A dataset in numbers: clips, what is left out and why, buckets, and how far it is from where `prepare` stops."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from longtake.config.schema import DataConfig
from longtake.data.buckets import stage_frames
from longtake.doctor.clips import Examination, Finding
from longtake.doctor.warnings import same_caption, same_content

_NUMBER = re.compile(r"(?<![\w-])\d+(\.\d+)?(x\d+)?")
_IN_BRACKETS = re.compile(r" \([^()]*\)")
_LONGEST_REASON = 80


@dataclass(frozen=True)
class BucketTotal:
    """The clips that a stage of the curriculum (`stage` frames) trains on in one bucket, and the held-out ones."""

    stage: int
    frames: int
    height: int
    width: int
    tokens: int
    clips: int
    held_out: int
    repeats: bool
    """Whether a step has more clips than the bucket, so that some are in it twice."""


@dataclass(frozen=True)
class Totals:
    """Counts of rows, unless the name has a unit; `reasons` are the most frequent first.

    `seconds` are those of the videos that are used, `uncounted` the rows left out that `prepare` does not count toward
    its limit. `same_content` and `same_caption` have the places of clips that are alike.
    """

    clips: int
    train: int
    validation: int
    stills: int
    seconds: float
    left_out: int
    uncounted: int
    reasons: tuple[tuple[str, int], ...]
    buckets: tuple[BucketTotal, ...]
    same_content: tuple[tuple[str, ...], ...]
    same_caption: tuple[tuple[str, tuple[str, ...]], ...]


def totals_of(examination: Examination, data: DataConfig, global_batch_size: int) -> Totals:
    """The numbers of `examination`."""
    used = examination.used
    left_out = [finding for finding in examination.findings if not finding.used]
    reasons = Counter(reason for finding in left_out for reason in _reasons(finding))
    return Totals(
        clips=len(used),
        train=sum(finding.split == "train" for finding in used),
        validation=sum(finding.split == "validation" for finding in used),
        stills=sum(finding.info is not None and finding.info.is_image for finding in used),
        seconds=sum(finding.info.duration for finding in used if finding.info is not None),
        left_out=len(left_out),
        uncounted=len(left_out) - sum(check.bad for check in examination.checks),
        reasons=tuple(reasons.most_common()),
        buckets=tuple(_buckets(used, data, global_batch_size)),
        same_content=tuple(_places(group) for group in same_content(used).values()),
        same_caption=tuple((caption, _places(group)) for caption, group in same_caption(used).items()),
    )


def _reasons(finding: Finding) -> set[str]:
    """Why the row is left out, without its file's name and numbers, so that rows of one kind are counted together."""
    name = finding.record.path.name if finding.record is not None else ""
    kinds = set()
    for problem in finding.left_out:
        what = problem.what.replace(name, "") if name else problem.what
        kinds.add(" ".join(_NUMBER.sub("…", _IN_BRACKETS.sub("", what)).split())[:_LONGEST_REASON])
    return kinds


def _buckets(used: Sequence[Finding], data: DataConfig, global_batch_size: int) -> list[BucketTotal]:
    """By stage, then by size."""
    found = []
    for stage in dict.fromkeys(frames for _, frames in stage_frames(data.num_frames, data.frames_schedule)):
        shapes: dict[tuple[int, int, int, int], Counter[str]] = {}
        for finding in used:
            for fit in (each for each in finding.fits if stage in each.placed.stages):
                bucket = fit.placed.clip.bucket
                shape = (bucket.frames, bucket.height, bucket.width, fit.tokens)
                shapes.setdefault(shape, Counter())[finding.split] += 1
        for shape, counts in sorted(shapes.items()):
            clips = counts["train"]
            found.append(BucketTotal(stage, *shape, clips, counts["validation"], 0 < clips < global_batch_size))
    return found


def _places(group: Sequence[Finding]) -> tuple[str, ...]:
    return tuple(finding.where for finding in group)
