"""What the planner answers: plans, what they need, and what would have to change where none fits. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from longtake.config.schema import MemoryStrategy, ParallelConfig
from longtake.planner.events import Timeline

Stage: TypeAlias = Literal["prepare", "train", "validation", "sampling", "save"]
Bucket: TypeAlias = tuple[int, int, int]
"""(frames, height, width) in pixels."""
Tier: TypeAlias = Literal["device", "host", "disk"]


@dataclass(frozen=True)
class StagePeak:
    """What one stage of a run needs at its peak; `what` says which encoder, bucket or file."""

    stage: Stage
    what: str
    device_bytes: int
    host_bytes: int = 0


@dataclass(frozen=True)
class Plan:
    """A strategy, and what it needs of each GPU.

    `stage` and `bucket` are where the device's peak is. `peak_bytes["device"]` is what the driver would show: reserved
    by the allocator, CUDA's context and NCCL. `allocated_bytes` is what tensors hold. `breakdown_bytes` adds up to the
    device's peak: KINDS, `allocator_slack` and `context` (with NCCL's). `step_seconds` are those of an optimiser step
    of the largest bucket with all its micro-batches. `name` is the strategy in words. `stages` has the other stages,
    `buckets` each bucket's peak and seconds.
    """

    name: str
    strategy: MemoryStrategy
    parallel: ParallelConfig
    micro_batch_size: int
    fits: bool
    stage: Stage
    bucket: Bucket
    peak_bytes: Mapping[Tier, int]
    allocated_bytes: int
    step_seconds: float
    stalled_seconds: float
    bound_by: str
    breakdown_bytes: Mapping[str, int]
    stages: tuple[StagePeak, ...] = ()
    buckets: tuple[BucketNeeds, ...] = ()
    timeline: Timeline | None = None
    why_not: str = ""


@dataclass(frozen=True)
class BucketNeeds:
    """A bucket of the dataset under a plan."""

    bucket: Bucket
    device_bytes: int
    step_seconds: float


@dataclass(frozen=True)
class Advice:
    """One change that would make a plan fit where none does: `num_frames = 97`, `gpus = 2`, with what it then needs."""

    change: str
    device_bytes: int
    step_seconds: float


@dataclass(frozen=True)
class Report:
    """The planner's answer.

    `plans` are sorted fastest first among those that fit, then those that do not, the nearest to fitting first;
    `chosen` is an index into them, or None. `references` are strategies for comparison that nobody has to choose from,
    such as plain checkpointing with the encoders resident. `command` trains the chosen plan. `seconds` is how long
    planning took.
    """

    model: str
    task: str
    method: Literal["lora", "full"]
    tokens: int
    bucket: Bucket
    budget_bytes: int
    host_budget_bytes: int
    disk_budget_bytes: int
    gpu: str
    gpus: int
    chosen: int | None
    plans: tuple[Plan, ...]
    references: tuple[Plan, ...] = ()
    advice: tuple[Advice, ...] = ()
    notes: tuple[str, ...] = ()
    command: str = ""
    seconds: float = 0.0
