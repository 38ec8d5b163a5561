"""Bytes that are copied beside the computation: who waits for whom is decided here, by each buffer's own record.

A feature holds `Buffer`s and calls `copy`, `use` and `done`; it never sees an event, so it cannot forget one.
"""

import contextlib
import os
import shutil
import uuid
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from longtake.errors import Problem, RunError
from longtake.memory.copies import Copies, Event, Place, Queue
from longtake.memory.extents import Extent

Kept: TypeAlias = Callable[[], Tensor]
"""Gives back, once, what was kept."""


@runtime_checkable
class Keep(Protocol):
    """Keeps a tensor that a block owns until its backward pass asks for it."""

    def __call__(self, tensor: Tensor) -> Kept:
        """Takes `tensor`, of any shape and type; the caller drops it."""


def keep_on_device(tensor: Tensor) -> Kept:
    """The `Keep` that moves nothing."""
    return lambda: tensor


class Buffer:
    """Bytes in one place, with the end of the copy that wrote them and of all that has read them since."""

    def __init__(self, place: Place, reached: Event = None) -> None:
        """`reached`: the computation up to the allocation, which may still use the memory's earlier content."""
        self._place = self._room = place
        self._written: Event = None
        # The last reader of each kind: those of one kind end in their order.
        self._read: dict[object, Event] = {"computation": reached}

    @property
    def nbytes(self) -> int:
        """Size."""
        return _nbytes(self._place)

    @property
    def room(self) -> int:
        """Bytes that it was made for."""
        return _nbytes(self._room)

    def resize(self, nbytes: int) -> None:
        """From now on the buffer is the first `nbytes` bytes of its room."""
        room = self._room
        if isinstance(room, Tensor):
            self._place = room[:nbytes]
        else:
            assert len(room) == 1, "only files of our own change their size"
            self._place = (replace(room[0], nbytes=nbytes),)


def computed(copies: Copies, tensor: Tensor) -> Buffer:
    """A buffer over a contiguous `tensor` that the computation has written."""
    buffer = Buffer(as_bytes(tensor))
    buffer._written = copies.reached()
    return buffer


def allocate(copies: Copies, nbytes: int, device: torch.device) -> Buffer:
    """New bytes on the device."""
    return Buffer(torch.empty(nbytes, dtype=torch.uint8, device=device), copies.reached())


def copy(copies: Copies, queue: Queue, target: Buffer, source: Buffer) -> None:
    """Fills `target` from `source`, beside the computation: after both are written and `target` is read to the end."""
    after = [event for event in (*target._read.values(), target._written, source._written) if event is not None]
    event = copies.start(queue, target._place, source._place, after)
    target._written, target._read = event, {}
    source._read[queue, type(target._place)] = event


def use(copies: Copies, buffer: Buffer) -> Tensor:
    """The bytes of a buffer on the device; what is computed from now on comes after their copy."""
    copies.wait(buffer._written)
    assert isinstance(buffer._place, Tensor), "a file's bytes cannot be computed with"
    return buffer._place


def done(copies: Copies, buffer: Buffer) -> None:
    """The computation queued so far was the last that reads `buffer`: it may be filled anew after that."""
    buffer._read["computation"] = copies.reached()


def settle(copies: Copies, buffer: Buffer) -> None:
    """What is computed from now on comes after every copy from and to `buffer`: its memory may go back."""
    for event in (buffer._written, *buffer._read.values()):
        if event is not None:
            copies.wait(event)


def extents_of(buffer: Buffer) -> tuple[Extent, ...]:
    """Where in files a buffer lies whose copies have ended."""
    assert not isinstance(buffer._place, Tensor), "it is not in a file"
    return buffer._place


