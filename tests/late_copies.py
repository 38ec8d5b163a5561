"""Queues whose copies run as late as they may, or in a random order that the waits allow; garbage until they ran."""

import ctypes
import os
import random
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from longtake.errors import RunError
from longtake.memory.copies import Place
from longtake.memory.extents import Extent, read, write
from shadow_memory import Race, Span

GARBAGE = 0xFF  # NaN in torch's floating types
FileIdentity: TypeAlias = tuple[int, int]
Raw: TypeAlias = np.ndarray | tuple[tuple[Extent, FileIdentity], ...]
"""A place that holds no reference to its storage, or the parts of files that were open when the copy was queued."""


@dataclass(eq=False)
class LateCopy:
    """A copy that was queued as number `number`; `places` and `spans` are of its target and its source."""

    number: int
    direction: str
    timeline: int
    places: tuple[Raw, Raw]
    spans: tuple[tuple[Span, ...], tuple[Span, ...]]
    after: "list[LateCopy]"
    ran: bool = False
    spoiled: bool = False
    error: Exception | None = None

    def __str__(self) -> str:
        target, source = (" and ".join({span.memory.name: "" for span in spans}) for spans in self.spans)
        return f"copy {self.number} {self.direction} from {source} to {target}"


class LateQueues:
    """A queue for each timeline. With seed 0 a copy runs when it is waited for, with others also before, at random."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.eagerness = self.random.choice((0.0, 0.2, 0.5, 0.8)) if seed else 0.0
        self.queued: dict[int, deque[LateCopy]] = {}

    def add(self, copy: LateCopy) -> None:
        """Queues a copy."""
        self.queued.setdefault(copy.timeline, deque()).append(copy)
        self._spoil()

    def pending(self) -> list[LateCopy]:
        """What has not run."""
        return [copy for queue in self.queued.values() for copy in queue]

    def run(self, copy: LateCopy) -> None:
        """Runs a copy after those before it in its queue, and each after what it waits for."""
        queue = self.queued[copy.timeline]
        while not copy.ran:
            first = queue[0]
            for earlier in first.after:
                self.run(earlier)
            first.error = next((earlier.error for earlier in first.after if earlier.error), None)
            if first.error is None:
                _move(first)
            first.ran = True
            first.after.clear()
            queue.popleft()
            self._spoil()

    def run_all(self) -> None:
        """Nothing is left."""
        for queue in self.queued.values():
            if queue:
                self.run(queue[-1])

    def run_some(self) -> None:
        """As many as chance will have it."""
        while self.random.random() < self.eagerness and self.pending():
            self.run(self.random.choice([queue[0] for queue in self.queued.values() if queue]))

    def _spoil(self) -> None:
        """Fills with garbage what is to be filled, unless an earlier copy still needs it."""
        pending = self.pending()
        for copy in pending:
            if copy.spoiled:
                continue
            needed = [span for other in pending if other.number < copy.number for part in other.spans for span in part]
            if not any(span.touches(other) for span in copy.spans[0] for other in needed):
                copy.spoiled = True
                _fill_with_garbage(copy)


def raw(place: Place) -> Raw:
    """The place without a reference to its storage, which whoever calls this holds."""
    if isinstance(place, tuple):
        return tuple((extent, identity(extent)) for extent in place)
    if not place.nbytes:
        return np.empty(0, np.uint8)
    return np.frombuffer(memoryview((ctypes.c_ubyte * place.nbytes).from_address(place.data_ptr())), np.uint8)


def identity(extent: Extent) -> FileIdentity:
    """Which file is open as the descriptor."""
    status = os.fstat(extent.descriptor)
    return status.st_dev, status.st_ino


def _move(copy: LateCopy) -> None:
    target, source = (_extents(place, copy) if isinstance(place, tuple) else place for place in copy.places)
    try:
        with _disable_current_modes():
            if isinstance(target, tuple):
                assert not isinstance(source, tuple)
                write(target, _as_tensor(source))
            elif isinstance(source, tuple):
                read(_as_tensor(target), source)
            else:
                np.copyto(target, source)
    except (RunError, OSError) as error:
        copy.error = error


def _extents(place: tuple[tuple[Extent, FileIdentity], ...], copy: LateCopy) -> tuple[Extent, ...]:
    """Raises Race where a descriptor is closed, or another file's by now."""
    for extent, known in place:
        try:
            same = identity(extent) == known
        except OSError:
            same = False
        if not same:
            raise Race(f"{extent.path}: closed before a copy was done: {copy}")
    return tuple(extent for extent, _ in place)


def _as_tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array)


def _fill_with_garbage(copy: LateCopy) -> None:
    target = copy.places[0]
    if not isinstance(target, tuple):
        target.fill(GARBAGE)
        return
    with _disable_current_modes(), suppress(RunError):  # the copy itself will say what is wrong
        for extent in _extents(target, copy):
            write((extent,), torch.full((extent.nbytes,), GARBAGE, dtype=torch.uint8))
