"""A whole step under a strategy, put together from a recording of a few blocks and from the memory features themselves.

The recorded operators are replayed for every block; at the seams between them the engine's own offload and ring of
weights are called, on `meta` tensors, as in a run. So what moves when, and what waits for what, is decided by the code
that decides it in training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from longtake.config.schema import MemoryStrategy
from longtake.memory.block_swap import Ring, swapped_blocks
from longtake.memory.block_weights import Layout, Slot
from longtake.memory.host_buffers import Buffer, HostTier, Keep, Kept, keep_on_device, use
from longtake.memory.strategy import keeping, kept_in
from longtake.planner.events import Compute, Counts, Item
from longtake.planner.kernels import GRANULE, rounded
from longtake.planner.ledger import Ledger
from longtake.planner.log import INDEX, NOTHING, Entry, Seam, Span
from longtake.planner.planned_copies import PlannedCopies
from longtake.planner.recorded import Part, Recording, Segment, Update
from longtake.planner.storages import Storages

META = torch.device("meta")
_NOWHERE = Path("/nonexistent")
"""Nothing is written on `meta`."""


@dataclass(frozen=True)
class Composed:
    """A step. `peak` are the bytes at its highest moment, `host_bytes` and `disk_bytes` what waits elsewhere.

    `micro_batch` and `update` are the items of a micro-batch's passes and of the update; a step has as many
    micro-batches as it accumulates.
    """

    micro_batch: tuple[Item, ...]
    update: tuple[Item, ...]
    peak: Counts
    host_bytes: int
    disk_bytes: int

    @property
    def peak_bytes(self) -> int:
        """On the device, as tensors hold them."""
        return sum(self.peak)


def compose(
    recording: Recording,
    update: Update,
    strategy: MemoryStrategy,
    blocks: int,
    accumulating: bool,
    storages: Storages | None = None,
) -> Composed:
    """The step of the model of `blocks` blocks under `strategy`, whose operators are those of the recording.

    When `accumulating`, gradients are there from the start. `storages` is told of every allocation.
    """
    log: list[Any] = []
    ledger = Ledger(workspaces=False, log=storages)
    copies = PlannedCopies(ledger, log)
    with ExitStack() as stack:
        tier = kept_in(strategy, copies, _NOWHERE, stack)
        keep_for = stack.enter_context(keeping(strategy, blocks, copies, tier))
        stack.enter_context(ledger)
        player = _Player(log, ledger, _held(recording, update, blocks, accumulating), keep_for, storages)
        swapped = swapped_blocks(blocks, strategy.block_swap) if strategy.block_swap else ()
        if storages is not None:
            storages.hold(_sizes(recording, update, blocks - len(swapped), accumulating))
        if swapped:
            player.ring = _ring(copies, ledger, recording.layout, strategy, swapped)
            player.add("weights", -len(swapped) * recording.block_weights)
        player.alike = 1 if recording.blocks == blocks else blocks - 2
        for segment, block in _order(recording, blocks):
            player.play(segment, block)
        micro_batch = len(log)
        player.enter("update", 0, 0)
        player.entries(update.entries, "update", 0, 0)
    host = copies.host_bytes + update.host_bytes
    return Composed(tuple(log[:micro_batch]), tuple(log[micro_batch:]), player.peak, host, copies.disk_bytes)


def _held(recording: Recording, update: Update, blocks: int, accumulating: bool) -> list[int]:
    """Bytes of each kind that are on the device when a micro-batch begins, all blocks resident."""
    held = [own + its for own, its in zip(recording.held, update.held, strict=True)]
    held[INDEX["weights"]] += (blocks - recording.blocks) * recording.block_weights
    if not accumulating:
        held[INDEX["gradients"]] = 0
    return held


def _sizes(recording: Recording, update: Update, resident: int, accumulating: bool) -> Iterator[int]:
    """Bytes of each storage that is there when a micro-batch begins."""
    yield from recording.outside_sizes
    for _ in range(resident):
        yield from recording.block_sizes
    yield from update.sizes
    if accumulating:
        yield from update.gradient_sizes


def _order(recording: Recording, blocks: int) -> Iterator[tuple[Segment, int]]:
    """The recorded segments in the order of the whole model's step, with the block that each stands for.

    The first and the last block are themselves; the second stands for all between them.
    """
    if recording.blocks == blocks:
        yield from ((segment, segment.block) for segment in recording.segments)
        return
    assert recording.blocks >= 3, "a first, a last and one between them"
    for segment in recording.segments:
        if segment.block != 1:
            last = segment.block == recording.blocks - 1
            if segment.block > 1 and not last:
                continue
            yield segment, blocks - 1 if last else segment.block
            continue
        between = range(1, blocks - 1)
        yield from ((segment, block) for block in (between if segment.part == "forward" else reversed(between)))


@dataclass(frozen=True)
class _Waiting:
    """Weights of a block of which nothing is there but their bytes."""

    buffer: Buffer

    def put(self, parameters: list[nn.Parameter] | None = None) -> None:
        """There is no block to put them into."""


def _ring(
    copies: PlannedCopies, ledger: Ledger, layout: Layout, strategy: MemoryStrategy, swapped: Sequence[int]
) -> Ring:
    """The ring of `memory.block_swap.block_swap`; unquantised weights are in the model's own files."""
    on_disk = copies.file if strategy.quantization == "none" else copies.disk
    tier = HostTier(copies, copies.host if strategy.block_swap_from == "host" else on_disk)
    homes = {index: _Waiting(tier.take(layout.nbytes)) for index in swapped}
    slots = [Slot(copies, layout, META) for _ in range(strategy.checkpoint_every + 1)]
    ledger.hold("buffers", (use(copies, slot.buffer) for slot in slots))
    return Ring(copies, homes, slots, strategy.checkpoint_every)


