"""Copies beside the computation: streams, events and pinned memory of CUDA; on the CPU threads; on `meta` nothing.

`host_buffers` holds the rules of who waits for whom; here is what a device needs to follow them, and nothing else.
"""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from longtake.errors import Problem, RunError
from longtake.memory.extents import Extent, read, write

STAGING_BYTES = 32 * 2**20
"""Pinned memory through which a file's bytes reach a CUDA device."""
MOVE_LESS = "free host memory, or move less: memory.activation_offload_fraction, memory.block_swap"


Place: TypeAlias = Tensor | tuple[Extent, ...]
"""Flat bytes: a contiguous uint8 tensor on the device or the host, or parts of files that lie one after the other."""
Queue: TypeAlias = Literal["inward", "outward"]
"""To the device, or from it."""
Event: TypeAlias = Any
"""A point that a queue reaches; made and waited for by the same `Copies`."""


@runtime_checkable
class Copies(Protocol):
    """Two queues beside the computation, one of copies to the device, one of copies from it.

    Copies of one queue keep their order if all of them touch files, or none; a copy of memory may overtake a file's.
    """

    def start(self, queue: Queue, target: Place, source: Place, after: Sequence[Event]) -> Event:
        """Queues a copy between places of one size that begins after all of `after`; its end is the event."""

    def reached(self) -> Event:
        """The end of what has been computed, or queued for computation, up to now."""

    def wait(self, event: Event) -> None:
        """What is computed from now on comes after `event`; raises RunError where its copy failed."""

    def host(self, nbytes: int) -> Tensor:
        """Bytes [nbytes] of host memory that copies reach fast; raises RunError where the host refuses."""

    def close(self) -> None:
        """Ends when all queued copies have."""


def copies_for(device: torch.device) -> Copies:
    """The queues of `device`."""
    if device.type == "cuda":
        return CudaCopies(device)
    return MetaCopies() if device.type == "meta" else CpuCopies()


class CpuCopies:
    """A thread for each queue. Device and host are one memory here; the computation is always up to date.

    `disk_bytes_per_second` slows what goes to and from files down, to measure what a slow disk costs.
    """

    def __init__(self, disk_bytes_per_second: float | None = None) -> None:
        self.limit = disk_bytes_per_second
        self.threads = {name: ThreadPoolExecutor(1, f"copies-{name}") for name in ("inward", "outward")}

    def start(self, queue: Queue, target: Place, source: Place, after: Sequence[Event]) -> Event:
        """On the queue's thread."""
        return self.threads[queue].submit(self._copy, target, source, [event for event in after if event is not None])

    def reached(self) -> Event:
        """Nothing to wait for."""
        return None

    def wait(self, event: Event) -> None:
        """Waits for the thread."""
        if event is not None:
            event.result()

    def host(self, nbytes: int) -> Tensor:
        """Plain memory."""
        return _host_memory(nbytes)

    def close(self) -> None:
        """Ends the threads."""
        for thread in self.threads.values():
            thread.shutdown()

    def _copy(self, target: Place, source: Place, after: Sequence[Future[None]]) -> None:
        for event in after:
            event.result()
        started = time.monotonic()
        if isinstance(target, tuple):
            assert isinstance(source, Tensor)
            write(target, source)
        elif isinstance(source, tuple):
            read(target, source)
        else:
            np.copyto(target.numpy(), source.numpy())  # one thread, and it lets the others go on
            return
        if self.limit is not None:
            nbytes = target.nbytes if isinstance(target, Tensor) else sum(extent.nbytes for extent in target)
            time.sleep(max(0.0, nbytes / self.limit - (time.monotonic() - started)))


class MetaCopies:
    """Copies of bytes that are not there; `host_bytes`, `disk_bytes` are what was asked for of either."""

    def __init__(self) -> None:
        self.host_bytes = self.disk_bytes = 0

    def start(self, queue: Queue, target: Place, source: Place, after: Sequence[Event]) -> Event:  # noqa: ARG002
        """Done at once."""
        return None

    def reached(self) -> Event:
        """Nothing to wait for."""
        return None

    def wait(self, event: Event) -> None:
        """Nothing to wait for."""

    def host(self, nbytes: int) -> Tensor:
        """A tensor that no dispatch mode sees: the device has none of it."""
        self.host_bytes += nbytes
        return bytes_elsewhere(nbytes)

    def disk(self, nbytes: int) -> Tensor:
        """What stands for a file: as of `host`."""
        self.disk_bytes += nbytes
        return bytes_elsewhere(nbytes)

    def close(self) -> None:
        """Nothing to end."""


