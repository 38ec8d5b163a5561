"""How long a step takes on a device: its computation and its copies, each on a stream of its own. Needs no torch.

The model is a schedule without choices: the computation runs in its order, the copies of a queue run in theirs, and all
wait for events alone. So no time falls when a cost rises or a copy is added. What it says of the parts:

* Kernels run one after another; each kind of work goes at the rate that the device reaches for it, and a stretch of
  them takes at least the program's time for its calls. On a CPU, where the program does the work, that time adds up.
* A copy from or to a disk passes the bus as well and goes at the slower one's rate. Reading and writing do not slow
  each other down, and no copy slows a GPU's computation: it has engines for them.
* Where a device cannot copy both ways at once, all copies share the bus in the order of the program.
* A CPU's copies are made by threads that want the computation's cores and memory: beside its own time a copy adds
  `copy_share` of it to the computation. The program does not run ahead there: no copy begins before it is listed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from longtake.planner.events import Compute, Copy, Counts, Item, Reached, Span, Timeline, Wait, Work
from longtake.planner.hardware import Device

STALLS_THAT_COUNT = 0.1
"""Share of a step that waits for copies, from which on it is their link that would have to be faster."""
LINKS = {"host": "bus", "disk": "disk", "network": "network"}


def seconds_of(work: Work, device: Device) -> float:
    """How long operators take: the sum over the kinds of work, and at least a launch for each call."""
    return sum(_cost(work, device))


def simulate(items: Iterable[Item], device: Device) -> Timeline:
    """The step that `items` list in the order of the program; it ends with the last of computation and copies.

    Events that none of them reaches are taken for earlier than the step.
    """
    step = _Step(device)
    happen: dict[type, Callable[[Any], None]]
    happen = {Compute: step.compute, Copy: step.copy, Reached: step.reached, Wait: step.wait}
    for item in items:
        happen[type(item)](item)
    return step.ended_with_copies()


class _Cost(NamedTuple):
    """Seconds of a stretch of operators, by what bounds them."""

    compute: float
    memory: float
    launches: float


def _cost(work: Work, device: Device) -> _Cost:
    computing = (
        (work.matmul_flops / device.tensor_flops + work.fp32_matmul_flops / device.fp32_flops)
        / device.matmul_efficiency
        + work.attention_flops / (device.tensor_flops * device.attention_efficiency)
        + work.attention_backward_flops / (device.tensor_flops * device.attention_backward_efficiency)
    )
    moving = work.moved_bytes / (device.memory_bytes_per_second * device.bandwidth_efficiency)
    launching = work.calls * device.launch_seconds
    if device.generation == "cpu":
        return _Cost(computing, moving, launching)
    return _Cost(computing, moving, 0.0) if launching <= computing + moving else _Cost(0.0, 0.0, launching)


class _Step:
    """The clocks of the streams, in seconds from the step's start, and what has happened on them."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.now = 0.0
        self.free = {"inward": 0.0, "outward": 0.0, "network": 0.0}
        self.ended: dict[int, float] = {}
        self.copies: dict[int, Copy] = {}
        self.costs: dict[Work, tuple[_Cost, float]] = {}
        self.spent = dict.fromkeys((*_Cost._fields, *LINKS.values()), 0.0)
        self.spans: list[Span] = []
        self.memory: list[tuple[float, Counts]] = []
        host, disk = device.host_bytes_per_second, device.disk_bytes_per_second
        self.rates = {"host": host, "disk": min(disk, host), "network": device.peer_bytes_per_second}

    def compute(self, item: Compute) -> None:
        work, start, spent = item.work, self.now, self.spent
        if work not in self.costs:
            cost = _cost(work, self.device)
            self.costs[work] = cost, sum(cost)
        cost, seconds = self.costs[work]
        spent["compute"] += cost.compute
        spent["memory"] += cost.memory
        spent["launches"] += cost.launches
        self.now = start + seconds
        self.memory.append((start, item.held))
        self.spans.append(Span("compute", start, self.now, item.label))

    def copy(self, item: Copy) -> None:
        start = self.free[item.queue]
        for event in item.after:
            start = max(start, self.ended.get(event, 0.0))
        if not self.device.duplex and item.where != "network":
            start = max(start, self.free["inward"], self.free["outward"])
        if self.device.generation == "cpu":
            start = max(start, self.now)
            self._slow_down(item.nbytes)
        end = start + item.nbytes / self.rates[item.where]
        self.free[item.queue] = self.ended[item.event] = end
        self.copies[item.event] = item
        self.spans.append(Span(item.queue, start, end, item.label))

    def _slow_down(self, nbytes: int) -> None:
        """The computation, by a copy that takes cores and bandwidth from it."""
        seconds = self.device.copy_share * nbytes / self.device.host_bytes_per_second
        self.now += seconds
        self.spent["memory"] += seconds

    def reached(self, item: Reached) -> None:
        self.ended[item.event] = self.now

    def wait(self, item: Wait) -> None:
        end = self.ended.get(item.event, 0.0)
        if end > self.now:
            self._stall(self.copies[item.event], end)

    def _stall(self, copy: Copy, end: float) -> None:
        self.spent[self._link(copy)] += end - self.now
        self.spans.append(Span("stall", self.now, end, copy.label))
        self.now = end

    def _link(self, copy: Copy) -> str:
        """What would have to be faster for `copy` to be."""
        of_bus = self.rates[copy.where] >= self.rates["host"] and copy.where != "network"
        return "bus" if of_bus else LINKS[copy.where]

    def ended_with_copies(self) -> Timeline:
        """The step, with a wait for the copies that end after the computation."""
        last = max(self.copies.values(), key=lambda copy: self.ended[copy.event], default=None)
        if last is not None and self.ended[last.event] > self.now:
            self._stall(last, self.ended[last.event])
        stalled = sum(self.spent[link] for link in LINKS.values())
        among = LINKS.values() if stalled > STALLS_THAT_COUNT * self.now else _Cost._fields
        bound_by = max(among, key=lambda name: self.spent[name])
        return Timeline(self.now, stalled, bound_by, tuple(self.spans), tuple(self.memory))
