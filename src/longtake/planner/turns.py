"""A step of one of two transformers that a run trains: what the other one needs meanwhile. Needs no torch.

Bytes are held to those of a run by `tests/planner/test_turns.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from longtake.planner.events import Compute, Item
from longtake.planner.rank_items import ADAPTERS, GRADIENTS, OPTIMIZER, WEIGHTS, Rank

if TYPE_CHECKING:
    from longtake.planner.composition import Composed

_TURN_EVENTS = 4_000_000
"""The events of engines have lower numbers."""


@dataclass(frozen=True)
class Idle:
    """What a transformer is while the other is trained.

    Of its blocks `resident_bytes` leave the device with its turn, 0 where it keeps them; those of the one that is used
    lie there in `shared_bytes` of buffers, one for each block. In host memory its blocks take
    `host_bytes`, on disk `disk_bytes`, and those of the other as much, of which `swapped_host_bytes` and
    `swapped_disk_bytes` are counted in its step already; `states_host_bytes` are those of its optimiser. Its gradients
    stay if `keeps_gradients`. A step changes transformers with probability `changes`.
    """

    resident_bytes: int
    shared_bytes: int
    host_bytes: int
    disk_bytes: int
    swapped_host_bytes: int
    swapped_disk_bytes: int
    states_host_bytes: int
    keeps_gradients: bool
    changes: float


def with_idle(composed: Composed, idle: Idle) -> Composed:
    """The step of a transformer beside another of its shape; a change of turns is spread over all steps."""
    first = next(item for item in composed.micro_batch if isinstance(item, Compute)).held
    added = [0] * len(first)
    added[WEIGHTS] = first[WEIGHTS] - 2 * idle.resident_bytes + idle.shared_bytes
    added[ADAPTERS], added[OPTIMIZER] = first[ADAPTERS], first[OPTIMIZER]
    added[GRADIENTS] = first[GRADIENTS] if idle.keeps_gradients else 0

    def beside(item: Item) -> Item:
        if not isinstance(item, Compute):
            return item
        return replace(item, held=tuple(own + more for own, more in zip(item.held, added, strict=True)))

    rank = Rank(_TURN_EVENTS)
    rank.items = [beside(item) for item in composed.update]
    if moved := round(idle.changes * idle.shared_bytes):
        rank.wait(rank.copy("inward", moved, (rank.reached(),), "weights of the other transformer"))
    return replace(
        composed,
        micro_batch=tuple(beside(item) for item in composed.micro_batch),
        update=rank.taken(),
        peak=tuple(own + more for own, more in zip(composed.peak, added, strict=True)),
        host_bytes=composed.host_bytes + 2 * idle.host_bytes - idle.swapped_host_bytes + idle.states_host_bytes,
        disk_bytes=composed.disk_bytes + 2 * idle.disk_bytes - idle.swapped_disk_bytes,
    )
