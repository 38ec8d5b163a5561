"""Transformers that are used in turns: the blocks' frozen weights of only one of them are on the device at a time.

They are never copied back: those of the others wait where the weights of swapped blocks do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from longtake.memory.block_weights import Home, Slot, Waiting, slots_for
from longtake.memory.copies import Copies
from longtake.memory.host_buffers import DiskTier, HostTier, copy, done, settle, use


class Turns:
    """Buffers on the device that the blocks of several transformers of one shape share.

    A transformer has them from its call on until another is called.
    """

    def __init__(self, copies: Copies) -> None:
        self.copies = copies
        self.streaming: list[Slot] = []
        """Those of the transformers' rings."""
        self.staying: list[Slot] = []
        self.kept: HostTier | DiskTier | None = None
        """Where activations wait that are moved away."""
        self.in_use: _Turn | None = None

    def give(self, turn: _Turn | None) -> None:
        """What is computed from now on finds the weights of `turn` on the device, or nobody's."""
        if turn is self.in_use:
            return
        if self.in_use is not None:
            for slot, home in zip(self.staying, self.in_use.homes.values(), strict=True):
                done(self.copies, slot.buffer)
                home.put()
        self.in_use = turn
        if turn is None:
            return
        for slot, home in zip(self.staying, turn.homes.values(), strict=True):
            copy(self.copies, "inward", slot.buffer, home.buffer)
        for slot, home in zip(self.staying, turn.homes.values(), strict=True):
            use(self.copies, slot.buffer)
            home.put(slot.parameters)

    def close(self) -> None:
        """Waits for what is on its way, and ends the copies."""
        assert self.in_use is None, "a transformer still has the buffers"
        for slot in self.staying:
            settle(self.copies, slot.buffer)
        self.copies.close()


class _Turn:
    """The weights of one transformer."""

    def __init__(self, homes: Mapping[int, Home]) -> None:
        self.homes = homes


@contextmanager
def in_turns(
    turns: Turns, transformer: Any, blocks: nn.ModuleList, staying: Sequence[int], waiting: Waiting
) -> Iterator[None]:
    """Inside the context the frozen weights of the blocks `staying` are on the device from a call of `transformer` on.

    They leave it when another of those that share `turns` is called. `waiting` says where they are meanwhile, and
    afterwards. Raises RunError where the host or the disk refuse.
    """
    with waiting.homes(blocks, staying) as homes:
        missing = len(staying) - len(turns.staying)
        turns.staying += slots_for(blocks, missing, turns.copies)
        assert len(turns.staying) == len(staying), "transformers of one shape, under one strategy"
        turn = _Turn(homes)
        hook = transformer.register_forward_pre_hook(lambda *_: turns.give(turn))
        try:
            yield
        finally:
            hook.remove()
            if turns.in_use is turn:
                turns.give(None)