def _nbytes(place: Place) -> int:
    return place.nbytes if isinstance(place, Tensor) else sum(extent.nbytes for extent in place)


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes [nbytes] of a contiguous tensor."""
    return tensor.detach().reshape(-1).view(torch.uint8)


@runtime_checkable
class Tier(Protocol):
    """Where bytes wait: gives and takes back buffers."""

    def take(self, nbytes: int) -> Buffer:
        """A buffer of `nbytes` whose earlier content is no longer wanted."""

    def give_back(self, buffer: Buffer) -> None:
        """It may be given out again."""


class _Free:
    """Buffers to be used again. The largest bucket comes first, so that for all others one is large enough."""

    def __init__(self) -> None:
        self.waiting: list[Buffer] = []

    def take(self, nbytes: int) -> Buffer | None:
        """The smallest that is large enough."""
        fitting = [buffer for buffer in self.waiting if buffer.room >= nbytes]
        if not fitting:
            return None
        chosen = min(fitting, key=lambda buffer: buffer.room)
        self.waiting.remove(chosen)
        chosen.resize(nbytes)
        return chosen


class HostTier:
    """Host memory, allocated once for each buffer that is in use at a time, at its exact size, and used again."""

    def __init__(self, copies: Copies, allocate: Callable[[int], Tensor] | None = None) -> None:
        """`allocate` gives memory, the host's without it."""
        self.copies = copies
        self.allocate = allocate or copies.host
        self.free = _Free()

    def take(self, nbytes: int) -> Buffer:
        """Raises RunError where the host refuses."""
        return self.free.take(nbytes) or Buffer(self.allocate(nbytes))

    def give_back(self, buffer: Buffer) -> None:
        """Keeps the memory."""
        self.free.waiting.append(buffer)


class _OpenFile:
    """A file that is closed when nobody holds this: not before the last copy, or another could have its number."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        weakref.finalize(self, os.close, self.descriptor)


class DiskTier:
    """Files in a folder, one for each buffer that is in use at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.free = _Free()
        self.count = 0

    def take(self, nbytes: int) -> Buffer:
        """Raises RunError where the disk refuses."""
        if found := self.free.take(nbytes):
            return found
        path = self.folder / f"{self.count:04d}.bin"
        self.count += 1
        try:
            file = _OpenFile(path)
            _take_space(file.descriptor, nbytes)
        except OSError as error:
            what = f"cannot offload {nbytes} bytes: {error.strerror or error}"
            raise RunError(
                Problem(what, str(path), 'make room, or use the tier "host"', code="disk-offload-failed")
            ) from error
        return Buffer((Extent(file.descriptor, str(path), 0, nbytes, file),))

    def give_back(self, buffer: Buffer) -> None:
        """Keeps the file."""
        self.free.waiting.append(buffer)

    def close(self) -> None:
        """Gives the files up: each is closed when neither a buffer nor a copy under way is in it."""
        self.free.waiting.clear()


@contextmanager
def disk_tier(scratch: Path, purpose: str) -> Iterator[DiskTier]:
    """Files in a subfolder `<purpose>-...` of `scratch`, removed at the end; what killed runs left, at the start."""
    for left in scratch.glob(f"{purpose}-*"):
        lock = _locked(left)
        if lock is not None:  # whoever made it is gone
            shutil.rmtree(left, ignore_errors=True)
            os.close(lock)
    folder = scratch / f"{purpose}-{uuid.uuid4().hex[:12]}"
    unlocked = scratch / f".{folder.name}"  # a name that nobody looks for
    unlocked.mkdir(parents=True)
    lock = _locked(unlocked)
    unlocked.rename(folder)
    tier = DiskTier(folder)
    try:
        yield tier
    finally:
        tier.close()
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)
        with contextlib.suppress(OSError):  # another's files are in it
            scratch.rmdir()


def _take_space(descriptor: int, nbytes: int) -> None:
    """So that a full disk is noticed at the start; macOS lacks the call, and notices when it writes."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, nbytes)
    else:
        os.ftruncate(descriptor, nbytes)


def _locked(folder: Path) -> int | None:
    """A descriptor that holds `folder` until it is closed or its process ends; None where another holds it."""
    import fcntl  # absent on Windows, where a plan needs the rest of this file

    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
