"""The copy engines of the CPU and of `meta`: order, failures, the throttle, and bytes in files."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longtake.errors import RunError
from longtake.memory.copies import CpuCopies, MetaCopies, Queue, copies_for
from longtake.memory.extents import Extent, read, write

MIB = 2**20
Open = Callable[[str, bytes], Extent]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    """Makes a file with some bytes; they are the extent."""
    descriptors = []

    def open_with(name: str, content: bytes) -> Extent:
        path = tmp_path / name
        path.write_bytes(content)
        descriptors.append(os.open(path, os.O_RDWR))
        return Extent(descriptors[-1], str(path), 0, len(content))

    yield open_with
    for descriptor in descriptors:
        os.close(descriptor)


@pytest.fixture
def copies() -> Iterator[CpuCopies]:
    """The engine of the CPU."""
    engine = CpuCopies()
    yield engine
    engine.close()


def filled(value: int, nbytes: int = 8) -> Tensor:
    """Bytes."""
    return torch.full((nbytes,), value, dtype=torch.uint8)


def bytes_of(tensor: Tensor) -> bytes:
    """What is in it."""
    return bytes(tensor.tolist())


def test_each_device_has_its_engine() -> None:
    engine = copies_for(torch.device("cpu"))
    assert isinstance(engine, CpuCopies)
    engine.close()
    assert isinstance(copies_for(torch.device("meta")), MetaCopies)


@pytest.mark.parametrize(("queue", "other"), [("inward", "outward"), ("outward", "inward")])
def test_a_queue_keeps_its_order_and_holds_the_other_one_up_only_where_it_waits(
    copies: CpuCopies, queue: Queue, other: Queue
) -> None:
    gate: Future[None] = Future()
    target = filled(0)
    first = copies.start(queue, target, filled(1), [gate])
    second = copies.start(queue, target, filled(2), [])
    copies.wait(copies.start(other, filled(0), filled(3), []))
    after = copies.start(other, filled(0), target, [second])
    assert not any(event.done() for event in (first, second, after))
    assert bytes_of(target) == bytes(8)
    gate.set_result(None)
    copies.wait(after)
    assert first.done()
    assert bytes_of(target) == bytes([2] * 8)


def test_the_computation_of_the_cpu_is_never_behind(copies: CpuCopies) -> None:
    target = filled(0)
    copies.wait(copies.reached())
    copies.wait(copies.start("inward", target, filled(1), [copies.reached(), None]))
    assert torch.equal(target, filled(1))


def test_a_failure_is_raised_as_it_is_where_its_copy_is_waited_for(copies: CpuCopies) -> None:
    failure, gate = OSError("it broke"), Future[None]()
    event = copies.start("outward", filled(0), filled(1), [gate])
    gate.set_exception(failure)
    with pytest.raises(OSError, match="it broke") as raised:
        copies.wait(event)
    assert raised.value is failure


def test_a_failure_is_passed_on_to_the_copies_that_come_after_it_and_to_no_others(copies: CpuCopies) -> None:
    descriptor = os.open("/dev/full", os.O_RDWR)
    full = (Extent(descriptor, "/dev/full", 0, 8),)
    outward = copies.start("outward", full, filled(1), [])
    inward = copies.start("inward", filled(0), filled(2), [outward])
    another = copies.start("outward", filled(0), filled(1), [])
    for event in (outward, inward):
        with pytest.raises(RunError, match="/dev/full: cannot offload 8 bytes: No space left on device; make room"):
            copies.wait(event)
    copies.wait(another)
    os.close(descriptor)


def test_closing_ends_the_threads_when_all_copies_are_done(opened: Open) -> None:
    engine, file = CpuCopies(), opened("file", bytes(8))
    target = filled(0)
    outward = engine.start("outward", (file,), filled(9), [])
    engine.start("inward", target, (file,), [outward])
    engine.close()
    assert bytes_of(target) == bytes([9] * 8)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("copies-")]


def test_the_throttle_takes_the_time_that_it_says_for_files_and_none_for_memory(opened: Open) -> None:
    engine, file, memory = (
        CpuCopies(disk_bytes_per_second=10.0 * MIB),
        opened("file", bytes(2 * MIB)),
        filled(7, 2 * MIB),
    )

    def seconds(queue: Queue, target: Any, source: Any) -> float:
        began = time.monotonic()
        engine.wait(engine.start(queue, target, source, []))
        return time.monotonic() - began

    unlimited = seconds("inward", filled(0, 2 * MIB), memory)
    outward, inward = seconds("outward", (file,), memory), seconds("inward", memory, (file,))
    engine.close()
    assert 0.2 <= outward < 0.4
    assert 0.2 <= inward < 0.4
    assert unlimited < 0.1


def test_host_memory_of_the_cpu_has_the_size_that_was_asked_for(copies: CpuCopies) -> None:
    assert copies.host(12345).untyped_storage().nbytes() == 12345


def test_host_memory_that_the_machine_does_not_have_is_an_error_that_says_so(copies: CpuCopies) -> None:
    with pytest.raises(
        RunError, match=rf"\[memory\]: cannot allocate {2**50} bytes of host memory; free host memory, or"
    ):
        copies.host(2**50)


def test_bytes_are_read_from_parts_of_several_files_one_after_the_other(opened: Open) -> None:
    first, second = opened("first", bytes(range(10))), opened("second", bytes(range(100, 120)))
    parts = (
        Extent(first.descriptor, first.path, 3, 4),
        Extent(second.descriptor, second.path, 0, 0),
        Extent(second.descriptor, second.path, 18, 2),
        Extent(first.descriptor, first.path, 0, 1),
    )
    target = filled(255, 7)
    read(target, parts)
    assert [*bytes_of(target)] == [3, 4, 5, 6, 118, 119, 0]


def test_bytes_are_written_to_parts_of_several_files_and_nowhere_else(opened: Open, tmp_path: Path) -> None:
    first, second = opened("first", bytes(6)), opened("second", bytes(4))
    parts = (Extent(first.descriptor, first.path, 2, 3), Extent(second.descriptor, second.path, 1, 2))
    write(parts, torch.arange(1, 6, dtype=torch.uint8))
    assert (tmp_path / "first").read_bytes() == bytes([0, 0, 1, 2, 3, 0])
    assert (tmp_path / "second").read_bytes() == bytes([0, 4, 5, 0])


def test_a_file_that_ends_early_is_an_error_that_names_it(copies: CpuCopies, opened: Open) -> None:
    file = opened("weights.safetensors", bytes(10))
    os.truncate(file.path, 9)
    event = copies.start("inward", filled(0, 10), (file,), [])
    with pytest.raises(RunError, match=r"weights\.safetensors: the file ended early"):
        copies.wait(event)


class _Sizes(TorchDispatchMode):
    """Bytes of each tensor that an operator makes, as a tracer sees them."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.made.append(result.untyped_storage().nbytes())
        return result


def test_on_meta_host_bytes_are_counted_and_hidden_from_a_tracer() -> None:
    engine = MetaCopies()
    with _Sizes() as tracer:
        on_device = torch.empty(100, dtype=torch.uint8, device="meta")
        on_host = engine.host(1000)
        engine.wait(engine.start("outward", on_host, on_device, [engine.reached()]))
        engine.host(24)
    engine.close()
    assert tracer.made == [100]
    assert engine.host_bytes == 1024
    assert on_host.nbytes == 1000
    assert on_host.is_meta
