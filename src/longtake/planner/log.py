"""The log of a traced step, folded: stretches of operators between seams, and what happens at the seams."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from longtake.planner.events import KINDS, NO_WORK, Copy, Counts, Reached, Wait, Work
from longtake.planner.kernels import GRANULE, rounded
from longtake.planner.ledger import Allocated, Freed, Labelled, Ran

INDEX = {kind: index for index, kind in enumerate(KINDS)}
WORKSPACE = INDEX["workspace"]
NOTHING: Counts = (0,) * len(KINDS)
SeamName: TypeAlias = Literal[
    "begin", "acquire", "acquire_for_backward", "release", "keep", "take", "given_back_gone", "kept_gone"
]


@dataclass(frozen=True, slots=True)
class Seam:
    """Where a memory feature is called for `block`: its weights are used, or a tensor that it keeps comes or goes.

    `slot` numbers what the block keeps, which has `nbytes` bytes.
    `given_back_gone` is where the last reference ends to what `take` gave back, `kept_gone` to what was kept, in a step
    in which nothing is moved.
    """

    name: SeamName
    block: int
    slot: int = 0
    nbytes: int = 0
    storage: int = -1


@dataclass(slots=True)
class Span:
    """Operators between two seams: what they change on the device, the highest moment in between, and their cost.

    `net`, `peak` and `peak_bytes` are relative to the bytes at its start; `log` has its allocations for the allocator.
    `per_block` says that it frees what each block but the first and the last has left, of which one is recorded.
    """

    net: Counts
    peak: Counts
    peak_bytes: int
    work: Work
    log: list[Any] = field(default_factory=list)
    per_block: bool = False


Entry: TypeAlias = Span | Seam | Copy | Wait | Reached


class Fold:
    """Folds a log after the part of it that is `before` the step."""

    def __init__(self, before: Iterable[Any] = (), blocks: int = 0) -> None:
        """`blocks`: of the model that was recorded, where its second block stands for many."""
        self.last = blocks - 1
        self.sizes: dict[int, int] = {}
        self.exact: dict[int, int] = {}
        self.kinds: dict[int, int] = {}
        self.kept: dict[int, Seam] = {}
        self.of_each: set[int] = set()
        for event in before:
            self._learn(event)

    def entries(self, log: Sequence[Any]) -> Iterator[Entry]:
        """The log's spans and seams; the free of a kept storage is the seam `kept_gone`."""
        self.of_each = _of_each_block(log, self.last) if self.last > 0 else set()
        span = _Open()
        for event in log:
            kind = type(event)
            if span.per_block and kind is not Freed:
                yield from span.closed()
                span = _Open()
            if kind is Ran:
                span.ran(event)
            elif kind is Allocated:
                self._learn(event)
                span.change(self.kinds[event.storage], self.sizes[event.storage], event)
            elif kind is Freed and event.storage not in self.kept:
                if (event.storage in self.of_each) != span.per_block:
                    yield from span.closed()
                    span = _Open(not span.per_block)
                span.change(self.kinds[event.storage], -self.sizes[event.storage], event)
            elif kind is Labelled:
                self._label(event, span)
            else:
                yield from span.closed()
                span = _Open()
                yield self._seam(event)
        yield from span.closed()

    def totals(self) -> Counts:
        """Bytes of each kind that are known."""
        found = [0] * len(KINDS)
        for storage, size in self.sizes.items():
            found[self.kinds[storage]] += size
        return tuple(found)

    def _learn(self, event: Any) -> None:
        if isinstance(event, Allocated):
            self.exact[event.storage] = event.nbytes
            self.sizes[event.storage] = rounded(event.nbytes, GRANULE)
            self.kinds[event.storage] = INDEX[event.kind]
        elif isinstance(event, Labelled):
            self.kinds[event.storage] = INDEX[event.kind]
        elif isinstance(event, Freed):
            del self.sizes[event.storage]

    def _label(self, event: Labelled, span: _Open) -> None:
        if event.storage in self.kept:
            return
        size = self.sizes[event.storage]
        span.change(self.kinds[event.storage], -size)
        self.kinds[event.storage] = INDEX[event.kind]
        span.change(self.kinds[event.storage], size)

    def _seam(self, event: Any) -> Any:
        if isinstance(event, Freed):
            return Seam("kept_gone", *_place(self.kept.pop(event.storage)), event.storage)
        if isinstance(event, Seam) and event.name == "keep":
            event = Seam("keep", event.block, event.slot, self.exact[event.storage], event.storage)
            self.kept[event.storage] = event
        return event


def _of_each_block(log: Iterable[Any], last: int) -> set[int]:
    """Storages of the second block's forward pass that are freed after the last one's, as are those of the first.

    So each block leaves them there: autocast's casts of trained weights, which its cache holds until the forward pass
    ends.
    """
    place: int | None = None
    made: dict[int, tuple[int, int]] = {}
    left: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
    for event in log:
        if isinstance(event, Seam):
            place = _followed(event, place, last)
        elif isinstance(event, Allocated) and place in (0, 1):
            made[event.storage] = place, event.nbytes
        elif isinstance(event, Freed) and place is None and event.storage in made:
            block, nbytes = made[event.storage]
            left[block].append((event.storage, nbytes))
    of_first = Counter(nbytes for _, nbytes in left[0])
    found = set()
    for storage, nbytes in left[1]:
        if of_first[nbytes]:
            of_first[nbytes] -= 1
            found.add(storage)
    return found


def _followed(seam: Seam, place: int | None, last: int) -> int | None:
    """The block whose pass the log is in: None before the first, and after the last until backward."""
    if seam.name in ("acquire", "acquire_for_backward"):
        return seam.block
    if seam.name == "release" and seam.block == place == last:
        return None
    return place


def _place(seam: Seam) -> tuple[int, int, int]:
    return seam.block, seam.slot, seam.nbytes


class _Open:
    """A span that is being folded."""

    def __init__(self, per_block: bool = False) -> None:
        self.per_block = per_block
        self.now = [0] * len(KINDS)
        self.total = self.peak_bytes = 0
        self.peak: Counts = NOTHING
        self.work: list[int] = [*NO_WORK]
        self.log: list[Any] = []

    def change(self, kind: int, nbytes: int, event: Any = None) -> None:
        self.now[kind] += nbytes
        self.total += nbytes
        if event is not None:
            self.log.append(event)
        if self.total > self.peak_bytes:
            self._highest(0)

    def ran(self, event: Ran) -> None:
        for place, value in enumerate(event.work):
            self.work[place] += value
        if event.workspaces:
            self.log.append(event)
            own = sum(rounded(nbytes, GRANULE) for nbytes in event.workspaces)
            if self.total + own > self.peak_bytes:
                self._highest(own)

    def closed(self) -> Iterator[Span]:
        if self.log or any(self.work) or any(self.now):
            yield Span(tuple(self.now), self.peak, self.peak_bytes, Work(*self.work), self.log, self.per_block)

    def _highest(self, workspace: int) -> None:
        self.peak_bytes = self.total + workspace
        peak = [*self.now]
        peak[WORKSPACE] += workspace
        self.peak = tuple(peak)
