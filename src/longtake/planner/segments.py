"""Segments that PyTorch's CUDA caching allocator takes from the driver, and the free blocks in them. Needs no torch.

The rules are those of c10/cuda/CUDACachingAllocator.cpp, class `DeviceCachingAllocator`, in torch 2.10 to 2.13 with the
default settings (no `max_split_size_mb`, no `garbage_collection_threshold`, no `roundup_power2_divisions`), one stream
and no CUDA graphs. Sizes and addresses in here are in granules of MIN_BLOCK_BYTES: all are multiples, and it is faster.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import Protocol

MIN_BLOCK_BYTES = 512
"""`kMinBlockSize`, c10/core/AllocatorConfig.h; sizes are rounded up to it in `round_size`."""
SMALL_BYTES = 1 << 20
"""`kSmallSize`, c10/core/AllocatorConfig.h: the largest block of the small pool (`get_pool`)."""
SMALL_SEGMENT_BYTES = 2 << 20
"""`kSmallBuffer`, c10/core/AllocatorConfig.h: a segment of the small pool (`get_allocation_size`), and a page of its
expandable segment (`find_expandable_block`)."""
LARGE_SEGMENT_BYTES = 20 << 20
"""`large_segment_size_`, c10/core/AllocatorConfig.h: the segment for blocks of more than SMALL_BYTES and less than
MIN_LARGE_BYTES (`get_allocation_size`), and a page of the large pool's expandable segment (`find_expandable_block`)."""
MIN_LARGE_BYTES = 10 << 20
"""`kMinLargeAlloc`, c10/core/AllocatorConfig.h: from here on a block that finds no room gets a segment of its own."""
ROUND_LARGE_BYTES = 2 << 20
"""`kRoundLarge`, c10/core/AllocatorConfig.h: what such a segment is rounded up to."""

SMALL = SMALL_BYTES // MIN_BLOCK_BYTES
BITS = 40
"""A block is one integer, its size above its address: they sort by size, then by address (`BlockComparatorSize`)."""
ADDRESS = (1 << BITS) - 1
NO_BLOCK = -1
_ENDLESS = 1 << (BITS - 1)
"""Address space of an expandable segment: 256 TiB. The allocator's has 9/8 of the device's memory, and a second one is
made where that does not suffice."""


class Pool(Protocol):
    """Where blocks of a kind come from; `reserved` is what it has taken from the driver."""

    free: FreeBlocks
    reserved: int

    def grow(self, size: int, room: int) -> int:
        """A block in memory that is new in whole or in part, at most `room` of it, or NO_BLOCK (`alloc_block`)."""

    def release(self) -> None:
        """Gives back to the driver what is wholly free (`release_blocks`)."""


class FreeBlocks:
    """The free blocks of a pool.

    `least_rest` is what must be left of a block for it to be split (`should_split`); `unmapped` are ranges of an
    expandable segment without memory, by their start.
    """

    __slots__ = ("blocks", "least_rest", "size_at", "start_before", "unmapped")

    def __init__(self, least_rest: int) -> None:
        self.least_rest = least_rest
        self.blocks: list[int] = []
        self.size_at: dict[int, int] = {}
        self.start_before: dict[int, int] = {}
        self.unmapped: dict[int, int] = {}

    def take(self, size: int) -> int:
        """The smallest free block of at least `size`, cut to it, or NO_BLOCK (`get_free_block`)."""
        blocks = self.blocks
        found = bisect_left(blocks, size << BITS)
        if found == len(blocks):
            return NO_BLOCK
        block = blocks[found]
        if (block & ADDRESS) + (block >> BITS) in self.unmapped:
            found = self._least_expandable(found)
            block = blocks[found]
        del blocks[found]
        start = block & ADDRESS
        del self.size_at[start]
        return self.cut(start, block >> BITS, size)

    def give(self, start: int, size: int) -> None:
        """Adds a free block, merged with the free ones beside it (`free_block`, `try_merge_blocks`)."""
        blocks, size_at, start_before = self.blocks, self.size_at, self.start_before
        end = start + size
        after = size_at.pop(end, 0)
        if after:
            del blocks[bisect_left(blocks, after << BITS | end)]
            end += after
        before = start_before.pop(start, NO_BLOCK)
        if before >= 0:
            del blocks[bisect_left(blocks, (start - before) << BITS | before)]
            start = before
        size_at[start] = end - start
        start_before[end] = start
        insort(blocks, (end - start) << BITS | start)

    def remove(self, start: int) -> int:
        """Takes a free block out whole; its size."""
        size = self.size_at.pop(start)
        del self.start_before[start + size]
        del self.blocks[bisect_left(self.blocks, size << BITS | start)]
        return size

    def cut(self, start: int, whole: int, size: int) -> int:
        """The block for `size` in one of `whole` that is no longer listed; lists the rest, if it is split off."""
        rest = whole - size
        if rest < self.least_rest:
            self.start_before.pop(start + whole, None)
            return whole << BITS | start
        self.size_at[start + size] = rest
        self.start_before[start + whole] = start + size
        insort(self.blocks, rest << BITS | (start + size))
        return size << BITS | start

    def _least_expandable(self, found: int) -> int:
        """Counts unmapped memory behind a block as its own: the end of a segment is the last that is broken up."""
        blocks = self.blocks
        room = self._room(blocks[found])
        while found + 1 < len(blocks) and (other := self._room(blocks[found + 1])) < room:
            found, room = found + 1, other
        return found

    def _room(self, block: int) -> int:
        size = block >> BITS
        return size + self.unmapped.get((block & ADDRESS) + size, 0)


