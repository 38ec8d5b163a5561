"""A training step as a list of what happens in it: work, copies, waits; and the same with times. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

KINDS = ("weights", "adapters", "gradients", "optimizer", "checkpoints", "block", "buffers", "workspace")
"""What bytes on the device are.

`checkpoints` are what blocks keep for the backward pass, `block` is all else that is computed: a block's activations
and their gradients, the batch. `buffers` are what copies fill: the ring of streamed weights, what was offloaded and
comes back. `workspace` is inside kernels.
"""
Counts: TypeAlias = tuple[int, ...]
"""Bytes of each of KINDS."""
Queue: TypeAlias = Literal["inward", "outward", "network"]
Where: TypeAlias = Literal["host", "disk", "network"]


class Work(NamedTuple):
    """What operators cost, added up.

    `matmul_flops` are those of linear layers and convolutions in the compute type, `fp32_matmul_flops` in fp32,
    `attention_flops` and `attention_backward_flops` those of the fused attention kernels (a multiplication and an
    addition are two). `moved_bytes` are read or written by all other operators, `calls` counts kernels.
    """

    matmul_flops: int = 0
    fp32_matmul_flops: int = 0
    attention_flops: int = 0
    attention_backward_flops: int = 0
    moved_bytes: int = 0
    calls: int = 0

    def plus(self, other: Work) -> Work:
        """The sum."""
        return Work(*(mine + its for mine, its in zip(self, other, strict=True)))

    def times(self, factor: int) -> Work:
        """The same work `factor` times."""
        return Work(*(value * factor for value in self))

    @property
    def flops(self) -> int:
        """Of all kinds."""
        return sum(self[:4])


NO_WORK = Work()


@dataclass(frozen=True, slots=True)
class Compute:
    """Operators on the stream of the computation. `held` are the bytes on the device at the highest moment in it."""

    work: Work
    label: str
    held: Counts


@dataclass(frozen=True, slots=True)
class Copy:
    """A copy on the queue's own stream: begins when those of its queue before it and all of `after` have ended.

    `where` is the far end; its end is `event`.
    """

    queue: Queue
    nbytes: int
    where: Where
    after: tuple[int, ...]
    event: int
    label: str = ""


@dataclass(frozen=True, slots=True)
class Reached:
    """The end of the computation listed before it is `event`."""

    event: int


@dataclass(frozen=True, slots=True)
class Wait:
    """What is computed after it begins after `event`."""

    event: int


Item: TypeAlias = Compute | Copy | Reached | Wait
"""In the order of the program, which runs ahead of the device: a copy is queued as soon as it is listed."""


@dataclass(frozen=True, slots=True)
class Span:
    """Something on a stream from `start` to `end`, in seconds from the step's start; a `stall` is a wait for a copy."""

    stream: Literal["compute", "inward", "outward", "network", "stall"]
    start: float
    end: float
    label: str


@dataclass(frozen=True)
class Timeline:
    """A simulated step.

    `bound_by` is what would have to be faster for the step to be: `compute` (matrix products, attention), `memory`
    (the device's bandwidth), `launches`, `bus` (host memory to device), `disk` or `network`. `memory` has, in the order
    of time, when a stretch of computation began and the bytes held at its highest moment.
    """

    seconds: float
    stalled_seconds: float
    bound_by: str
    spans: tuple[Span, ...]
    memory: tuple[tuple[float, Counts], ...]
