"""Simulated steps against schedules worked out by hand."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longtake.planner.events import NO_WORK, Compute, Copy, Item, Queue, Reached, Span, Timeline, Wait, Where, Work
from longtake.planner.hardware import DEVICES, GIGA, TERA, Device
from longtake.planner.timeline import seconds_of, simulate

HELD = (0,) * 8
ROUND = Device("round", "hopper", 0, TERA, TERA, GIGA, GIGA, GIGA, 1.0, 1.0, 1.0, 1.0, 1e-6, GIGA // 2)
"""A TFLOP, a GB of memory or over the bus, and two of the disk's are a second each."""
CPU = replace(ROUND, generation="cpu", copy_share=0.5)


def computing(seconds: float, label: str = "") -> Compute:
    return Compute(Work(matmul_flops=int(seconds * TERA)), label, HELD)


def copying(
    seconds: float, event: int, after: Sequence[int] = (), queue: Queue = "inward", where: Where = "host"
) -> Copy:
    return Copy(queue, int(seconds * GIGA), where, tuple(after), event, f"copy {event}")


def on(stream: str, items: Sequence[Item], device: Device = ROUND) -> list[tuple[float, float]]:
    return [(span.start, span.end) for span in simulate(items, device).spans if span.stream == stream]


def test_each_kind_of_work_goes_at_its_own_rate() -> None:
    device = replace(ROUND, fp32_flops=TERA / 2, matmul_efficiency=0.5, attention_efficiency=0.25, launch_seconds=0.0)
    device = replace(device, attention_backward_efficiency=0.2, bandwidth_efficiency=0.1)
    assert seconds_of(Work(matmul_flops=TERA), device) == pytest.approx(2)
    assert seconds_of(Work(fp32_matmul_flops=TERA), device) == pytest.approx(4)
    assert seconds_of(Work(attention_flops=TERA), device) == pytest.approx(4)
    assert seconds_of(Work(attention_backward_flops=TERA), device) == pytest.approx(5)
    assert seconds_of(Work(moved_bytes=GIGA), device) == pytest.approx(10)
    assert seconds_of(Work(TERA, TERA, TERA, TERA, GIGA), device) == pytest.approx(25)


