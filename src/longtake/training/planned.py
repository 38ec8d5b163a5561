"""What was planned for a run, beside what is measured: the peak, the seconds of a step, the time that is left."""

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple

from longtake.config.schema import MemoryStrategy
from longtake.data.loader import BucketSampler
from longtake.training.fallback import settings
from longtake.units import format_bytes

FILE = "plan.json"
CALIBRATED_AFTER = 2
"""Measured steps from which on the time that is left follows them and not the plan."""
REMEMBERED = 64
"""Measured steps that count, the last ones."""

Bucket = tuple[int, int, int]
"""(frames, height, width) in pixels."""


@dataclass(frozen=True)
class PlannedStrategy:
    """What a plan says that a run needs under `memory`, whose `fallbacks` do not count.

    `device_peak_bytes` is what the driver would show: on CUDA reserved by the allocator and the context, on a CPU the
    process's peak less its size before the model was built. `step_seconds` are those of an optimiser step of the
    largest bucket, `bucket_seconds` those of each bucket that the plan knows.
    """

    memory: MemoryStrategy
    device_peak_bytes: int
    host_peak_bytes: int
    step_seconds: float
    bucket_seconds: Mapping[Bucket, float] = field(default_factory=dict)

    def seconds(self, bucket: Bucket) -> float:
        """Of a step of `bucket`; of the largest where the plan does not know it."""
        return self.bucket_seconds.get(bucket, self.step_seconds)


@dataclass(frozen=True)
class Planned:
    """The strategies of a run, fastest first: that of the config and its fallbacks. `report` is for `plan.json`."""

    strategies: tuple[PlannedStrategy, ...]
    report: Mapping[str, Any]

    def under(self, memory: MemoryStrategy) -> PlannedStrategy | None:
        """What is planned where `memory` is in force, None where nothing is."""
        found = (strategy for strategy in self.strategies if settings(strategy.memory) == settings(memory))
        return next(found, None)

    def described(self) -> str:
        """`18.3 GiB on the device, 41 s a step`, of the first strategy."""
        first = self.strategies[0]
        return f"{format_bytes(first.device_peak_bytes)} on the device, {_shown(first.step_seconds)} a step"


class Measured(NamedTuple):
    """An optimiser step that was made."""

    bucket: Bucket
    seconds: float


class Forecast:
    """What is to come of a run of `steps` steps, by its plan, if it has one, and by the steps that were measured.

    `clock` gives seconds from any moment on.
    """

    def __init__(
        self,
        planned: Planned | None,
        sampler: BucketSampler,
        steps: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.planned = planned
        self.sampler = sampler
        self.steps = steps
        self.clock = clock
        self.begun = clock()
        self.seconds_in_steps = 0.0
        self.memory: MemoryStrategy | None = None
        self.strategy: PlannedStrategy | None = None
        self.measured: deque[Measured] = deque(maxlen=REMEMBERED)
        self.compared = False

    def begin(self, memory: MemoryStrategy) -> None:
        """The steps begin now, and `memory` is in force."""
        self.begun = self.clock()
        self._follow(memory)

    def add(self, bucket: Bucket, seconds: float, memory: MemoryStrategy, whole: bool) -> None:
        """A step has been made and `memory` is in force; a step is not `whole` in which memory ran out."""
        self.seconds_in_steps += seconds
        self._follow(memory)
        if whole:
            self.measured.append(Measured(bucket, seconds))

    def fields(self, done: int, bucket: Bucket) -> dict[str, int | float | None]:
        """What a line of metrics says after `done` steps, the last of `bucket`."""
        planned = self.strategy
        return {
            "planned_peak_bytes": planned.device_peak_bytes if planned else None,
            "planned_step_seconds": planned.seconds(bucket) if planned else None,
            "eta_seconds": self.left(done),
        }

    def left(self, done: int) -> float | None:
        """Seconds until the last step after `done` steps; None without a plan before two steps have been measured.

        What was spent between steps, in loading, validation and saving, is expected to come again in proportion.
        """
        buckets = upcoming(self.sampler, done, self.steps)
        if len(self.measured) >= CALIBRATED_AFTER:
            between = max(1.0, (self.clock() - self.begun) / self.seconds_in_steps)
            return between * sum((count * self._expected(bucket) for bucket, count in buckets.items()), 0.0)
        if self.strategy is not None:
            return sum((count * self.strategy.seconds(bucket) for bucket, count in buckets.items()), 0.0)
        return None

    def comparison(self, device_peak_bytes: int) -> str | None:
        """Planned beside measured, once: when enough steps have been measured under the first strategy.

        Not under a fallback: the run's peak is then that of the strategy that failed.
        """
        if self.planned is None or self.compared or len(self.measured) < CALIBRATED_AFTER:
            return None
        planned = self.planned.strategies[0]
        if self.strategy is not planned:
            return None
        self.compared = True
        seconds = median(step.seconds for step in self.measured)
        expected = median(planned.seconds(step.bucket) for step in self.measured)
        return (
            f"device peak {format_bytes(device_peak_bytes)} (planned {format_bytes(planned.device_peak_bytes)}),"
            f" {_shown(seconds)} a step (planned {_shown(expected)})"
        )

    def _follow(self, memory: MemoryStrategy) -> None:
        """Under another strategy the steps take another time."""
        if self.memory is not None and settings(memory) == settings(self.memory):
            return
        self.memory = memory
        self.strategy = self.planned.under(memory) if self.planned else None
        self.measured.clear()

    def _expected(self, bucket: Bucket) -> float:
        """As measured, of a bucket that was; of another as planned, times the ratio of measured to planned."""
        own = [step.seconds for step in self.measured if step.bucket == bucket]
        if len(own) >= CALIBRATED_AFTER:
            return median(own)
        return self._weight(bucket) * median(step.seconds / self._weight(step.bucket) for step in self.measured)

    def _weight(self, bucket: Bucket) -> float:
        """Without a plan every bucket is taken for the same."""
        return self.strategy.seconds(bucket) if self.strategy else 1.0


def upcoming(sampler: BucketSampler, done: int, steps: int) -> dict[Bucket, float]:
    """How many of the steps from `done` to before `steps` are of each bucket, by its share of the clips.

    The order of the single steps is not asked for: it costs a shuffle a clip, and shares are exact over a lap.
    """
    found: dict[Bucket, float] = {}
    ends = [first for first, _ in sampler.stages[1:]] + [steps]
    for (first, _), end, buckets in zip(sampler.stages, ends, sampler.buckets, strict=True):
        there = max(0, min(end, steps) - max(first, done))
        clips = sum(len(entries) for entries in buckets)
        for entries in buckets if there else ():
            bucket = entries[0].bucket
            found[bucket] = found.get(bucket, 0.0) + there * len(entries) / clips
    return found


def _shown(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"
