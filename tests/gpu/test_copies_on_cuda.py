"""The copy engine of CUDA; skipped without a device."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

import honest_ring
from longtake.errors import RunError
from longtake.memory.copies import STAGING_BYTES, Copies, CudaCopies, copies_for
from longtake.memory.extents import Extent
from longtake.memory.host_buffers import (
    Buffer,
    HostTier,
    Tier,
    allocate,
    computed,
    copy,
    disk_tier,
    settle,
    use,
)

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
LONG_KERNEL_CYCLES = 4_000_000_000  # two seconds or more
MIB = 2**20
MakeTier = Callable[[Copies], Tier]


@pytest.fixture
def copies() -> Iterator[CudaCopies]:
    """The engine of the current device."""
    engine = copies_for(torch.device("cuda", torch.cuda.current_device()))
    assert isinstance(engine, CudaCopies)
    yield engine
    engine.close()


@pytest.fixture(params=["host", "disk"])
def tier_of(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MakeTier]:
    """Makes a tier for an engine."""
    with disk_tier(tmp_path / "scratch", "test") as disk:
        yield HostTier if request.param == "host" else lambda copies: disk


def ended(event: Any) -> None:
    """Waits in the program, not on the device, for a copy."""
    (event.result() if isinstance(event, Future) else event).synchronize()


@pytest.mark.parametrize("seed", range(20))
def test_the_protocol_moves_the_right_bytes(copies: CudaCopies, tier_of: MakeTier, seed: int) -> None:
    found, wanted = honest_ring.run(copies, tier_of(copies), CUDA, seed)
    assert all(torch.equal(came.cpu(), right) for came, right in zip(found, wanted, strict=True))


def test_host_memory_is_pinned_at_its_exact_size_and_given_back() -> None:
    copies = CudaCopies(CUDA)
    sizes = [1, 4097, 3 * MIB + 5]
    memories = [copies.host(nbytes) for nbytes in sizes]
    assert [memory.untyped_storage().nbytes() for memory in memories] == sizes
    assert all(memory.is_pinned() for memory in memories)
    assert copies.host(0).nbytes == 0
    copies.close()
    assert not any(memory.is_pinned() for memory in memories)


def test_host_memory_that_the_machine_does_not_have_is_an_error_that_says_so(copies: CudaCopies) -> None:
    with pytest.raises(RunError, match=rf"\[memory\]: cannot allocate {2**50} bytes of host memory"):
        copies.host(2**50)


def test_a_copy_waits_for_the_kernel_that_writes_its_source(copies: CudaCopies, tier_of: MakeTier) -> None:
    tier = tier_of(copies)
    torch.cuda._sleep(LONG_KERNEL_CYCLES // 10)
    source, home = computed(copies, torch.arange(MIB, device=CUDA) * 3), tier.take(8 * MIB)
    copy(copies, "outward", home, source)
    slot = allocate(copies, 8 * MIB, CUDA)
    copy(copies, "inward", slot, home)
    came = use(copies, slot).view(torch.int64).clone()
    settle(copies, source)
    assert torch.equal(came.cpu(), torch.arange(MIB) * 3)


def test_copies_both_ways_overlap_with_a_long_kernel(copies: CudaCopies, tier_of: MakeTier) -> None:
    tier = tier_of(copies)
    nbytes, count = 4 * MIB, 20
    sources = [computed(copies, torch.full((nbytes,), index, dtype=torch.uint8, device=CUDA)) for index in range(count)]
    homes, slots = [tier.take(nbytes) for _ in range(count)], [allocate(copies, nbytes, CUDA) for _ in range(count)]

    def there_and_back(first: int, last: int) -> None:
        for index in range(first, last):
            copy(copies, "outward", homes[index], sources[index])
            copy(copies, "inward", slots[index], homes[index])
        for slot in slots[first:last]:
            ended(slot._written)

    there_and_back(0, 1)  # pins the staging memory, for which the driver may wait for all kernels
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG_KERNEL_CYCLES)
    kernel = copies.reached()
    there_and_back(1, count)
    assert not kernel.query(), "the copies ended only after the kernel"
    assert [int(use(copies, slot)[-1]) for slot in slots] == list(range(count))
    for source in sources:
        settle(copies, source)


def test_a_file_larger_than_the_staging_memory_goes_and_comes_whole(copies: CudaCopies, tmp_path: Path) -> None:
    nbytes = 2 * STAGING_BYTES + 4 * 1001
    values = torch.arange(nbytes // 4, dtype=torch.int32, device=CUDA)
    with disk_tier(tmp_path, "test") as tier:
        source, home, slot = computed(copies, values), tier.take(nbytes), allocate(copies, nbytes, CUDA)
        copy(copies, "outward", home, source)
        copy(copies, "inward", slot, home)
        assert torch.equal(use(copies, slot).view(torch.int32), values)
        settle(copies, source)


def test_a_full_disk_is_told_where_the_copy_is_waited_for(copies: CudaCopies) -> None:
    descriptor = os.open("/dev/full", os.O_RDWR)
    full = Buffer((Extent(descriptor, "/dev/full", 0, 64),))
    copy(copies, "outward", full, computed(copies, torch.ones(16, device=CUDA)))
    with pytest.raises(RunError, match="/dev/full: cannot offload 64 bytes: No space left on device"):
        settle(copies, full)
    os.close(descriptor)