def test_a_stretch_of_operators_takes_at_least_their_launches() -> None:
    assert seconds_of(Work(matmul_flops=TERA // 1000, calls=10_000), ROUND) == pytest.approx(0.01)
    assert seconds_of(Work(matmul_flops=TERA, calls=10_000), ROUND) == pytest.approx(1)
    assert seconds_of(NO_WORK, ROUND) == 0


def test_on_a_cpu_calls_cost_time_beside_their_work() -> None:
    assert seconds_of(Work(matmul_flops=TERA, calls=10_000), CPU) == pytest.approx(1.01)


def test_a_step_of_nothing_takes_no_time() -> None:
    assert simulate([], ROUND) == Timeline(0.0, 0.0, "compute", (), ())


def test_a_copy_that_ends_before_it_is_needed_costs_nothing() -> None:
    items = [copying(2, 1), computing(3, "first"), Wait(1), computing(1, "second")]
    found = simulate(items, ROUND)
    assert (found.seconds, found.stalled_seconds) == (4, 0)
    assert found.spans == (
        Span("inward", 0, 2, "copy 1"),
        Span("compute", 0, 3, "first"),
        Span("compute", 3, 4, "second"),
    )


def test_the_computation_waits_for_a_copy_that_is_late() -> None:
    found = simulate([copying(3, 1), computing(1), Wait(1), computing(1)], ROUND)
    assert (found.seconds, found.stalled_seconds) == (4, 2)
    assert Span("stall", 1, 3, "copy 1") in found.spans


def test_copies_of_a_queue_keep_their_order() -> None:
    items = [computing(2), Reached(1), copying(1, 2, after=[1]), copying(1, 3)]
    assert on("inward", items) == [(2, 3), (3, 4)]  # the second could have begun at once


def test_the_two_directions_do_not_wait_for_each_other() -> None:
    items = [copying(2, 1), copying(3, 2, queue="outward"), computing(1), Wait(1), Wait(2)]
    assert on("inward", items) == [(0, 2)]
    assert on("outward", items) == [(0, 3)]
    assert simulate(items, ROUND).seconds == 3


def test_where_only_one_direction_runs_at_a_time_copies_share_the_bus_in_order() -> None:
    items = [copying(2, 1), copying(3, 2, queue="outward"), copying(1, 3, queue="network", where="network")]
    device = replace(ROUND, duplex=False)
    assert on("outward", items, device) == [(2, 5)]
    assert on("network", items, device) == [(0, 1)]


def test_a_copy_begins_after_the_events_that_it_names() -> None:
    items = [computing(2), Reached(1), copying(1, 2, queue="outward"), copying(1, 3, after=[1, 2]), computing(5)]
    assert on("outward", items) == [(0, 1)]
    assert on("inward", items) == [(2, 3)]


def test_a_copy_waits_for_another_queues_copy() -> None:
    items = [copying(3, 1, queue="outward"), copying(1, 2, after=[1])]
    assert on("inward", items) == [(3, 4)]


def test_an_event_of_before_the_step_has_happened() -> None:
    assert simulate([copying(1, 5, after=[1]), Wait(2), computing(2)], ROUND).seconds == 2


def test_a_ring_of_two_blocks_stalls_by_what_a_copy_takes_longer_than_a_block() -> None:
    """Copies of 3 s, blocks of 2 s: the first copy, then one stall of a second for each later block."""
    items: list[Item] = [copying(3, 0), copying(3, 1)]
    for block in range(4):
        items += [Wait(block), computing(2), Reached(10 + block)]
        if block + 2 < 4:
            items.append(copying(3, block + 2, after=[10 + block]))
    found = simulate(items, ROUND)
    assert on("inward", items) == [(0, 3), (3, 6), (6, 9), (9, 12)]
    assert on("compute", items) == [(3, 5), (6, 8), (9, 11), (12, 14)]
    assert (found.seconds, found.stalled_seconds, found.bound_by) == (14, 6, "bus")


def test_a_disks_copy_goes_at_the_slower_of_disk_and_bus() -> None:
    assert on("inward", [copying(1, 1, where="disk")]) == [(0, 2)]
    assert on("inward", [copying(1, 1, where="disk")], replace(ROUND, disk_bytes_per_second=4 * GIGA)) == [(0, 1)]


def test_a_step_lasts_until_its_last_copy_has_ended() -> None:
    found = simulate([computing(1), Reached(1), copying(2, 2, after=[1], queue="outward")], ROUND)
    assert (found.seconds, found.stalled_seconds) == (3, 2)
    assert found.spans[-1] == Span("stall", 1, 3, "copy 2")


def test_memory_is_told_when_each_stretch_of_computation_begins() -> None:
    first, second = (1, *HELD[1:]), (2, *HELD[1:])
    items = [Compute(NO_WORK, "", first), copying(2, 1), Wait(1), Compute(Work(TERA), "", second)]
    assert simulate(items, ROUND).memory == ((0, first), (2, second))


def test_a_cpus_copy_begins_where_the_program_is_and_slows_the_computation() -> None:
    items = [computing(2), copying(1, 1), computing(2), Wait(1)]
    assert on("inward", items, CPU) == [(2, 3)]
    assert simulate(items, CPU).seconds == 4.5
    assert on("inward", items, ROUND) == [(0, 1)]
    assert simulate(items, ROUND).seconds == 4


@pytest.mark.parametrize(
    ("items", "bound_by"),
    [
        ([Compute(Work(2 * TERA, 0, 0, 0, GIGA), "", HELD)], "compute"),
        ([Compute(Work(TERA, 0, 0, 0, 2 * GIGA), "", HELD)], "memory"),
        ([Compute(Work(TERA // 10**6, calls=10), "", HELD)], "launches"),
        ([copying(1, 1), Wait(1), computing(1)], "bus"),
        ([copying(1, 1, where="disk"), Wait(1), computing(1)], "disk"),
        ([copying(1, 1, queue="network", where="network"), Wait(1), computing(1)], "network"),
        ([copying(0.1, 1), Wait(1), computing(1)], "compute"),  # a stall of 9 %
        ([copying(0.2, 1, where="disk"), Wait(1), copying(0.5, 2), Wait(2), computing(1)], "bus"),
    ],
)
def test_what_bounds_a_step_is_where_its_time_went(items: list[Item], bound_by: str) -> None:
    assert simulate(items, ROUND).bound_by == bound_by


def test_a_disk_faster_than_the_bus_is_not_what_bounds_the_step() -> None:
    items = [copying(1, 1, where="disk"), Wait(1), computing(1)]
    assert simulate(items, replace(ROUND, disk_bytes_per_second=2 * GIGA)).bound_by == "bus"


@st.composite
def steps(draw: st.DrawFn) -> list[Item]:
    """Any program: computation and copies of any size, each copy and wait for any earlier event."""
    items: list[Item] = []
    for event in range(draw(st.integers(1, 25))):
        earlier = st.integers(0, max(event - 1, 0))
        size = draw(st.integers(0, 10)) / 8  # exact in binary, and so are all sums
        kind = draw(st.sampled_from(["compute", "copy", "copy", "wait"]))
        if kind == "copy":
            queue = draw(st.sampled_from(["inward", "outward", "network"]))
            where = "network" if queue == "network" else draw(st.sampled_from(["host", "disk"]))
            items.append(copying(size, event, draw(st.lists(earlier, max_size=3)), queue, where))
        elif kind == "wait":
            items.append(Wait(draw(earlier)))
        else:
            items += [computing(size), Reached(event)]
    return items


devices = st.sampled_from([ROUND, CPU, replace(ROUND, duplex=False)])


@given(steps(), devices, st.data())
def test_a_faster_device_is_never_slower(items: list[Item], device: Device, data: st.DataObject) -> None:
    rates = ["tensor_flops", "host_bytes_per_second", "disk_bytes_per_second", "peer_bytes_per_second"]
    rate = data.draw(st.sampled_from(rates))
    faster = replace(device, **{rate: 2 * getattr(device, rate)})
    assert simulate(items, faster).seconds <= simulate(items, device).seconds


@given(steps(), devices)
def test_removing_a_copy_never_makes_a_step_slower(items: list[Item], device: Device) -> None:
    before = simulate(items, device).seconds
    for index, item in enumerate(items):
        if isinstance(item, Copy):
            assert simulate(items[:index] + items[index + 1 :], device).seconds <= before


@given(steps(), st.sampled_from([ROUND, replace(ROUND, duplex=False)]))
def test_a_step_takes_its_computation_and_at_most_all_its_copies_besides(items: list[Item], device: Device) -> None:
    found = simulate(items, device)
    computation = sum(seconds_of(item.work, device) for item in items if isinstance(item, Compute))
    disk = [item.nbytes / device.disk_bytes_per_second for item in items if isinstance(item, Copy)]
    assert computation <= found.seconds <= computation + sum(disk)
    assert found.seconds == computation + found.stalled_seconds


@given(steps(), devices)
def test_nothing_overlaps_on_a_stream(items: list[Item], device: Device) -> None:
    spans = simulate(items, device).spans
    for stream in ("inward", "outward", "network"):
        own = [span for span in spans if span.stream == stream]
        assert all(before.end <= after.start for before, after in pairwise(own))
    program = [span for span in spans if span.stream in ("compute", "stall")]
    assert all(before.end <= after.start for before, after in pairwise(program))


@pytest.mark.parametrize("name", [name for name in DEVICES if name != "cpu"])
def test_a_14b_step_on_every_card_is_bound_by_its_computation(name: str) -> None:
    """FLOPs and bytes of the T2V-14B's step at 18,480 tokens under checkpointing."""
    work = Work(1333 * TERA, 0, 575 * TERA, 719 * TERA, 3966 * GIGA, 16_698)
    found = simulate([Compute(work, "", HELD)], DEVICES[name])
    assert found.bound_by == "compute"
    assert 5 < found.seconds < 120
