"""The allocations and frees of a composed step, storage by storage, for the model of the allocator."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, TypeAlias

from longtake.planner.ledger import Allocated, Freed, Ran
from longtake.planner.log import Seam, Span
from longtake.planner.recorded import Part, Recording

Origin: TypeAlias = tuple[Part, int]
"""Which part of a step, and of which block."""


class Storages:
    """Follows storages through a replayed recording; `events` are (identity, bytes), or -1 instead for a free.

    What a block leaves to another part of the step is found again by where it was made and by its size, since the
    recording has other numbers for it. Also a sink for the log of what the memory features allocate themselves.
    """

    def __init__(self, recording: Recording, blocks: int) -> None:
        self.events: list[tuple[int, int]] = []
        self.count = 0
        self.recorded, self.blocks = recording.blocks, blocks
        self.origins: dict[int, Origin] = {}
        self.sizes: dict[int, int] = {}
        for segment in recording.segments:
            for entry in segment.entries:
                self._learn(entry, (segment.part, segment.block))
        self.left: dict[Origin, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        self.local: dict[int, int] = {}
        self.here: tuple[Origin, int] = (("prologue", -1), -1)
        self.kept: dict[tuple[int, int], int] = {}
        self.features: dict[int, int] = {}
        self.alias: int | None = None

    def allocate(self, nbytes: int) -> int:
        """A new storage."""
        self.count += 1
        self.events.append((self.count, nbytes))
        return self.count

    def hold(self, sizes: Iterable[int]) -> None:
        """Storages that are never freed."""
        for nbytes in sizes:
            self.allocate(nbytes)

    def enter(self, part: Part, block: int, recorded: int) -> None:
        """What follows was recorded for the block `recorded` and stands for `block`."""
        self._leave()
        self.here = ((part, block), recorded)

    def span(self, span: Span) -> None:
        """The allocations between two seams."""
        for event in span.log:
            kind = type(event)
            if kind is Allocated:
                self.local[event.storage] = self.allocate(event.nbytes)
            elif kind is Freed:
                self._free(event.storage, span.per_block)
            else:
                self._workspaces(event)

    def keep(self, place: tuple[int, int], seam: Seam, moved: bool) -> None:
        """From now on the tensor belongs to a feature, whose log then says when it is freed, if it is moved."""
        identity = self._found(seam.storage)
        if moved:
            self.alias = identity
        else:
            self.kept[place] = identity

    def gone(self, place: tuple[int, int]) -> None:
        """A tensor that stayed on the device is freed."""
        self.events.append((self.kept.pop(place), -1))

    def append(self, event: Any) -> None:
        """Takes an entry of the features' log."""
        if isinstance(event, Allocated):
            identity = self.allocate(event.nbytes) if self.alias is None else self.alias
            self.features[event.storage], self.alias = identity, None
        elif isinstance(event, Freed):
            self.events.append((self.features.pop(event.storage), -1))

    def _learn(self, entry: Any, origin: Origin) -> None:
        if isinstance(entry, Span):
            for event in entry.log:
                if isinstance(event, Allocated):
                    self.origins[event.storage] = origin
                    self.sizes[event.storage] = event.nbytes

    def _leave(self) -> None:
        left = self.left[self.here[0]]
        for storage, identity in self.local.items():
            left[self.sizes.get(storage, -1)].append(identity)
        self.local = {}

    def _workspaces(self, event: Ran) -> None:
        own = [self.allocate(nbytes) for nbytes in event.workspaces]
        self.events.extend((identity, -1) for identity in own)

    def _free(self, storage: int, per_block: bool) -> None:
        if storage not in self.local and (storage not in self.origins or self.here[0][0] == "update"):
            return  # it was there before; the update, whose storages are numbered anew, frees gradients only
        if not per_block or self.recorded == self.blocks:
            self.events.append((self._found(storage), -1))
            return
        part, _ = self.origins[storage]
        for block in range(1, self.blocks - 1):
            self.events.append((self.left[part, block][self.sizes[storage]].pop(0), -1))

    def _found(self, storage: int) -> int:
        """The storage that the recorded one stands for here."""
        if storage in self.local:
            return self.local.pop(storage)
        part, block = self.origins[storage]
        (_, here), recorded = self.here
        if block >= 0 and here >= 0:
            block += here - recorded
        elif block > 0:  # after the last block of the forward pass, so counted from there
            block += self.blocks - self.recorded
        return self.left[part, block][self.sizes[storage]].pop(0)