class _Player:
    """Replays entries and keeps count of the device's bytes: those of operators here, those of features in `ledger`."""

    def __init__(
        self,
        log: list[Any],
        ledger: Ledger,
        held: list[int],
        keep_for: Callable[[int], Keep],
        storages: Storages | None,
    ) -> None:
        self.log, self.ledger, self.keep_for, self.storages = log, ledger, keep_for, storages
        self.now = held
        self.alike = 1
        """Blocks that the recorded second one stands for."""
        self.peak: Counts = NOTHING
        self.peak_bytes = 0
        self.ring: Ring | None = None
        self.kept: dict[tuple[int, int], Kept] = {}
        self.given: dict[tuple[int, int], Tensor] = {}
        self.staying: dict[tuple[int, int], int] = {}
        self.references: dict[tuple[int, int], int] = {}

    def add(self, kind: str, nbytes: int) -> None:
        """From now on the device holds so much more."""
        self.now[INDEX[kind]] += nbytes

    def play(self, segment: Segment, block: int) -> None:
        """A recorded block's entries, for `block`."""
        label = f"{segment.part} {block + 1}" if segment.block >= 0 else segment.part
        self.enter(segment.part, block, segment.block)
        self.entries(segment.entries, label, block, segment.block)

    def enter(self, part: Part, block: int, recorded: int) -> None:
        """Another part of the step begins."""
        if self.storages is not None:
            self.storages.enter(part, block, recorded)

    def entries(self, entries: Sequence[Entry], label: str, block: int, recorded: int) -> None:
        """Entries recorded for the block `recorded`, for `block`."""
        for entry in entries:
            if isinstance(entry, Span):
                self._span(entry, label)
            elif isinstance(entry, Seam):
                self._seam(entry, entry.block + block - recorded)
            else:
                self.log.append(entry)

    def _span(self, span: Span, label: str) -> None:
        if self.storages is not None:
            self.storages.span(span)
        features = self.ledger.now
        held = [now + own for now, own in zip(self.now, span.peak, strict=True)]
        for kind, nbytes in features.items():
            held[INDEX[kind]] += nbytes
        total = sum(held)
        if total > self.peak_bytes:
            self.peak_bytes, self.peak = total, tuple(held)
        self.log.append(Compute(span.work, label, tuple(held)))
        times = self.alike if span.per_block else 1
        for index, change in enumerate(span.net):
            self.now[index] += times * change

    def _seam(self, seam: Seam, block: int) -> None:
        place = (block, seam.slot)
        if seam.name == "keep":
            self._keep(place, seam)
        elif seam.name == "take":
            self._take(place)
        elif seam.name in ("given_back_gone", "kept_gone"):
            self._gone(place, seam.name)
        elif self.ring is not None:
            if seam.name == "begin":
                self.ring.begin()
            elif block in self.ring.homes:
                getattr(self.ring, seam.name)(block)
            elif seam.name == "acquire_for_backward":
                self.ring.backward = True

    def _keep(self, place: tuple[int, int], seam: Seam) -> None:
        keep, nbytes = self.keep_for(place[0]), seam.nbytes
        if self.storages is not None:
            self.storages.keep(place, seam, keep is not keep_on_device)
        if keep is keep_on_device:
            self.staying[place], self.references[place] = nbytes, 2
            return
        with _disable_current_modes():
            tensor = torch.empty(nbytes, dtype=torch.uint8, device=META)
        self.ledger.hold("checkpoints", [tensor])
        self.add("checkpoints", -rounded(nbytes, GRANULE))
        self.kept[place] = keep(tensor)

    def _take(self, place: tuple[int, int]) -> None:
        if place not in self.staying:
            self.given[place] = self.kept[place]()

    def _gone(self, place: tuple[int, int], name: str) -> None:
        """A tensor that stayed is gone when what was kept and what was given back are."""
        if place not in self.staying:
            del (self.given if name == "given_back_gone" else self.kept)[place]
            return
        self.references[place] -= 1
        if not self.references[place]:
            self.add("checkpoints", -rounded(self.staying.pop(place), GRANULE))
            if self.storages is not None:
                self.storages.gone(place)
