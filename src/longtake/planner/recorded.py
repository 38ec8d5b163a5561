"""What a recording holds, of whatever model: the passes of a few blocks, and the update."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from longtake.config.schema import MemoryStrategy
from longtake.memory.block_weights import Layout
from longtake.planner.events import Counts
from longtake.planner.log import Entry

Part: TypeAlias = Literal["prologue", "forward", "turn", "backward", "update"]


@dataclass(frozen=True)
class Segment:
    """The entries of one block's forward or backward, or of what is before the first and after the last block."""

    part: Part
    block: int
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Recording:
    """A pass of a model of `blocks` blocks: its `segments` in order, and the frozen weights and batch held before it.

    `block_weights` are the bytes of the frozen weights of one block, all alike, and `layout` how they lie in a buffer.
    `block_sizes` are the bytes of each of them, `outside_sizes` those of what else is held; not rounded.
    """

    blocks: int
    segments: tuple[Segment, ...]
    held: Counts
    block_weights: int
    layout: Layout
    block_sizes: tuple[int, ...]
    outside_sizes: tuple[int, ...]


@dataclass(frozen=True)
class Update:
    """The entries of the update; `held` are the trained parameters, their gradients and the states at its start.

    `gradient_sizes` are the bytes of each gradient, `sizes` those of all else that is held, not rounded.
    """

    entries: tuple[Entry, ...]
    held: Counts
    host_bytes: int
    sizes: tuple[int, ...]
    gradient_sizes: tuple[int, ...]


def structure_of(strategy: MemoryStrategy) -> MemoryStrategy:
    """The fields that decide which operators run: strategies that share them differ only in where bytes wait."""
    kept = ("gradient_checkpointing", "checkpoint_every", "slices", "attention_head_groups", "quantization")
    return MemoryStrategy(**{name: getattr(strategy, name) for name in kept})
