"""A copy engine for the CPU that runs copies as late as it may, and raises where a wait is missing.

    with CheckedCopies(seed).watching() as copies, apply(..., copies=copies):
        step()

Who comes after whom is known from vector clocks (Flanagan and Freund, FastTrack, PLDI 2009), not from what happened to
run first: a fault shows on every run. What is told is what CUDA would be told: a copy does not come after the
computation because it was queued later, only because it waits for a point of it. Host memory is the exception: there
the program's own reads and writes end before it goes on, so a copy that is queued later comes after them. That the
program must also wait for the device before it reads host memory cannot be seen here.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from late_copies import LateCopy, LateQueues, identity, raw
from longtake.memory.copies import Event, Place, Queue
from longtake.memory.extents import Extent
from shadow_memory import Access, Memories, Memory, Race, Span, Unread

__all__ = ["CheckedCopies", "Race", "Unread"]

COMPUTATION, PROGRAM = 0, 1  # the program: what is computed on host memory
TIMELINES = {("inward", False): 2, ("inward", True): 3, ("outward", False): 4, ("outward", True): 5}
"""Copies that touch files go through a thread on CUDA, so that others of the same queue may overtake them."""
SHAPES_ONLY = {
    *("_unsafe_view", "unsafe_split", "set_", "resize_", "is_same_size"),
    *(f"{name}_like" for name in ("empty", "zeros", "ones", "full", "rand", "randn", "randint")),
    *(f"new_{name}" for name in ("empty", "empty_strided", "zeros", "ones", "full")),
}
"""Operators that read nothing of their arguments but shapes, and are no views by their schema."""


@dataclass(frozen=True)
class Point:
    """What an event stands for: all that comes before it."""

    clock: tuple[int, ...]
    copy: LateCopy | None = None


class CheckedCopies:
    """`Copies` for tensors on the CPU and files; with seed 0 each copy runs only when it is waited for.

    Other seeds run some of them earlier. What a copy fills is garbage from when it is queued until it ran. `start` and
    what is computed inside `watching` raise Race, and Unread where something that was fetched is overwritten; `close`
    raises Unread where more than `ahead` fetched buffers were never read: those of a step that did not come.
    """

    def __init__(self, seed: int, ahead: int = 0) -> None:
        self.late, self.ahead = LateQueues(seed), ahead
        self.now = [0] * 6
        self.clocks = {timeline: [0] * 6 for timeline in TIMELINES.values()}
        self.memories = Memories()
        self.files: dict[tuple[int, int], Memory] = {}
        self.written: dict[int, int] = {}  # when the computation last wrote the storage at an address
        self.unread: list[Access] = []  # in memory that is gone
        self.count = 0

    @contextmanager
    def watching(self) -> Iterator["CheckedCopies"]:
        """What is computed in the context is known, backward passes too; closes at the end."""
        with _Watch(self):
            yield self
        self.close()

    def start(self, queue: Queue, target: Place, source: Place, after: Sequence[Event]) -> Event:
        """Queues the copy; raises Race where it may run too early, Unread where it overwrites what nobody read."""
        self.let_go()
        timeline = TIMELINES[queue, isinstance(target, tuple) or isinstance(source, tuple)]
        clock = self.clocks[timeline]
        for event in after:
            _join(clock, event.clock)
        clock[PROGRAM] = self.now[PROGRAM]
        clock[timeline] += 1
        self.count += 1
        spans = self._spans(target, queue == "inward"), self._spans(source, queue == "outward")
        into, out_of = (sum(span.nbytes for span in part) for part in spans)
        assert into == out_of, f"a copy of {out_of} bytes to {into}"
        earlier = [event.copy for event in after if event.copy is not None]
        copy = LateCopy(self.count, queue, timeline, (raw(target), raw(source)), spans, earlier)
        self._record(copy, clock)
        self.late.add(copy)
        self.late.run_some()
        return Point(tuple(clock), copy)

    def reached(self) -> Event:
        """The computation up to now."""
        self.let_go()
        self.late.run_some()
        return Point(tuple(self.now))

    def wait(self, event: Event) -> None:
        """Runs the copy, and what it comes after, if they have not run."""
        if event is None:
            return
        self.late.run_some()
        _join(self.now, event.clock)
        if event.copy is not None:
            self.late.run(event.copy)
            if event.copy.error is not None:
                raise event.copy.error
        self.let_go()

    def host(self, nbytes: int) -> Tensor:
        """Plain memory, known as the host's."""
        with _disable_current_modes():
            memory = torch.empty(nbytes, dtype=torch.uint8)
        self._spans(memory, on_device=False)
        return memory

    def close(self) -> None:
        """Runs what is queued. Unread is not raised while another exception is on its way."""
        self.late.run_all()
        for clock in self.clocks.values():
            _join(self.now, clock)
        self.let_go()
        unread = self.unread + [fill for memory in self.memories.all for fill in memory.unread]
        self.memories.clear()
        self.files.clear()
        self.unread = []
        if len(unread) > self.ahead and sys.exc_info()[0] is None:
            raise Unread("the computation never read the results of " + ", ".join(str(fill.by) for fill in unread))

    def computes(self, tensor: Tensor, writes: bool, operator: object) -> None:
        """The computation reads or writes `tensor`."""
        found, nbytes = self.memories.find(tensor.data_ptr()), _extent_in_bytes(tensor)
        if found is None or not nbytes:
            return
        memory, first = found
        timeline = COMPUTATION if memory.on_device else PROGRAM
        access = Access(first, first + nbytes, timeline, self.now[timeline], writes, f"the computation's {operator}")
        memory.check(access, self.now)
        memory.add(access)
        if memory.unread:
            memory.unread = [fill for fill in memory.unread if not fill.overlaps(access)]

    def tick(self) -> None:
        """The computation goes on."""
        self.now[COMPUTATION] += 1
        self.now[PROGRAM] += 1
        self.let_go()

    def writes(self, result: Tensor) -> None:
        """The computation has made or changed `result`; its memory may take part in a copy later."""
        start = result.data_ptr() - result.storage_offset() * result.element_size()
        self.written[int(start)] = self.now[COMPUTATION]

    def let_go(self) -> None:
        """Forgets memory that nobody else holds; raises Race where a copy may still fill it."""
        for memory in [memory for memory in self.memories.all if memory.gone()]:
            memory.give_back(self.now)
            if not any(span.memory is memory for copy in self.late.pending() for part in copy.spans for span in part):
                self.unread += memory.unread
                self.memories.remove(memory)

    def _record(self, copy: LateCopy, clock: Sequence[int]) -> None:
        """Notes what a copy reads and writes."""

        def access(span: Span, results: list[Access] | None) -> tuple[Memory, Access]:
            end, tick = span.first + span.nbytes, clock[copy.timeline]
            return span.memory, Access(span.first, end, copy.timeline, tick, results is None, copy, results or ())

        written = [access(span, None) for span in copy.spans[0]]
        read = [access(span, [result for _, result in written]) for span in copy.spans[1]]
        fetches = copy.direction == "inward"
        for memory, new in (*written, *read):
            memory.check(new, clock, fills=fetches and new.writes)
        for memory, new in (*written, *read):
            memory.add(new, fills=fetches and new.writes)

    def _spans(self, place: Place, on_device: bool) -> tuple[Span, ...]:
        """The memories that a place lies in; a storage that is not known yet is `on_device` or not."""
        if isinstance(place, tuple):
            return tuple(Span(self._file(extent), extent.offset, extent.nbytes) for extent in place if extent.nbytes)
        if not place.nbytes:
            return ()
        found = self.memories.find(place.data_ptr())
        if found is None:
            storage = place.untyped_storage()
            memory = self.memories.add(storage, on_device)
            if on_device:
                tick = self.written.get(storage.data_ptr(), 0)
                memory.accesses = [Access(0, storage.nbytes(), COMPUTATION, tick, True, "the computation")]
            found = memory, place.data_ptr() - storage.data_ptr()
        return (Span(*found, place.nbytes),)

    def _file(self, extent: Extent) -> Memory:
        return self.files.setdefault(identity(extent), Memory(extent.path))


