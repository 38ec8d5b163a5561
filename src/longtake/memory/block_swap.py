"""Block swap: frozen weights wait in host memory or in files and stream through a ring of device buffers.

They are never copied back. While one block is computed the next one, in the order of use, is fetched.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from longtake.memory.block_weights import Slot, Waiting, bring, finder, slots_for
from longtake.memory.copies import Copies
from longtake.memory.host_buffers import Buffer, copy, done, settle, use
from longtake.models.weight_files import WeightFile


def swapped_blocks(count: int, number: int) -> tuple[int, ...]:
    """The `number` of `count` blocks that are not resident: spread evenly, so that each copy has equal time."""
    return tuple(index * count // number for index in range(number))


def resident_blocks(count: int, number: int) -> tuple[int, ...]:
    """The others."""
    return tuple(sorted(set(range(count)) - set(swapped_blocks(count, number))))


@contextmanager
def block_swap(
    blocks: nn.ModuleList, number: int, every: int, waiting: Waiting, slots: list[Slot] | None = None
) -> Iterator["Ring"]:
    """Inside the context the frozen weights of `number` of the `blocks` are on the device only while they are used.

    Yields the ring; whoever calls the blocks calls `Ring.begin` first, at each pass. Backward recomputes segments of
    `every` blocks, and the ring has one buffer more: `slots`, which may be shared with rings that are used in turns.
    `waiting` says where the weights are meanwhile. Raises RunError where the host or the disk refuse.
    """
    chosen, copies = swapped_blocks(len(blocks), number), waiting.copies
    with waiting.homes(blocks, chosen) as homes:
        ring = Ring(copies, homes, slots or slots_for(blocks, every + 1, copies), every)
        hooks = [hook for index in chosen for hook in hooked(ring, index, blocks[index])]
        try:
            yield ring
        finally:
            for hook in hooks:
                hook.remove()
            ring.close()


def make_resident(
    blocks: nn.ModuleList, number: int, device: torch.device, files: tuple[str, Mapping[str, WeightFile]]
) -> None:
    """Puts the frozen weights of all blocks but the `number` that are swapped on `device`, from wherever they are.

    An earlier strategy may have left them in host memory or in their file.
    """
    prefix, places = files
    with finder(places) as find:
        for index in resident_blocks(len(blocks), number):
            bring(blocks[index], find(f"{prefix}{index}."), device)


@runtime_checkable
class Uses(Protocol):
    """What is told when a block's weights are needed: the ring, or who only wants to know."""

    backward: bool

    def acquire(self, index: int) -> None:
        """The block is computed from now on."""

    def acquire_for_backward(self, index: int) -> None:
        """The gradient of the block's output is there."""

    def release(self, index: int) -> None:
        """What was computed last used the block's weights."""


def hooked(ring: Uses, index: int, block: nn.Module) -> list[Any]:
    """Hooks of a block, whose weights are used by its forward, and from its output's gradient to its input's."""

    def before(_block: nn.Module, arguments: tuple[Any, ...]) -> None:
        ring.acquire(index)
        if not ring.backward and torch.is_grad_enabled() and arguments[0].requires_grad:
            arguments[0].register_hook(lambda _gradient: ring.release(index))

    def after(_block: nn.Module, _arguments: tuple[Any, ...], output: Tensor) -> None:
        if ring.backward:
            return
        ring.release(index)
        if output.requires_grad:
            output.register_hook(lambda _gradient: ring.acquire_for_backward(index))

    return [block.register_forward_pre_hook(before), block.register_forward_hook(after)]


@runtime_checkable
class Away(Protocol):
    """The weights of a block that are not on the device: where they wait, and what puts them into the block."""

    @property
    def buffer(self) -> Buffer:
        """Their bytes."""

    def put(self, parameters: list[nn.Parameter] | None = None) -> None:
        """The block computes with `parameters`, or, without, is away."""


