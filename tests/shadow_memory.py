"""What a race checker remembers of the bytes that copies touch: who has read and written them, and when."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch


class Race(AssertionError):
    """Something reads or writes bytes before what it must come after has ended."""


class Unread(AssertionError):
    """The computation never read what was copied to the device: it was fetched in the wrong order."""


@dataclass(eq=False)
class Access:
    """Bytes [first, end) are read or written by `by`, at `tick` of a timeline; `results` are what the copy writes."""

    first: int
    end: int
    timeline: int
    tick: int
    writes: bool
    by: object
    results: "Sequence[Access]" = ()
    lost: bool = False

    def overlaps(self, other: "Access") -> bool:
        """Whether they have bytes in common."""
        return self.first < other.end and other.first < self.end


@dataclass(eq=False)
class Memory:
    """A storage or a file that took part in a copy, with the accesses that something later may have to come after."""

    name: str
    on_device: bool = False
    storage: torch.UntypedStorage | None = None
    accesses: list[Access] = field(default_factory=list)
    unread: list[Access] = field(default_factory=list)

    def check(self, new: Access, clock: Sequence[int], fills: bool = False) -> None:
        """Raises Race where `new`, which comes after `clock`, must come after an access that is not in it.

        Raises Unread where it `fills` what a copy to the device has filled and the computation has not read.
        """
        for old in self.accesses:
            if old.overlaps(new):
                self._check(old, new, clock)
        for old in self.unread if fills else ():
            if old.overlaps(new):
                raise Unread(f"{self._part(old)}: {new.by} overwrites what the computation has not read: {old.by}")

    def add(self, new: Access, fills: bool = False) -> None:
        """Notes an access, and forgets those that whatever comes after it comes after, too."""
        staying = []
        for old in self.accesses:
            replaced = new.writes or (not old.writes and old.timeline == new.timeline)
            if not (replaced and new.first <= old.first and old.end <= new.end):
                staying.append(old)
        self.accesses = [*staying, new]
        if fills:
            self.unread.append(new)

    def gone(self) -> bool:
        """Whether nobody but this record holds the storage."""
        return self.storage is not None and torch._C._storage_Use_Count(self.storage._cdata) == 1

    def give_back(self, clock: Sequence[int]) -> None:
        """The allocator may use it for what comes after `clock`; raises Race where a copy may still fill it.

        A copy that may still read it takes away garbage; that is a race once something reads the result.
        """
        for access in self.accesses if self.on_device else ():
            if clock[access.timeline] >= access.tick:
                continue
            if access.writes:
                raise Race(f"{self._part(access)}: given back before the copy that fills it is done: {access.by}")
            for result in access.results:
                result.lost = True

    def _check(self, old: Access, new: Access, clock: Sequence[int]) -> None:
        if (old.writes or new.writes) and clock[old.timeline] < old.tick:
            who = "its last reader" if not old.writes else "its other writer" if new.writes else "its writer"
            did = "writes" if new.writes else "reads"
            raise Race(f"{self._part(new)}: {new.by} {did} it before {who} is done and waited for: {old.by}")
        if old.lost and not new.writes:
            raise Race(f"{self._part(new)}: {new.by} reads what came from memory that was given back: {old.by}")

    def _part(self, access: Access) -> str:
        return f"{self.name}, bytes {access.first} to {access.end}"


@dataclass(frozen=True)
class Span:
    """`nbytes` bytes from `first` on of a memory."""

    memory: Memory
    first: int
    nbytes: int

    def touches(self, other: "Span") -> bool:
        """Whether they have bytes in common."""
        apart = self.first >= other.first + other.nbytes or other.first >= self.first + self.nbytes
        return self.memory is other.memory and not apart


class Memories:
    """The memory of known storages, by address; it is held, so that no address comes twice."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.all: list[Memory] = []
        self.count = 0

    def find(self, address: int) -> tuple[Memory, int] | None:
        """What lies at `address`, and how far from its beginning."""
        index = bisect_right(self.starts, address) - 1
        if index < 0:
            return None
        memory, first = self.all[index], address - self.starts[index]
        assert memory.storage is not None
        return (memory, first) if first < memory.storage.nbytes() else None

    def add(self, storage: torch.UntypedStorage, on_device: bool) -> Memory:
        """A storage that is not known yet."""
        self.count += 1
        memory = Memory(f"{'device' if on_device else 'host'} memory {self.count}", on_device, storage)
        index = bisect_right(self.starts, storage.data_ptr())
        self.starts.insert(index, storage.data_ptr())
        self.all.insert(index, memory)
        return memory

    def remove(self, memory: Memory) -> None:
        """It is not known any more."""
        index = self.all.index(memory)
        del self.all[index], self.starts[index]

    def clear(self) -> None:
        """Nothing is known."""
        self.starts.clear()
        self.all.clear()
