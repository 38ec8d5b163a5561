"""Activation offload: what is moved and when, and that nothing stays behind."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from longtake.config.schema import MemoryStrategy
from longtake.memory.activation_offload import activation_offload, keep_first
from longtake.memory.copies import CpuCopies, Event, MetaCopies, Place, Queue
from longtake.memory.host_buffers import HostTier, Keep, keep_on_device
from longtake.memory.strategy import apply
from longtake.models.wan.variants import variant
from tiny_steps import Load, inputs

NAME, BLOCKS, HEADS, TOKENS, DIM = "tiny-i2v", 4, 5, 12, 160
HIDDEN_BYTES, LOGSUMEXP_BYTES = 2 * TOKENS * DIM * 4, 2 * HEADS * TOKENS * 4


class Logged(CpuCopies):
    """Writes down what is queued, as (queue, first value), and lets it happen at once."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[Queue, float]] = []
        self.nbytes: dict[Queue, int] = {"inward": 0, "outward": 0}

    def start(self, queue: Queue, target: Place, source: Place, after: Sequence[Event]) -> Event:
        """Logs."""
        event = super().start(queue, target, source, after)
        event.result()
        assert isinstance(target, Tensor)
        self.log.append((queue, float(target.view(torch.float32)[0])))
        self.nbytes[queue] += target.nbytes
        return event


@contextmanager
def offloading() -> Iterator[tuple[Logged, HostTier, Callable[[int], Keep]]]:
    """An engine, its host memory, and the offload to it."""
    copies = Logged()
    tier = HostTier(copies)
    with activation_offload(copies, tier) as keep_for:
        yield copies, tier, keep_for
    copies.close()


def test_tensors_come_back_in_the_order_of_the_backward_pass_one_group_ahead() -> None:
    with offloading() as (copies, _, keep_for):
        kept = [[keep_for(group)(torch.full((4,), group + part)) for part in (0.0, 0.5)] for group in range(5)]
        assert copies.log == [("outward", group + part) for group in range(5) for part in (0.0, 0.5)]
        copies.log.clear()
        for group in (4, 3, 2, 1, 0):
            for part in (0, 1):
                assert (kept[group][part]() == group + part / 2).all()
            wanted = [("inward", earlier + part) for earlier in range(2, group - 2, -1) for part in (0.0, 0.5)]
            assert copies.log == [entry for entry in wanted if entry[1] >= 0], "groups 4 and 3 had not left yet"


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 4, 5)])
def test_a_transposed_view_comes_back_as_it_was(shape: tuple[int, ...]) -> None:
    with offloading() as (_, _, keep_for):
        tensors = [torch.randn(shape).transpose(-1, -2) for _ in range(4)]
        kept = [keep_for(group)(tensor) for group, tensor in enumerate(tensors)]
        for tensor, back in zip(reversed(tensors), (one() for one in reversed(kept)), strict=True):
            assert torch.equal(back, tensor)
            assert back.stride() == tensor.stride()


def test_what_is_kept_is_given_back_once() -> None:
    with offloading() as (_, _, keep_for):
        kept = keep_for(0)(torch.ones(1))
        kept()
        with pytest.raises(AssertionError, match="given back once"):
            kept()


def test_a_graph_that_is_dropped_gives_its_buffers_back() -> None:
    with offloading() as (_, tier, keep_for):
        kept = [keep_for(group)(torch.ones(8)) for group in range(4)]
        assert not tier.free.waiting
        del kept
        assert [buffer.room for buffer in tier.free.waiting] == [32] * 4


def test_a_smaller_bucket_uses_the_buffers_of_the_largest() -> None:
    copies = MetaCopies()
    with activation_offload(copies, HostTier(copies)) as keep_for:
        for values in (16, 4, 8):
            kept = [keep_for(group)(torch.empty(values, device="meta")) for group in range(3)]
            assert [back().shape for back in reversed(kept)] == [(values,)] * 3
    assert copies.host_bytes == 3 * 64


def test_only_the_first_groups_move() -> None:
    with offloading() as (copies, _, keep_for):
        chosen = keep_first(1, keep_for, keep_on_device)
        tensors = [torch.ones(1), torch.ones(1)]
        kept = [chosen(group)(tensor) for group, tensor in enumerate(tensors)]
        assert copies.nbytes["outward"] == 4
        assert kept[1]() is tensors[1]


@pytest.mark.parametrize(
    ("strategy", "nbytes"),
    [
        (MemoryStrategy(activation_offload="host"), BLOCKS * HIDDEN_BYTES),
        (MemoryStrategy(activation_offload="host", checkpoint_every=2), 2 * HIDDEN_BYTES),
        (MemoryStrategy(activation_offload="host", slices=2), BLOCKS * HIDDEN_BYTES),
        (
            MemoryStrategy(activation_offload="host", gradient_checkpointing="block_keep_attention"),
            BLOCKS * (2 * HIDDEN_BYTES + LOGSUMEXP_BYTES),
        ),
        (
            MemoryStrategy(activation_offload="host", gradient_checkpointing="block_keep_attention", slices=2),
            BLOCKS * (2 * HIDDEN_BYTES + LOGSUMEXP_BYTES),
        ),
    ],
)
def test_nothing_moves_but_what_the_blocks_own(
    load: Load, tmp_path: Path, strategy: MemoryStrategy, nbytes: int
) -> None:
    """Text, time embedding and RoPE tables are the same for all blocks and stay."""
    model, copies = load(NAME, True), Logged()
    with apply(model, variant(NAME).spec, strategy, tmp_path, copies=copies):
        model(**inputs(NAME), return_dict=False)[0].sum().backward()
    copies.close()
    assert copies.nbytes["outward"] == nbytes
    segments = BLOCKS // strategy.checkpoint_every
    assert copies.nbytes["inward"] == nbytes * (segments - 2) // segments, "the last two are still there"


def test_on_meta_the_host_holds_what_was_moved_and_the_device_does_not() -> None:
    copies = MetaCopies()
    with activation_offload(copies, HostTier(copies)) as keep_for:
        kept = [keep_for(group)(torch.empty(2, 8, device="meta")) for group in range(3)]
        assert copies.host_bytes == 3 * 64
        assert [back().shape for back in reversed(kept)] == [(2, 8)] * 3
