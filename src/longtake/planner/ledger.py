"""Counts the bytes that a computation on `meta` tensors would hold on a device, operator by operator."""

import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longtake.memory.flattened import inner_tensors
from longtake.planner.events import Work
from longtake.planner.kernels import GRANULE, KERNELS, Result, is_view, rounded, workspaces


@dataclass(frozen=True)
class Storage:
    """A storage that was alive at the peak: its rounded size, its kind, the operator that made it."""

    nbytes: int
    kind: str
    operator: str
    number: int = -1


@dataclass(frozen=True, slots=True)
class Allocated:
    """A storage was made: its number in the log, its bytes (not rounded), its kind."""

    storage: int
    nbytes: int
    kind: str


@dataclass(frozen=True, slots=True)
class Freed:
    """A storage is gone."""

    storage: int


@dataclass(frozen=True, slots=True)
class Labelled:
    """A storage counts as `kind` from now on."""

    storage: int
    kind: str


@dataclass(frozen=True, slots=True)
class Ran:
    """An operator ran; `workspaces` are what its kernel allocated for itself, in bytes, and freed."""

    work: Work
    workspaces: tuple[int, ...]


@runtime_checkable
class Log(Protocol):
    """A list, or what else takes events."""

    def append(self, event: Any, /) -> None:
        """One more."""


class Ledger(TorchDispatchMode):
    """Counts the storages of one device type that are alive, by kind, and keeps the counts at the peak.

    What operators make under it counts as `block`; what was there before, or has another name, is told to `hold`. A
    view counts nothing, even of a storage that was never counted. `flops` are those of the operators so far, as torch's
    flop counter has them. `timeline` has (flops, bytes) after each operator, workspaces included. `log`, where it is
    given, gets all that happens.
    """

    def __init__(
        self,
        device_type: str = "meta",
        workspaces: bool = True,
        explain_at: int | None = None,
        log: Log | None = None,
    ) -> None:
        """`explain_at`: the bytes at which `largest` is filled, the largest storage first; a former trace's peak."""
        super().__init__()
        self.device_type = device_type
        self.workspaces = workspaces
        self.explain_at = explain_at
        self.log = log
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.largest: list[Storage] = []
        self.flops = 0
        self.timeline: list[tuple[int, int]] = []
        self._alive: dict[int, tuple[weakref.ref[torch.UntypedStorage], Storage]] = {}
        self._storages = 0
        self._total = 0
        self._peak_total = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Asked by torch: whether to wrap the function below, which takes a tenth of the time; nothing is compiled."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Result:
        if is_view(func):
            return func(*args, **(kwargs or {}))
        ran = KERNELS.run(func, args, kwargs or {})
        self.flops += ran.work.flops
        for tensor in ran.made:
            if tensor.device.type == self.device_type and not self._counted(tensor):
                self._count("block", tensor, func.__name__)
        own = workspaces(func, args) if self.workspaces else ()
        workspace = sum(rounded(nbytes, GRANULE) for nbytes in own)
        self._look(workspace)
        self.timeline.append((self.flops, self._total + workspace))
        if self.log is not None and (ran.work.calls or own):
            self.log.append(Ran(ran.work, own))
        return ran.result

    def hold(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Counts the storages of `tensors`, and of those that they are made of, as `kind`."""
        for tensor in (inner for each in tensors for inner in inner_tensors(each)):
            if tensor.device.type != self.device_type:
                continue
            if not self._counted(tensor):
                self._count(kind, tensor, "held")
                continue
            key = tensor.untyped_storage()._cdata
            reference, old = self._alive[key]
            self._alive[key] = (reference, Storage(old.nbytes, kind, old.operator, old.number))
            if self.log is not None:
                self.log.append(Labelled(old.number, kind))
            self.now[old.kind] -= old.nbytes
            self.now[kind] += old.nbytes
        self._look(0)

    def number_of(self, tensor: Tensor) -> int:
        """The number in the log of a counted tensor's storage."""
        return self._alive[tensor.untyped_storage()._cdata][1].number

    def _counted(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._alive

    def _count(self, kind: str, tensor: Tensor, operator: str) -> None:
        storage = tensor.untyped_storage()
        size = rounded(storage.nbytes(), GRANULE)
        key = storage._cdata
        self._storages += 1
        made = Storage(size, kind, operator, self._storages)
        self._alive[key] = (weakref.ref(storage, partial(self._freed, key)), made)
        if self.log is not None:
            self.log.append(Allocated(made.number, storage.nbytes(), kind))
        self.now[kind] += size
        self._total += size

    def _freed(self, key: int, _reference: weakref.ref[torch.UntypedStorage]) -> None:
        _, storage = self._alive.pop(key)
        if self.log is not None:
            self.log.append(Freed(storage.number))
        self.now[storage.kind] -= storage.nbytes
        self._total -= storage.nbytes

    def _look(self, workspace: int) -> None:
        """Remembers the moment if it is the highest; `workspace` is there for this moment alone."""
        total = self._total + workspace
        if total > self._peak_total:
            self._peak_total = total
            self.peak = self.now.copy()
            self.peak["workspace"] = workspace
        if self.explain_at is not None and total >= self.explain_at and not self.largest:
            found = [storage for _, storage in self._alive.values()]
            self.largest = sorted(found, key=lambda storage: -storage.nbytes)
