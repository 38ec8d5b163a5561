"""The fast model against a slow one: blocks linked as in PyTorch's C++, and searched one by one."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allocations import MIB, Events, in_phases, traces
from longtake.planner.allocator import Replayed, replay
from longtake.planner.segments import BITS, FreeBlocks

ENDLESS = 20 * MIB << 20


@settings(max_examples=200, deadline=None)
@given(traces(), st.booleans(), st.one_of(st.none(), st.integers(20, 300).map(lambda count: count * MIB)))
def test_the_fast_model_does_what_a_transcription_of_pytorchs_does(
    events: Events, expandable: bool, limit: int | None
) -> None:
    assert replay(events, expandable, limit) == Transcription(expandable, limit).replay(events)


@pytest.mark.parametrize("expandable", [False, True])
def test_they_agree_where_memory_is_short_and_segments_are_given_back(expandable: bool) -> None:
    went_on = 0
    for seed in range(300):
        random = Random(seed)
        capacity = random.choice([100, 200, 400]) * MIB
        events, limit = in_phases(random, capacity), 20 * MIB + int(capacity * random.choice([1.1, 1.3, 1.6]))
        found = replay(events, expandable, limit)
        assert found == Transcription(expandable, limit).replay(events)
        went_on += found.releases > 0 and found.out_of_memory is None
    assert went_on >= 15


def test_a_block_counts_with_the_unmapped_memory_behind_it_until_one_is_larger_without() -> None:
    free = FreeBlocks(least_rest=1)
    free.unmapped = {4: 20, 103: 1000}
    free.give(0, 4)  # and 20 behind it
    free.give(50, 18)
    free.give(70, 30)
    free.give(100, 3)  # and 1000; merges with the last
    free.give(200, 3)
    free.unmapped[203] = 1000
    assert free.take(3) == 3 << BITS | 50  # of 1003, 24, 18 and 1033
    assert free.take(15) == 15 << BITS | 53
    assert free.take(3) == 3 << BITS | 0  # of 1003, 24 and 1033


@dataclass(eq=False)
class Block:
    start: int
    size: int
    small: bool
    mapped: bool = True
    allocated: bool = False
    before: Block | None = None
    after: Block | None = None


class Transcription:
    """c10/cuda/CUDACachingAllocator.cpp, function by function, under its names."""

    def __init__(self, expandable: bool, limit: int | None) -> None:
        self.expandable, self.limit = expandable, ENDLESS if limit is None else limit
        self.blocks: list[Block] = []
        self.end = self.reserved = self.peak = self.releases = 0
        if expandable:
            self.blocks = [Block(0, ENDLESS, True, False), Block(ENDLESS, ENDLESS, False, False)]

    def replay(self, events: Events) -> Replayed:
        live: dict[int, Block] = {}
        allocated = greatest = 0
        for index, (identity, nbytes) in enumerate(events):
            if nbytes > 0:
                found = self.malloc(-(-nbytes // 512) * 512)
                if found is None:
                    return Replayed(self.peak, greatest, index, self.releases)
                live[identity] = found
                allocated += found.size
                greatest = max(greatest, allocated)
            elif identity in live:
                allocated -= live[identity].size
                self.free_block(live.pop(identity))
        return Replayed(self.peak, greatest, None, self.releases)

    def malloc(self, size: int) -> Block | None:
        block = self.get_free_block(size) or self.alloc_block(size)
        if block is None:
            self.releases += 1
            self.release_cached_blocks()
            block = self.alloc_block(size)
        if block is None:
            return None
        block.allocated = True
        remaining = block.size - size
        if remaining >= 512 if block.small or self.expandable else remaining > MIB:
            self.split(block, size)
        return block

    def get_free_block(self, size: int) -> Block | None:
        free = [block for block in self.blocks if self.is_free(block) and block.small == (size <= MIB)]
        free = sorted((block for block in free if block.size >= size), key=lambda block: (block.size, block.start))
        if not free:
            return None
        found = 0
        while found + 1 < len(free) and self.expandable_size(free[found + 1]) < self.expandable_size(free[found]):
            found += 1
        return free[found]

    def is_free(self, block: Block | None) -> bool:
        return block is not None and block.mapped and not block.allocated

    def expandable_size(self, block: Block) -> int:
        return block.size + (block.after.size if block.after and not block.after.mapped else 0)

    def alloc_block(self, size: int) -> Block | None:
        alloc_size = 2 * MIB if size <= MIB else 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
        if self.reserved + alloc_size > self.limit:
            return None
        if self.expandable:
            return self.try_allocate_expandable_block(size)
        block = Block(self.end, alloc_size, size <= MIB)
        self.end += alloc_size
        self.blocks.append(block)
        self.count(alloc_size)
        return block

    def try_allocate_expandable_block(self, size: int) -> Block | None:
        candidate = self.find_expandable_block(size)
        if not candidate.mapped and not self.map_block(candidate, min(candidate.size, size)):
            return None
        while candidate.size < size:
            following = candidate.after
            assert following is not None
            if not self.map_block(following, min(size - candidate.size, following.size)):
                return None
            candidate = following
        return candidate

    def find_expandable_block(self, size: int) -> Block:
        gaps = [block for block in self.blocks if not block.mapped and block.small == (size <= MIB)]
        for gap in sorted(gaps, key=lambda block: block.start):
            first = gap.before if self.is_free(gap.before) else gap
            block, found = first, 0
            while block is not None and not block.allocated and found < size:
                found, block = found + block.size, block.after
            if found >= size:
                assert first is not None
                return first
        raise AssertionError

    def map_block(self, block: Block, size: int) -> bool:
        page = 2 * MIB if block.small else 20 * MIB
        mapped = -(-size // page) * page
        if self.reserved + mapped > self.limit:  # cuMemCreate fails
            return False
        block.mapped = True
        if mapped < block.size:
            self.split(block, mapped).mapped = False
        self.merge(block)
        self.count(mapped)
        return True

    def free_block(self, block: Block) -> None:
        block.allocated = False
        self.merge(block)

    def release_cached_blocks(self) -> None:
        for block in [block for block in self.blocks if self.is_free(block)]:
            if self.expandable:
                self.unmap_block(block)
            elif block.before is None and block.after is None:
                self.blocks.remove(block)
                self.count(-block.size)

    def unmap_block(self, block: Block) -> None:
        page = 2 * MIB if block.small else 20 * MIB
        first, last = -(-block.start // page) * page, (block.start + block.size) // page * page
        if first >= last:
            return
        if first > block.start:
            block = self.split(block, first - block.start)
        if last < block.start + block.size:
            self.split(block, last - block.start)
        block.mapped = False
        self.merge(block)
        self.count(first - last)

    def split(self, block: Block, size: int) -> Block:
        """Leaves `size` in `block`; the free rest."""
        rest = Block(block.start + size, block.size - size, block.small, block.mapped, False, block, block.after)
        if block.after:
            block.after.before = rest
        block.after, block.size = rest, size
        self.blocks.append(rest)
        return rest

    def merge(self, block: Block) -> None:
        """`try_merge_blocks` with both neighbours."""
        for other in (block.before, block.after):
            if other is None or other.allocated or other.mapped != block.mapped:
                continue
            block.start = min(block.start, other.start)
            block.size += other.size
            if other is block.before:
                block.before = other.before
            else:
                block.after = other.after
            if block.before:
                block.before.after = block
            if block.after:
                block.after.before = block
            self.blocks.remove(other)

    def count(self, nbytes: int) -> None:
        self.reserved += nbytes
        self.peak = max(self.peak, self.reserved)