class Ring:
    """Gives blocks their weights in time; the order in which they will be needed is known for a whole step."""

    def __init__(self, copies: Copies, homes: Mapping[int, "Away"], slots: list[Slot], every: int) -> None:
        self.copies, self.homes, self.slots, self.every = copies, homes, slots, every
        self.order: list[int] = []
        self.position = -1
        self.backward = False

    def begin(self) -> None:
        """A forward pass begins; with gradients a backward pass follows, then the next forward pass."""
        self.backward = False
        for slot in self.slots:
            if isinstance(slot.owner, Ring) and slot.owner is not self:
                slot.owner.rest()
            slot.owner = self
            if slot.busy and slot.holds is not None:
                self.release(slot.holds)  # the first block's input has no gradient that would say that it is done
        forward = sorted(self.homes)
        self.order = [*forward, *(self._backward_order() if torch.is_grad_enabled() else ()), *forward]
        self.position = -1
        self._fetch_ahead()

    def acquire(self, index: int) -> None:
        """The block's weights are on the device for what is computed from now on; the next ones are on their way."""
        slot = self._holding(index)
        if slot is not None and slot.busy:
            return
        if slot is None:
            slot = self._least_needed()
            assert slot is not None, "more blocks are in use than a segment has"
            self._fetch(index, slot)
        slot.busy = True
        use(self.copies, slot.buffer)
        self.homes[index].put(slot.parameters)
        self.position = min(self._next_use(index), len(self.order) - 1)
        self._fetch_ahead()

    def acquire_for_backward(self, index: int) -> None:
        """The gradient of the block's output is there."""
        self.backward = True
        self.acquire(index)

    def release(self, index: int) -> None:
        """What has been computed was the last that uses the block's weights in this pass."""
        slot = self._holding(index)
        if slot is None or not slot.busy:
            return
        slot.busy = False
        done(self.copies, slot.buffer)
        self.homes[index].put()
        self._fetch_ahead()

    def rest(self) -> None:
        """Its blocks are away, and another ring may have the buffers."""
        for slot in self.slots:
            if slot.owner is not self:
                continue
            if slot.busy and slot.holds is not None:
                done(self.copies, slot.buffer)
                self.homes[slot.holds].put()
            slot.holds, slot.busy, slot.owner = None, False, None

    def close(self) -> None:
        """Waits for what is on its way."""
        self.rest()
        for slot in self.slots:
            settle(self.copies, slot.buffer)

    def _backward_order(self) -> Iterator[int]:
        """Segments from the last to the first; of each, the block whose gradient comes first, then all in order."""
        segments: dict[int, list[int]] = {}
        for index in sorted(self.homes):
            segments.setdefault(index // self.every, []).append(index)
        for segment in reversed(segments.values()):
            yield from (segment[-1], *segment[:-1])

    def _fetch_ahead(self) -> None:
        """Fills free buffers with what is needed next, but for those whose content is needed sooner."""
        for position in range(self.position + 1, len(self.order)):
            index = self.order[position]
            if self._holding(index) is not None:
                continue
            slot = self._least_needed()
            if slot is None or (slot.holds is not None and self._next_use(slot.holds) <= position):
                return
            self._fetch(index, slot)

    def _fetch(self, index: int, slot: Slot) -> None:
        copy(self.copies, "inward", slot.buffer, self.homes[index].buffer)
        slot.holds = index

    def _holding(self, index: int) -> Slot | None:
        return next((slot for slot in self.slots if slot.holds == index), None)

    def _least_needed(self) -> Slot | None:
        free = [slot for slot in self.slots if not slot.busy]
        never = len(self.order) + 1
        return max(free, key=lambda slot: never if slot.holds is None else self._next_use(slot.holds), default=None)

    def _next_use(self, index: int) -> int:
        """Position of the next use, or behind the last one."""
        later = range(self.position + 1, len(self.order))
        return next((position for position in later if self.order[position] == index), len(self.order))
