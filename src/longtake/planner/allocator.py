"""What a step's allocations make PyTorch's CUDA caching allocator reserve, and what a process takes besides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from longtake.planner.segments import (
    ADDRESS,
    BITS,
    MIN_BLOCK_BYTES,
    NO_BLOCK,
    SMALL,
    ExpandableSegment,
    Pool,
    Segments,
    segment_size,
)

_MIB = 1 << 20
CONTEXT_BYTES: Mapping[str, int] = {
    "ampere": 512 * _MIB,
    "ada": 640 * _MIB,
    "hopper": 640 * _MIB,
    "blackwell": 768 * _MIB,
}
"""CUDA's context with the kernels that training loads into it, by generation of GPU. An estimate, not measured by us.

Bare contexts were reported as 256 MiB on an RTX 3090 (invoke-ai/InvokeAI#9413, torch 2.7) and 426 MiB on an RTX
6000 Ada (unslothai/unsloth-zoo#1053, torch 2.10): 3 MiB for each of their 82 and 142 multiprocessors. To
that, for the largest GPU of a generation (108, 142, 132 and 188), we add some 200 MiB for kernels, which is assumed.
A100s with the communicator of two ranks besides were seen at 789 MiB (meta-pytorch/torchrec#3580), H100s
with that of eight at 1.06 GB (NVIDIA/nccl#1685).
"""
CUBLAS_WORKSPACE_BYTES: Mapping[str, int] = {
    "ampere": 2 * 4096 * 1024 + 8 * 16 * 1024,
    "ada": 2 * 4096 * 1024 + 8 * 16 * 1024,
    "hopper": 32 * _MIB,
    "blackwell": 32 * _MIB,
}
"""What a thread's first matrix product allocates and never frees (`:4096:2:16:8`, 8.1 MiB), by generation of GPU.

It comes from the caching allocator, so that a trace should have it, once for the thread of the forward pass and once
for autograd's: handles are a thread's own. aten/src/ATen/cuda/CublasHandlePool.cpp, `parseChosenWorkspaceSize` and
`getCurrentCUDABlasHandle`. Blackwell's was 8.1 MiB in older releases, and those give cuBLASLt 1 MiB of its own.
"""
_COMMUNICATOR_BYTES = (544 * _MIB, 688 * _MIB)
_CHANNELS = 32
_PEER_CHANNEL_BYTES = 14 * _MIB


@dataclass(frozen=True)
class Replayed:
    """What the allocator did, as `torch.cuda.memory_stats` would say.

    `reserved_bytes` is the greatest number of bytes in segments (of mapped pages, if they are expandable), and
    `allocated_bytes` in blocks in use, which may be larger than what was asked for. `out_of_memory` is the index of the
    event that found no room under the limit, after which nothing was replayed, None where all did. `releases` says how
    often cached segments were given back to go on (`num_alloc_retries`), that event included.
    """

    reserved_bytes: int
    allocated_bytes: int
    out_of_memory: int | None
    releases: int


def replay(events: Sequence[tuple[int, int]], expandable: bool, limit: int | None = None) -> Replayed:
    """Replays allocations on one stream; `expandable` is PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True.

    An event is (identity, nbytes): a storage of `nbytes` bytes, not rounded, is allocated, or freed where it is -1. An
    identity may be used again once it is freed; a storage of 0 bytes takes nothing. `limit` is what segments may take
    in all, in bytes: the memory that is free beside the context, or
    `torch.cuda.set_per_process_memory_fraction`, which refuses as this does, but lets the last page of an expandable
    segment go beyond it.

    Replay several steps: a second one may reserve more than the first, since it finds other segments cached.
    """
    driver = _Driver(expandable, limit)
    small, large = driver.small.free, driver.large.free
    live: dict[int, int] = {}
    allocated = peak = 0
    for index, (identity, nbytes) in enumerate(events):
        if nbytes < 0:
            block = live.pop(identity)
            size = block >> BITS
            if size:
                allocated -= size
                (small if size <= SMALL else large).give(block & ADDRESS, size)
            continue
        assert identity not in live, "a storage is allocated twice"
        block = 0
        if nbytes:
            size = -(-nbytes // MIN_BLOCK_BYTES)
            block = (small if size <= SMALL else large).take(size)
            if block == NO_BLOCK and (block := driver.block(size)) == NO_BLOCK:
                return driver.replayed(peak, index)
            allocated += block >> BITS
            if allocated > peak:
                peak = allocated
        live[identity] = block
    return driver.replayed(peak, None)


def overhead_bytes(gpu_generation: str, ranks: int, all_to_all: bool = False) -> int:
    """What a process takes on its GPU outside of the allocator: CUDA's context, and one communicator of NCCL.

    `gpu_generation` is a key of CONTEXT_BYTES. Data, sequence and sharded parallelism have a communicator each.
    """
    return CONTEXT_BYTES[gpu_generation] + nccl_bytes(ranks, all_to_all)


def nccl_bytes(ranks: int, all_to_all: bool = False) -> int:
    """What a communicator of NCCL takes on each of its GPUs, outside of the allocator. Uncertain by a factor of two.

    For rings and trees it is what was measured on A100s with NVLink, 544 MiB for two ranks and 688 MiB for four
    (NVIDIA/nccl#964); beyond a second node it no longer grows (NVIDIA/nccl#986). A channel has 9.2 MiB of buffers for
    a peer to write to (src/init.cc, `computeBuffSizes`: 512 KiB, 4800 KiB and NCCL_BUFFSIZE, 4 MiB, for its three
    protocols), so that GPUs on PCIe, with few channels, take much less.

    `all_to_all`, which sequence parallelism with Ulysses uses, connects each pair of ranks by 32 channels where NVLink
    joins them all. 14 MiB of buffers for each of them make up the 3.3 GB measured on 8 H100s (NVIDIA/nccl#1685).
    """
    if ranks < 2:
        return 0
    connected = _COMMUNICATOR_BYTES[ranks > 2]
    return connected + (ranks - 1) * _CHANNELS * _PEER_CHANNEL_BYTES if all_to_all else connected


class _Driver:
    """Gives the two pools memory, and keeps the account."""

    def __init__(self, expandable: bool, limit: int | None) -> None:
        kind = ExpandableSegment if expandable else Segments
        self.small: Pool = kind(small=True)
        self.large: Pool = kind(small=False)
        self.limit = ADDRESS if limit is None else limit // MIN_BLOCK_BYTES
        self.peak = 0
        self.releases = 0

    def block(self, size: int) -> int:
        """A block of `size` granules that no free one has room for, or NO_BLOCK (`DeviceCachingAllocator::malloc`)."""
        block = self._grown(size)
        if block == NO_BLOCK:
            self.releases += 1
            self.large.release()
            self.small.release()
            block = self._grown(size)
        return block

    def replayed(self, allocated: int, out_of_memory: int | None) -> Replayed:
        """The account."""
        return Replayed(self.peak * MIN_BLOCK_BYTES, allocated * MIN_BLOCK_BYTES, out_of_memory, self.releases)

    def _grown(self, size: int) -> int:
        """A limit is compared with a whole segment, also where an expandable one needs only a part (`alloc_block`)."""
        room = self.limit - self._reserved()
        if segment_size(size) > room:
            return NO_BLOCK
        block = (self.small if size <= SMALL else self.large).grow(size, room)
        self.peak = max(self.peak, self._reserved())
        return block

    def _reserved(self) -> int:
        return self.small.reserved + self.large.reserved