class CudaCopies:
    """Two side streams; what touches files goes through a thread and pinned staging memory of its own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.streams = {name: torch.cuda.Stream(device) for name in ("inward", "outward")}
        self.threads = {name: _FileThread(self, stream) for name, stream in self.streams.items()}
        self.registered: list[Tensor] = []

    def start(self, queue: Queue, target: Place, source: Place, after: Sequence[Event]) -> Event:
        """On the queue's stream; a copy that touches a file is queued there by its thread."""
        if isinstance(target, tuple) or isinstance(source, tuple):
            return self.threads[queue].submit(target, source, after)
        stream = self.streams[queue]
        recorded = [_recorded(event) for event in after if event is not None]
        with torch.cuda.stream(stream):
            for event in recorded:
                stream.wait_event(event)
            target.copy_(source, non_blocking=True)
            return stream.record_event()

    def reached(self) -> Event:
        """An event on the stream of the computation."""
        return torch.cuda.current_stream(self.device).record_event()

    def wait(self, event: Event) -> None:
        """The stream of the computation waits, the program only until a file's copy is queued."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(_recorded(event))

    def host(self, nbytes: int) -> Tensor:
        """Memory that is registered as pinned.

        Not `pin_memory()`: its allocator rounds up to a power of two and keeps what is freed.
        """
        memory = _host_memory(nbytes)
        if nbytes:
            with torch.cuda.device(self.device):  # a thread begins on the first device, where it would make a context
                status = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), nbytes, 0)
            if int(status) != 0:
                what = f"the driver cannot pin {nbytes} bytes of host memory (error {int(status)})"
                raise RunError(Problem(what, "[memory]", MOVE_LESS, code="memory-not-pinned"))
            self.registered.append(memory)
        return memory

    def close(self) -> None:
        """Waits for the streams and gives pinned memory back."""
        for thread in self.threads.values():
            thread.close()
        torch.cuda.synchronize(self.device)
        for memory in self.registered:
            torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
        self.registered.clear()


class _FileThread:
    """Moves bytes between files and the device, in order, for one stream."""

    def __init__(self, copies: CudaCopies, stream: torch.cuda.Stream) -> None:
        self.copies, self.stream = copies, stream
        self.pool = ThreadPoolExecutor(1, "copies-file")
        self.staging: Tensor | None = None

    def submit(self, target: Place, source: Place, after: Sequence[Event]) -> "Future[torch.cuda.Event]":
        return self.pool.submit(self._copy, target, source, after)

    def close(self) -> None:
        self.pool.shutdown()

    def _copy(self, target: Place, source: Place, after: Sequence[Event]) -> torch.cuda.Event:
        recorded = [_recorded(event) for event in after if event is not None]
        if self.staging is None:
            self.staging = self.copies.host(STAGING_BYTES)
        with torch.cuda.stream(self.stream):
            for event in recorded:
                self.stream.wait_event(event)
            if isinstance(target, tuple):
                assert isinstance(source, Tensor)
                self._out(target, source, self.staging)
            else:
                assert isinstance(source, tuple)
                self._in(target, source, self.staging)
            return self.stream.record_event()

    def _out(self, target: tuple[Extent, ...], source: Tensor, staging: Tensor) -> None:
        for extent, part in _parts(target, source, len(staging)):
            staging[: len(part)].copy_(part, non_blocking=True)
            self.stream.synchronize()
            write((extent,), staging[: len(part)])

    def _in(self, target: Tensor, source: tuple[Extent, ...], staging: Tensor) -> None:
        for extent, part in _parts(source, target, len(staging)):
            self.stream.synchronize()  # the part before this one has left the staging memory
            read(staging[: len(part)], (extent,))
            part.copy_(staging[: len(part)], non_blocking=True)


def bytes_elsewhere(nbytes: int) -> Tensor:
    """Bytes on `meta` that no dispatch mode sees."""
    with _disable_current_modes():
        return torch.empty(nbytes, dtype=torch.uint8, device="meta")


def _host_memory(nbytes: int) -> Tensor:
    try:
        return torch.empty(nbytes, dtype=torch.uint8)
    except RuntimeError as error:
        raise RunError(
            Problem(f"cannot allocate {nbytes} bytes of host memory", "[memory]", MOVE_LESS, code="memory-host-full")
        ) from error


def _recorded(event: "torch.cuda.Event | Future[torch.cuda.Event]") -> torch.cuda.Event:
    return event if isinstance(event, torch.cuda.Event) else event.result()


def _parts(extents: Sequence[Extent], bytes_: Tensor, most: int) -> list[tuple[Extent, Tensor]]:
    """Pieces of at most `most` bytes of a file, and where each lies in `bytes_`."""
    parts, done = [], 0
    for extent in extents:
        for first in range(0, extent.nbytes, most):
            size = min(most, extent.nbytes - first)
            piece = Extent(extent.descriptor, extent.path, extent.offset + first, size)
            parts.append((piece, bytes_[done : done + size]))
            done += size
    return parts
