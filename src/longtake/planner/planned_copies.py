"""Copies of a step that is only planned: into its log go what is copied where, and who waits for whom."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from longtake.memory.copies import Event, MetaCopies, Place, bytes_elsewhere
from longtake.memory.copies import Queue as CopyQueue
from longtake.memory.flattened import inner_tensors
from longtake.planner.events import Copy, Reached, Wait, Where
from longtake.planner.ledger import Ledger


class PlannedCopies(MetaCopies):
    """Tells `ledger` of the buffers on the device that copies fill; `moved` are the bytes that go each way."""

    def __init__(self, ledger: Ledger, log: list[Any], first_event: int = 0) -> None:
        super().__init__()
        self.ledger = ledger
        self.log = log
        self.moved: Counter[CopyQueue] = Counter()
        self.events = first_event
        self.elsewhere: dict[int, Where] = {}

    def start(self, queue: CopyQueue, target: Place, source: Place, after: Sequence[Event]) -> Event:
        """Logs the copy; its event is a number."""
        assert isinstance(target, Tensor), "on meta there are no files"
        assert isinstance(source, Tensor), "on meta there are no files"
        self.moved[queue] += target.nbytes
        away = source if queue == "inward" else target
        if queue == "inward":
            self.ledger.hold("buffers", [target])
        where = self.elsewhere[away.untyped_storage()._cdata]
        self.events += 1
        self.log.append(Copy(queue, target.nbytes, where, tuple(after), self.events))
        return self.events

    def reached(self) -> Event:
        """Logs the moment."""
        self.events += 1
        self.log.append(Reached(self.events))
        return self.events

    def wait(self, event: Event) -> None:
        """Logs the wait."""
        if event is not None:
            self.log.append(Wait(event))

    def host(self, nbytes: int) -> Tensor:
        """A tensor that is not the device's."""
        return self._away(super().host(nbytes), "host")

    def disk(self, nbytes: int) -> Tensor:
        """A tensor that stands for a file."""
        return self._away(super().disk(nbytes), "disk")

    def file(self, nbytes: int) -> Tensor:
        """A tensor that stands for a file that is there anyway."""
        return self._away(bytes_elsewhere(nbytes), "disk")

    def on_device(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Those tensors, or parts of tensors, that are neither in host memory nor in files."""
        inner = [inner for tensor in tensors for inner in inner_tensors(tensor)]
        return [tensor for tensor in inner if tensor.untyped_storage()._cdata not in self.elsewhere]

    def _away(self, memory: Tensor, where: Where) -> Tensor:
        self.elsewhere[memory.untyped_storage()._cdata] = where
        return memory
