"""A wait, a reader or an order that is missing is caught by the checking copy engine, of each kind and in each tier."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from honest_ring import MakeTier
from longtake.memory.copies import Copies
from longtake.memory.extents import Extent
from longtake.memory.host_buffers import (
    Buffer,
    HostTier,
    Tier,
    allocate,
    as_bytes,
    computed,
    copy,
    done,
    settle,
    use,
)
from race_checker import CheckedCopies, Race, Unread

CPU = torch.device("cpu")
NBYTES = 64


@contextmanager
def checked(tier_of: MakeTier, seed: int = 0, ahead: int = 0) -> Iterator[tuple[CheckedCopies, Tier]]:
    """A checking engine that watches, and its tier."""
    with CheckedCopies(seed, ahead).watching() as copies:
        yield copies, tier_of(copies)


def put_out(copies: Copies, tier: Tier, value: float = 1.0) -> Buffer:
    """A buffer of the tier to which a tensor was copied, its copy waited for."""
    source, home = computed(copies, torch.full((NBYTES // 4,), value)), tier.take(NBYTES)
    copy(copies, "outward", home, source)
    settle(copies, source)
    return home


def test_a_missing_wait_is_caught_where_the_computation_reads(tier_of: MakeTier) -> None:
    with checked(tier_of) as (copies, tier):
        slot = allocate(copies, NBYTES, CPU)
        copy(copies, "inward", slot, put_out(copies, tier))
        with pytest.raises(Race, match=r"add\.Tensor reads it before its writer is done and waited for: copy 2 inward"):
            slot._place + 1
        assert (use(copies, slot).view(torch.float32) == 1.0).all()


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_what_is_read_without_a_wait_is_garbage_while_the_copy_is_late(tier_of: MakeTier, seed: int) -> None:
    copies = CheckedCopies(seed)
    copies.late.eagerness = 0.0
    slot = allocate(copies, NBYTES, CPU)
    copy(copies, "inward", slot, put_out(copies, tier_of(copies)))
    assert slot._place.view(torch.float32).isnan().all()
    assert (use(copies, slot).view(torch.float32) == 1.0).all()


def test_an_early_reuse_after_the_computation_is_caught_where_the_copy_is_queued(tier_of: MakeTier) -> None:
    with checked(tier_of) as (copies, tier):
        home, slot = put_out(copies, tier), allocate(copies, NBYTES, CPU)
        copy(copies, "inward", slot, home)
        use(copies, slot) + 1
        with pytest.raises(Race, match=r"writes it before its last reader is done and waited for: the computation"):
            copy(copies, "inward", slot, home)
        done(copies, slot)
        copy(copies, "inward", slot, home)
        use(copies, slot) + 1


def test_an_early_reuse_after_a_copy_is_caught_where_the_copy_is_queued(tier_of: MakeTier) -> None:
    with checked(tier_of, ahead=1) as (copies, tier):
        home, slot = put_out(copies, tier), allocate(copies, NBYTES, CPU)
        copy(copies, "inward", slot, home)
        home._read.clear()
        with pytest.raises(Race, match=r"writes it before its last reader is done and waited for: copy 2 inward"):
            copy(copies, "outward", home, computed(copies, torch.ones(NBYTES // 4)))


def test_an_allocation_over_memory_that_the_computation_may_still_use_is_caught() -> None:
    with CheckedCopies(0, ahead=1).watching() as copies:
        slot = Buffer(torch.empty(NBYTES, dtype=torch.uint8))
        with pytest.raises(Race, match=r"writes it before its other writer is done"):
            copy(copies, "inward", slot, HostTier(copies).take(NBYTES))


def test_a_wrong_prefetch_order_is_caught_where_it_overwrites(tier_of: MakeTier) -> None:
    with checked(tier_of) as (copies, tier):
        first, second, slot = put_out(copies, tier), put_out(copies, tier), allocate(copies, NBYTES, CPU)
        copy(copies, "inward", slot, first)
        with pytest.raises(
            Unread, match=r"copy 4 inward .* overwrites what the computation has not read: copy 3 inward"
        ):
            copy(copies, "inward", slot, second)
        use(copies, slot) + 1


@pytest.mark.parametrize("let_go", [False, True], ids=["held", "let go"])
def test_what_was_fetched_and_never_read_is_told_at_the_end(tier_of: MakeTier, let_go: bool) -> None:
    def program(ahead: int) -> None:
        with checked(tier_of, ahead=ahead) as (copies, tier):
            slot = allocate(copies, NBYTES, CPU)
            copy(copies, "inward", slot, put_out(copies, tier))
            settle(copies, slot)
            if let_go:
                del slot
                torch.ones(1)

    program(ahead=1)
    with pytest.raises(Unread, match=r"never read the results of copy 2 inward"):
        program(ahead=0)


def test_unread_buffers_do_not_hide_the_failure_that_left_them(tier_of: MakeTier) -> None:
    def program() -> None:
        copies = CheckedCopies(0)
        try:
            slot = allocate(copies, NBYTES, CPU)
            copy(copies, "inward", slot, put_out(copies, tier_of(copies)))
            raise torch.OutOfMemoryError
        finally:
            copies.close()

    with pytest.raises(torch.OutOfMemoryError):
        program()


def test_a_source_that_the_computation_may_still_write_is_caught(tier_of: MakeTier) -> None:
    with checked(tier_of) as (copies, tier):
        source = Buffer(as_bytes(torch.ones(NBYTES // 4)))
        with pytest.raises(Race, match=r"copy 1 outward .* reads it before its writer is done"):
            copy(copies, "outward", tier.take(NBYTES), source)


def test_a_source_that_a_copy_may_still_write_is_caught(tier_of: MakeTier) -> None:
    with checked(tier_of) as (copies, tier):
        source, home = computed(copies, torch.ones(NBYTES // 4)), tier.take(NBYTES)
        copy(copies, "outward", home, source)
        home._written = None
        with pytest.raises(Race, match=r"copy 2 inward .* reads it before its writer is done and waited for: copy 1"):
            copy(copies, "inward", allocate(copies, NBYTES, CPU), home)


def test_memory_that_goes_back_before_its_copy_is_done_is_caught(tier_of: MakeTier) -> None:
    with checked(tier_of, ahead=1) as (copies, tier):
        slot = allocate(copies, NBYTES, CPU)
        copy(copies, "inward", slot, put_out(copies, tier))
        del slot
        with pytest.raises(Race, match=r"given back before the copy that fills it is done: copy 2 inward"):
            torch.ones(1)
        copies.close()


def test_what_was_copied_from_memory_that_went_back_is_not_to_be_read(tier_of: MakeTier) -> None:
    with checked(tier_of, ahead=1) as (copies, tier):
        source, home, slot = computed(copies, torch.ones(16)), tier.take(NBYTES), allocate(copies, NBYTES, CPU)
        copy(copies, "outward", home, source)
        del source
        torch.ones(1)
        with pytest.raises(Race, match=r"copy 2 inward .* reads what came from memory that was given back: copy 1"):
            copy(copies, "inward", slot, home)


def test_the_backward_pass_is_watched(tier_of: MakeTier) -> None:
    with checked(tier_of, ahead=1) as (copies, tier):
        home, slot = put_out(copies, tier), allocate(copies, NBYTES, CPU)
        copy(copies, "inward", slot, home)
        weight = use(copies, slot).view(torch.float32)
        product = (torch.ones(NBYTES // 4, requires_grad=True) * weight).sum()
        done(copies, slot)
        copy(copies, "inward", slot, home)
        with pytest.raises(Race, match=r"mul\.Tensor reads it before its writer is done"):
            product.backward()


def test_the_inner_tensors_of_a_subclass_are_watched(tier_of: MakeTier) -> None:
    with checked(tier_of) as (copies, tier):
        slot = allocate(copies, NBYTES, CPU)
        inner = use(copies, slot).view(torch.float32)
        weight = TwoTensor(inner, inner)
        copy(copies, "inward", slot, put_out(copies, tier))
        with pytest.raises(Race, match=r"mul\.Tensor reads it before its writer is done"):
            weight * 2
        use(copies, slot)
        assert torch.equal((weight * 2).a, torch.full((16,), 2.0))


def test_views_and_shapes_are_no_reads(tier_of: MakeTier) -> None:
    with checked(tier_of) as (copies, tier):
        slot = allocate(copies, NBYTES, CPU)
        copy(copies, "inward", slot, put_out(copies, tier))
        weight = slot._place.view(torch.float32).view(4, 4).t()[1:]
        torch.zeros_like(weight)
        with pytest.raises(Race):
            weight.sum()
        use(copies, slot).sum()


def test_memory_of_another_tensor_at_the_same_address_is_no_false_alarm() -> None:
    with CheckedCopies(0).watching() as copies:
        tier, addresses = HostTier(copies), []
        for _ in range(50):
            home, slot = put_out(copies, tier), allocate(copies, NBYTES, CPU)
            copy(copies, "inward", slot, home)
            tier.give_back(home)
            addresses.append((use(copies, slot) + 1).data_ptr())
            addresses.append(use(copies, slot).data_ptr())
            del slot
            others = [torch.ones(NBYTES // 4) + 1 for _ in range(20)]
            addresses += [other.data_ptr() for other in others]
    assert len({*addresses}) < len(addresses)


def test_what_the_program_does_with_host_memory_comes_before_a_later_copy() -> None:
    with CheckedCopies(0).watching() as copies:
        home, slot = HostTier(copies).take(NBYTES), allocate(copies, NBYTES, CPU)
        use(copies, home).fill_(7)
        copy(copies, "inward", slot, home)
        assert (use(copies, slot) == 7).all()


def test_a_file_closed_before_its_copy_is_done_is_caught(tmp_path: Path) -> None:
    copies = CheckedCopies(0)
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    file = Buffer((Extent(descriptor, "file", 0, NBYTES),))
    copy(copies, "outward", file, computed(copies, torch.ones(NBYTES // 4)))
    os.close(descriptor)
    with pytest.raises(Race, match=r"file: closed before a copy was done: copy 1 outward"):
        copies.close()
