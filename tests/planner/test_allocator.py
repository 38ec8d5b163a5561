"""Sequences worked out by hand from PyTorch's rules. Sizes in comments are MiB unless said otherwise."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allocations import MIB, Events, traces
from longtake.planner.allocator import (
    CONTEXT_BYTES,
    CUBLAS_WORKSPACE_BYTES,
    Replayed,
    nccl_bytes,
    overhead_bytes,
    replay,
)

LIMITS = st.one_of(st.none(), st.integers(0, 300).map(lambda count: count * MIB))


def of(*steps: float | str) -> Events:
    """`of(5, "-0", 3)`: 5 MiB, the first freed, 3 MiB."""
    events: Events = []
    for step in steps:
        if isinstance(step, str):
            events.append((int(step[1:]), -1))
        else:
            events.append((sum(nbytes >= 0 for _, nbytes in events), int(step * MIB)))
    return events


def reserved(*steps: float | str, expandable: bool = False) -> float:
    """MiB."""
    return replay(of(*steps), expandable).reserved_bytes / MIB


@pytest.mark.parametrize(
    ("nbytes", "allocated", "segment"),
    [
        (0, 0, 0),
        (1, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB),  # the largest of the small pool
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB, 10 * MIB),  # from here on a segment of its own, rounded to 2 MiB
        (10 * MIB + 1, 10 * MIB + 512, 12 * MIB),  # 2 MiB - 512 B remain, more than 1 MiB: split
        (11 * MIB, 12 * MIB, 12 * MIB),  # 1 MiB remains: not split, all of it is in use
    ],
)
def test_sizes_are_rounded_and_put_in_segments_by_size(nbytes: int, allocated: int, segment: int) -> None:
    assert replay([(0, nbytes)], expandable=False) == Replayed(segment, allocated, None, 0)


def test_small_blocks_share_segments_of_2_mib_and_others_of_20() -> None:
    assert reserved(0.5, 0.5, 0.5, 0.5) == 2
    assert reserved(0.5, 0.5, 0.5, 0.5, 0.5) == 4
    assert reserved(5, 5, 5, 5) == 20
    assert reserved(5, 5, 5, 5, 5) == 40
    assert reserved(5, 0.5) == 22  # 15 are free in the large pool, of no use to the small one


def test_a_large_block_is_split_where_more_than_1_mib_remains() -> None:
    rest = 1 + 1 / 2048  # 1 MiB + 512 B
    assert reserved(19, rest) == 20 + 20  # 20 - 19 = 1 stays with the block
    assert reserved(20 - rest, rest) == 20
    assert replay(of(19), expandable=False).allocated_bytes == 20 * MIB


def test_a_small_block_is_split_where_512_bytes_remain() -> None:
    assert reserved(1, 1 - 1 / 2048, 1 / 2048) == 2


def test_the_smallest_block_that_is_large_enough_is_taken() -> None:
    # 12 goes into 14, so that 30 finds 30; into 30 it would have left 18, and 30 more were needed.
    assert reserved(30, 14, "-0", "-1", 12, 30) == 44


def test_free_neighbours_merge_within_a_segment_and_never_across_two() -> None:
    assert reserved(5, 5, 5, 5, "-1", "-2", 9) == 20  # 5 + 5 free, 9 used
    assert reserved(5, 5, 5, 5, "-0", "-2", 9) == 40  # 5 and 5, with 5 between
    assert reserved(5, 5, 5, 5, "-0", "-2", "-1", 14) == 20
    assert reserved(10, 10, "-0", "-1", 20) == 40


def test_cached_segments_are_used_again() -> None:
    assert reserved(40, "-0", 40, "-1", 40) == 40
    assert reserved(40, "-0", 30, 10) == 40
    assert reserved(40, "-0", 41) == 40 + 42


def test_a_second_step_can_reserve_more_than_the_first() -> None:
    # First 5 and 14 share 20, and 16 has its own. Then 5 takes 16, the smaller, 14 takes 20, and 16 finds 11 and 6.
    step, second = (5, 14, 16, "-0", "-1", "-2"), (5, 14, 16)
    assert reserved(*step) == 36
    assert reserved(*step, *second) == 52


def test_segments_that_are_wholly_free_are_given_back_before_memory_runs_out() -> None:
    # 60 + 62 > 100: 60 is given back.
    assert replay(of(60, "-0", 62), False, 100 * MIB) == Replayed(62 * MIB, 62 * MIB, None, 1)
    # So is the small pool's: 2 + 60 + 40 > 100.
    assert replay(of(0.5, 60, "-0", 40), False, 100 * MIB) == Replayed(100 * MIB, 100 * MIB, None, 1)


def test_it_is_out_of_memory_where_segments_in_use_leave_no_room() -> None:
    # 5 is in the segment of 40, which must stay: 40 + 62 > 100.
    assert replay(of(40, "-0", 5, 62, 1), False, 100 * MIB) == Replayed(40 * MIB, 40 * MIB, 3, 1)
    # 3 in use and 77 free of two segments of 40, in pieces of 38.5: none for 40, and 80 + 40 > 100.
    pieces = of(38.5, 1.5, 38.5, 1.5, "-0", "-2", 40)
    assert replay(pieces, False, 100 * MIB) == Replayed(80 * MIB, 80 * MIB, 6, 1)
    assert replay(pieces, False, 120 * MIB) == Replayed(120 * MIB, 80 * MIB, None, 0)


def test_growing_sizes_leave_segments_of_no_use_and_expandable_ones_repair_it() -> None:
    # A shorter clip's ten tensors of 40, then a longer one's of 42: none fits a cached segment. 400 + 420 for 420.
    events = of(*[40] * 10, *[f"-{index}" for index in range(10)], *[42] * 10)
    plain, expandable = replay(events, False), replay(events, True)
    assert plain == Replayed(820 * MIB, 420 * MIB, None, 0)
    assert plain.reserved_bytes > 1.2 * plain.allocated_bytes
    assert expandable == Replayed(420 * MIB, 420 * MIB, None, 0)  # 21 pages
    assert expandable.reserved_bytes < 1.05 * expandable.allocated_bytes


def test_an_expandable_segment_is_mapped_in_pages_and_always_split() -> None:
    assert reserved(0.5, expandable=True) == 2
    assert reserved(5, expandable=True) == 20
    assert reserved(25, expandable=True) == 40  # two pages
    assert reserved(25, 15, expandable=True) == 40
    assert reserved(19, 1 + 1 / 2048, expandable=True) == 40
    assert replay(of(19), expandable=True).allocated_bytes == 19 * MIB  # the 1 that remains is split off
    assert reserved(5, 35, expandable=True) == 40  # the free 15 at the end and one more page


def test_the_end_of_an_expandable_segment_is_broken_up_last() -> None:
    # 18 of 20 in use. Of the free 16 and, at the end, 2, 2 takes the 16: then 16 finds 14, and needs a page more.
    assert reserved(16, 2, "-0", 2, 16, expandable=True) == 40
    assert reserved(16, 2, "-0", 16, 2, expandable=True) == 20


def test_expandable_pages_are_given_back_and_the_lowest_addresses_filled_first() -> None:
    # 45 and 15 in three pages. 45 free: 60 + 50 > 102, so two pages are unmapped; 45 are too few for 50, which gets
    # [60, 110), three pages: 20 + 60 = 80. 15 free, then 22: at the end, where 10 are free, one page would do, but from
    # 0 on there is room too. Two pages there, 80 + 40 > 102: [40, 60) is unmapped as well, and 60 + 40 are mapped.
    assert replay(of(45, 15, "-0", 50, "-1", 22), True, 102 * MIB) == Replayed(100 * MIB, 72 * MIB, None, 2)


def test_a_limit_is_compared_with_the_whole_request_even_if_a_part_would_do() -> None:
    # 15 are free: 35 more, two pages, would make 60. But 20 + 50 > 60.
    assert replay(of(5, 50), True, 60 * MIB) == Replayed(20 * MIB, 5 * MIB, 1, 1)
    assert replay(of(5, 50), True, 70 * MIB) == Replayed(60 * MIB, 55 * MIB, None, 0)


def test_an_identity_may_be_used_again_but_not_while_it_lives() -> None:
    assert replay([(7, MIB), (7, -1), (7, MIB)], expandable=False).allocated_bytes == MIB
    with pytest.raises(AssertionError):
        replay([(7, MIB), (7, MIB)], expandable=False)


@settings(max_examples=200, deadline=None)
@given(traces(), st.booleans(), LIMITS)
def test_reserved_is_at_least_allocated_and_at_most_the_limit(
    events: Events, expandable: bool, limit: int | None
) -> None:
    found = replay(events, expandable, limit)
    sizes: dict[int, int] = {}
    largest = 0
    for identity, nbytes in events[: found.out_of_memory]:
        sizes[identity] = max(nbytes, 0)
        largest = max(largest, sum(sizes.values()))
    assert largest <= found.allocated_bytes <= found.reserved_bytes
    assert limit is None or found.reserved_bytes <= limit
    assert limit is not None or (found.out_of_memory, found.releases) == (None, 0)
    assert replay(events, expandable, limit) == found


@settings(max_examples=200, deadline=None)
@given(traces())
def test_the_same_step_again_needs_no_more_of_an_expandable_segment(events: Events) -> None:
    """What is at its end is taken last, in the first step as in the second, so that each block is where it was."""
    live = {identity for identity, nbytes in events if nbytes >= 0} - {i for i, nbytes in events if nbytes < 0}
    step = [*events, *((identity, -1) for identity in live)]
    assert replay([*step, *step], expandable=True) == replay(step, expandable=True)


def test_what_a_process_takes_besides_is_its_context_and_its_communicator() -> None:
    assert overhead_bytes("ampere", ranks=1) == CONTEXT_BYTES["ampere"] == 512 * MIB
    assert overhead_bytes("hopper", ranks=8) == CONTEXT_BYTES["hopper"] + nccl_bytes(8)
    assert [nccl_bytes(ranks) // MIB for ranks in (1, 2, 3, 64)] == [0, 544, 688, 688]
    # 7 peers, 32 channels, 14 MiB: 3.29 GB.
    assert nccl_bytes(8, all_to_all=True) - nccl_bytes(8) == 7 * 32 * 14 * MIB == 3_288_334_336
    assert nccl_bytes(1, all_to_all=True) == 0


def test_cublas_takes_8_or_32_mib() -> None:
    assert CUBLAS_WORKSPACE_BYTES["ada"] == 8_519_680
    assert CUBLAS_WORKSPACE_BYTES["hopper"] == 33_554_432
    assert CUBLAS_WORKSPACE_BYTES.keys() == CONTEXT_BYTES.keys()
