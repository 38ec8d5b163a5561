"""The items of one rank's step, as they are written, and what collectives send. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from longtake.planner.events import KINDS, NO_WORK, Compute, Copy, Item, Queue, Reached, Wait, Where, Work

if TYPE_CHECKING:
    from longtake.planner.composition import Composed

GRANULE = 512
"""Bytes that CUDA's caching allocator rounds an allocation up to."""
FIRST_EVENT = 2_000_000
"""Those of a step on one GPU have lower numbers."""
WEIGHTS, ADAPTERS, GRADIENTS, OPTIMIZER, BLOCK, BUFFERS = (
    KINDS.index(kind) for kind in ("weights", "adapters", "gradients", "optimizer", "block", "buffers")
)


class Rank:
    """Writes the items of one rank in order; its events are numbers of their own."""

    def __init__(self, first_event: int = FIRST_EVENT) -> None:
        self.items: list[Item] = []
        self.events = first_event

    def taken(self) -> tuple[Item, ...]:
        """What has been written; what is written from now on is another list."""
        items, self.items = tuple(self.items), []
        return items

    def compute(self, work: Work, label: str, held: Sequence[int]) -> None:
        """Operators."""
        self.items.append(Compute(work, label, tuple(held)))

    def reached(self) -> int:
        """The event that all computed so far has ended."""
        self.events += 1
        self.items.append(Reached(self.events))
        return self.events

    def copy(self, queue: Queue, nbytes: int, after: tuple[int, ...], label: str) -> int:
        """The event that a copy has ended, over the network or between the device and the host."""
        self.events += 1
        where: Where = "network" if queue == "network" else "host"
        self.items.append(Copy(queue, nbytes, where, after, self.events, label))
        return self.events

    def wait(self, *events: int) -> None:
        """What is computed from now on begins after `events`."""
        self.items.extend(map(Wait, events))

    def write(self, update: Iterable[Item], held: Callable[[Compute], Sequence[int]], divided_by: int = 1) -> None:
        """The update's items, its work shared out among so many ranks; among none it is not the device's."""
        for item in update:
            if isinstance(item, Compute):
                self.compute(_part(item.work, divided_by), item.label, held(item))
            else:
                self.items.append(item)

    def before_update(self, update: Iterable[Item], held: Callable[[Compute], Sequence[int]], gradients: int) -> None:
        """The norm of the gradients, a number from each rank: of the gradients there are `gradients` bytes still."""
        first = next(item for item in update if isinstance(item, Compute))
        own = [*held(first)]
        own[GRADIENTS] = gradients
        self.compute(NO_WORK, first.label, own)

    def update_in_host(self, part: int, returned: int) -> None:
        """An update of `part` bytes of fp32 weights by AdamW in host memory, after which `returned` of them come back.

        It reads weight, gradient and two states and writes all but the gradient, which is taken for a copy of so many
        bytes: of the host's memory a rank among eight gets about a bus's rate.
        """
        updated = self.copy("inward", 7 * part, (self.reached(),), "update in host memory")
        self.wait(self.copy("inward", returned, (updated,), "updated weights") if returned else updated)


def ceil(value: int, parts: int) -> int:
    """A part of `value`, rounded up."""
    return -(-value // parts)


def rounded(nbytes: int) -> int:
    """As the allocator does it."""
    return -(-nbytes // GRANULE) * GRANULE


def sent(nbytes: int, ranks: int) -> int:
    """What a rank sends when `ranks` gather, scatter a sum of, or exchange `nbytes`, which are on each before or after.

    (ranks - 1) / ranks of them: all but its own part, which a ring passes on piece by piece
    (https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md).
    """
    return ceil(nbytes * (ranks - 1), ranks)


def summed(nbytes: int, ranks: int) -> int:
    """What a rank sends when `ranks` sum `nbytes` up: a reduce-scatter and an all-gather."""
    return ceil(2 * nbytes * (ranks - 1), ranks)


def part_of(label: str) -> str:
    """Of the step: prologue, forward, turn, backward or update."""
    return label.partition(" ")[0]


def planned(composed: Composed, micro_batch: tuple[Item, ...], update: tuple[Item, ...], host_bytes: int) -> Composed:
    """The step of a rank, with so many more bytes in host memory."""
    peak = max((item.held for item in (*micro_batch, *update) if isinstance(item, Compute)), key=sum)
    return replace(
        composed, micro_batch=micro_batch, update=update, peak=peak, host_bytes=composed.host_bytes + host_bytes
    )


def _part(work: Work, ranks: int) -> Work:
    if not ranks:
        return NO_WORK
    return Work(*(ceil(value, ranks) for value in work))._replace(calls=work.calls)