class Segments:
    """A pool of segments from `cudaMalloc`, each for ever of one size, at ever higher addresses.

    What addresses the driver gives is its own affair. They decide only which of several equal blocks is taken.
    """

    def __init__(self, small: bool) -> None:
        self.free = FreeBlocks(least_rest=1 if small else SMALL + 1)
        self.reserved = 0
        self._sizes: dict[int, int] = {}
        self._end = 0

    def grow(self, size: int, room: int) -> int:
        """A block in a segment of its own, which is split as any other, or NO_BLOCK."""
        whole = segment_size(size)
        if whole > room:
            return NO_BLOCK
        start = self._end
        # One granule apart, so that blocks of two segments never merge.
        self._end += whole + 1
        self._sizes[start] = whole
        self.reserved += whole
        return self.free.cut(start, whole, size)

    def release(self) -> None:
        """Gives back the segments that have no block in use."""
        free = self.free.size_at
        for start in [start for start, size in self._sizes.items() if free.get(start) == size]:
            self.reserved -= self.free.remove(start)
            del self._sizes[start]


class ExpandableSegment:
    """A pool that is one range of addresses, into which pages are mapped as they are needed."""

    def __init__(self, small: bool) -> None:
        self.free = FreeBlocks(least_rest=1)
        self.free.unmapped[0] = _ENDLESS
        self.reserved = 0
        self._page = (SMALL_SEGMENT_BYTES if small else LARGE_SEGMENT_BYTES) // MIN_BLOCK_BYTES

    def grow(self, size: int, room: int) -> int:
        """A block at the lowest address where free and unmapped ranges suffice (`try_allocate_expandable_block`).

        What is mapped before `room` is used up stays, free.
        """
        start = self._lowest(size)
        while (have := self.free.size_at.get(start, 0)) < size:
            gap = start + have
            wanted = -(-min(size - have, self.free.unmapped[gap]) // self._page) * self._page
            if wanted > room:
                return NO_BLOCK
            room -= wanted
            self._map(gap, wanted)
        return self.free.cut(start, self.free.remove(start), size)

    def release(self) -> None:
        """Unmaps the pages that are wholly free (`unmap_block`)."""
        for start, size in list(self.free.size_at.items()):
            first = -(-start // self._page) * self._page
            last = (start + size) // self._page * self._page
            if first < last:
                self._unmap(start, first, last)

    def _lowest(self, size: int) -> int:
        """Where a gap begins, or a free block before it, from which on there is room (`find_expandable_block`)."""
        free = self.free
        for gap in sorted(free.unmapped):
            start = at = free.start_before.get(gap, gap)
            while at - start < size and (step := free.size_at.get(at, 0) or free.unmapped.get(at, 0)):
                at += step
            if at - start >= size:
                return start
        raise AssertionError("an expandable segment's addresses have no end")

    def _map(self, gap: int, size: int) -> None:
        """`map_block`."""
        rest = self.free.unmapped.pop(gap) - size
        if rest:
            self.free.unmapped[gap + size] = rest
        self.free.give(gap, size)
        self.reserved += size

    def _unmap(self, start: int, first: int, last: int) -> None:
        """Unmaps [first, last) of the free block at `start`, and merges it with the gaps beside it."""
        unmapped = self.free.unmapped
        end = start + self.free.remove(start)
        if first > start:
            self.free.give(start, first - start)
        if end > last:
            self.free.give(last, end - last)
        self.reserved -= last - first
        size = last - first + unmapped.pop(last, 0)
        before = next((gap for gap, length in unmapped.items() if gap + length == first), first)
        unmapped[before] = first - before + size


def segment_size(size: int) -> int:
    """Granules that are asked of the driver for a block of `size` granules (`get_allocation_size`)."""
    if size <= SMALL:
        return SMALL_SEGMENT_BYTES // MIN_BLOCK_BYTES
    if size < MIN_LARGE_BYTES // MIN_BLOCK_BYTES:
        return LARGE_SEGMENT_BYTES // MIN_BLOCK_BYTES
    unit = ROUND_LARGE_BYTES // MIN_BLOCK_BYTES
    return -(-size // unit) * unit