class _Watch(TorchDispatchMode):
    """Tells what each operator reads and writes; of a tensor subclass, the operators on its inner tensors."""

    def __init__(self, checked: CheckedCopies) -> None:
        super().__init__()
        self.checked = checked
        self.written: dict[Any, tuple[bool, frozenset[int | str]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind not in (Tensor, nn.Parameter) for kind in types):
            return NotImplemented
        kwargs, checked = kwargs or {}, self.checked
        if func not in self.written:
            self.written[func] = _written_arguments(func)
        looks, written = self.written[func]
        if getattr(func, "is_view", False):
            return func(*args, **kwargs)
        checked.tick()
        for name, value in (*enumerate(args), *kwargs.items()):
            for tensor in _tensors(value) if name in written or not looks else ():
                checked.computes(tensor, name in written, func)
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            checked.writes(tensor)
        return result


def _written_arguments(func: Any) -> tuple[bool, frozenset[int | str]]:
    """Whether an operator reads nothing but shapes, and which arguments it writes, by position and by name."""
    schema = getattr(func, "_schema", None)
    if schema is None:
        return False, frozenset()
    written = [(index, a.name) for index, a in enumerate(schema.arguments) if a.alias_info and a.alias_info.is_write]
    looks = schema.name.split("::")[-1] in SHAPES_ONLY
    return looks, frozenset(() if looks else (key for pair in written for key in pair))


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors with memory of the CPU in an argument."""
    for item in value if isinstance(value, list | tuple) else (value,):
        if isinstance(item, Tensor) and item.device.type == "cpu" and item.layout is torch.strided:
            yield item


def _extent_in_bytes(tensor: Tensor) -> int:
    """Bytes from the first to the last element."""
    if not tensor.numel():
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _join(clock: list[int], other: Sequence[int]) -> None:
    clock[:] = map(max, clock, other)
