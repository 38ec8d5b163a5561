"""Buffers: the protocol moves the right bytes under every schedule; what tiers take from host and disk, and leave."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import honest_ring
from honest_ring import MakeTier
from longtake.errors import RunError
from longtake.memory.copies import CpuCopies
from longtake.memory.host_buffers import (
    HostTier,
    computed,
    copy,
    disk_tier,
    extents_of,
    settle,
    use,
)
from race_checker import CheckedCopies

CPU = torch.device("cpu")
NBYTES = 64


@pytest.mark.parametrize("seed", range(40))
def test_the_protocol_moves_the_right_bytes_under_every_schedule_and_raises_nothing(
    tier_of: MakeTier, seed: int
) -> None:
    with CheckedCopies(seed).watching() as copies:
        found, wanted = honest_ring.run(copies, tier_of(copies), CPU, seed)
    assert len(found) == len(wanted) == honest_ring.STEPS
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("seed", range(5))
def test_the_protocol_moves_the_right_bytes_with_threads(tier_of: MakeTier, seed: int) -> None:
    copies = CpuCopies()
    found, wanted = honest_ring.run(copies, tier_of(copies), CPU, seed)
    copies.close()
    assert all(map(torch.equal, found, wanted))


def test_a_copy_over_what_the_computation_has_written_comes_after_it(tier_of: MakeTier) -> None:
    with CheckedCopies(0).watching() as copies:
        home, slot = tier_of(copies).take(64), computed(copies, torch.ones(16))
        copy(copies, "outward", home, slot)
        other = computed(copies, torch.zeros(16))
        copy(copies, "inward", other, home)
        assert (use(copies, other).view(torch.float32) == 1.0).all()
        settle(copies, slot)


def test_memory_is_filled_anew_only_after_copies_of_it_to_host_and_disk(tmp_path: Path) -> None:
    with CheckedCopies(0).watching() as copies, disk_tier(tmp_path, "test") as disk:
        host, slot = HostTier(copies), computed(copies, torch.ones(16))
        homes = [tier.take(64) for tier in (host, disk, host)]
        for home in homes:
            copy(copies, "outward", home, slot)
        copy(copies, "inward", slot, homes[0])
        assert (use(copies, slot).view(torch.float32) == 1.0).all()
        settle(copies, homes[1])
        settle(copies, homes[2])


def test_a_host_tier_allocates_exact_sizes_and_uses_what_comes_back() -> None:
    copies = CpuCopies()
    tier = HostTier(copies)
    first, other = tier.take(100), tier.take(101)
    assert [buffer._place.untyped_storage().nbytes() for buffer in (first, other)] == [100, 101]
    tier.give_back(first)
    assert tier.take(101) is not first
    assert tier.take(100) is first
    assert tier.take(100) is not first
    copies.close()


def test_a_disk_tier_writes_files_of_exact_sizes_and_uses_what_comes_back(tmp_path: Path) -> None:
    with disk_tier(tmp_path, "activations") as tier:
        first, _ = tier.take(100), tier.take(101)
        tier.give_back(first)
        assert tier.take(100) is first
        assert sorted(file.stat().st_size for file in tmp_path.rglob("*.bin")) == [100, 101]
        assert all(file.stat().st_blocks for file in tmp_path.rglob("*.bin")), "the disk's room is taken at once"
        (extent,) = extents_of(first)
        assert (extent.offset, extent.nbytes) == (0, 100)


def test_a_disk_without_room_is_an_error_that_says_so(tmp_path: Path) -> None:
    with disk_tier(tmp_path, "activations") as tier:
        most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, most[1]))
        try:
            with pytest.raises(RunError, match=r"0000\.bin: cannot offload 8192 bytes: File too large; make room"):
                tier.take(8192)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, most)
        assert tier.take(8192).nbytes == 8192


def test_a_folder_that_cannot_be_written_is_an_error_that_says_so(tmp_path: Path) -> None:
    with disk_tier(tmp_path, "activations") as tier:
        tier.folder.rmdir()
        with pytest.raises(RunError, match=r"cannot offload 100 bytes: No such file"):
            tier.take(100)


def test_a_disk_tier_leaves_no_file_and_no_descriptor(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    with disk_tier(scratch, "activations") as tier:
        copies = CpuCopies()
        honest_ring.run(copies, tier, CPU, 0)
        copies.close()
    assert not scratch.exists()
    assert not [entry for entry in Path("/proc/self/fd").iterdir() if os.path.realpath(entry).startswith(str(scratch))]


def test_a_copy_under_way_when_the_tier_ends_goes_to_no_other_file(tmp_path: Path) -> None:
    copies = CheckedCopies(0)
    with disk_tier(tmp_path / "scratch", "activations") as tier:
        home = tier.take(NBYTES)
        (extent,) = extents_of(home)
        copy(copies, "outward", home, computed(copies, torch.ones(NBYTES // 4)))
        tier.give_back(home)
        del home
    with open(tmp_path / "other", "w+b") as other:
        assert other.fileno() != extent.descriptor
        del extent
        copies.close()
        assert not os.fstat(other.fileno()).st_size


def test_a_disk_tier_removes_what_a_killed_run_left_and_nothing_else(tmp_path: Path) -> None:
    killed = (
        "import os, signal, sys; from pathlib import Path\n"
        "from longtake.memory.host_buffers import disk_tier\n"
        "with disk_tier(Path(sys.argv[1]), 'activations') as tier:\n"
        "    tier.take(100)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run([sys.executable, "-c", killed, str(tmp_path)], env=os.environ, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert len([*tmp_path.rglob("*.bin")]) == 1
    (tmp_path / "notes.txt").write_text("not ours")
    (tmp_path / "weights-1").mkdir()
    with disk_tier(tmp_path, "activations"):
        assert not [*tmp_path.rglob("*.bin")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "weights-1"]


def test_two_disk_tiers_of_one_folder_leave_each_other_theirs(tmp_path: Path) -> None:
    with disk_tier(tmp_path, "activations") as first:
        first.take(100)
        with disk_tier(tmp_path, "activations") as second:
            second.take(100)
            first.take(101)
            assert len([*tmp_path.rglob("*.bin")]) == 3
        assert len([*tmp_path.rglob("*.bin")]) == 2
