"""What a rank computes at a time."""

from __future__ import annotations

from dataclasses import dataclass

from longtake.planner.plans import Bucket


@dataclass(frozen=True)
class Load:
    """A micro-batch of `clips` clips, one of several of a step if `accumulating`, its tokens over `sp` ranks.

    `keep_casts` says that autocast keeps what it has cast of trained weights (`training.precision.compute_in`).
    """

    bucket: Bucket
    clips: int
    accumulating: bool
    sp: int = 1
    keep_casts: bool = True
