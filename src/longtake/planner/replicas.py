"""A rank's step where each has all weights: torch's DDP, DeepSpeed's ZeRO stages 1 and 2. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from longtake.planner.events import Compute, Item
from longtake.planner.rank_items import (
    BUFFERS,
    GRADIENTS,
    OPTIMIZER,
    Rank,
    ceil,
    part_of,
    planned,
    sent,
    summed,
)
from longtake.planner.shards import Sizes, zero_bucket, zero_partition

if TYPE_CHECKING:
    from longtake.planner.composition import Composed

DDP_BUCKET_BYTES = 25 * 2**20
"""DDP's `bucket_cap_mb`, the default (torch/nn/parallel/distributed.py)."""


def ddp(composed: Composed, ranks: int, sizes: Sizes, rank: Rank) -> Composed:
    """Under DDP with `gradient_as_bucket_view`: gradients are views of the buckets, which are there from the start.

    The copies are listed with the update, after the blocks whose gradients they sum up: they run beside the backward
    pass of the last micro-batch alone, as under `no_sync` before it.
    """

    def held(item: Compute) -> list[int]:
        own = [*item.held]
        own[GRADIENTS] = max(own[GRADIENTS], sizes.gradients)
        return own

    ready: list[tuple[int, int]] = []
    _passes(rank, composed.micro_batch, held, sizes, DDP_BUCKET_BYTES, ready.append)
    micro_batch = rank.taken()
    _sum_up(rank, ready, ranks)
    rank.write(composed.update, held)
    return planned(composed, micro_batch, rank.taken(), 0)


def zero(composed: Composed, stage: int, offload: bool, ranks: int, sizes: Sizes, rank: Rank) -> Composed:
    """Under ZeRO 1 or 2: a rank updates its part of all trained weights, laid in a row, and all gather them afterwards.

    Weights are fp32, and what is updated is a rank's part of the row itself, not a copy of it: the engine sees to that.
    Stage 1 sums gradients up in the last micro-batch, stage 2 in each. A rank keeps the gradients of weights that are
    in its part, or partly are (`grads_in_partition`, deepspeed/runtime/zero/stage_1_and_2.py), apart from those of
    earlier micro-batches to which they are added; in `step` its part is there twice, as it came and flat.

    Settings: `contiguous_gradients` and `overlap_comm`, hence two buckets (`zero_bucket`), and gradients of several
    ranks in one are copied into a third tensor to be summed up (`allreduce_bucket`, `use_multi_rank_bucket_allreduce`
    being the default). Gradients go over the network in fp32; `torch_autocast` would send those of linear layers in its
    own type, in half the time.

    With `offload`, of stage 2, states, averages, a copy of the part, gradients, those of earlier micro-batches, and
    another copy of the part to be sent back are in host memory (`cpu_offload` there), and a gradient on its way has a
    buffer of the largest one's size on both sides.
    """
    part, trained = zero_partition(sizes, ranks), sizes.trained_bytes
    states, buckets = ceil((sizes.optimizer + sizes.averages) * part, trained), 3 * zero_bucket(sizes)
    kept = part + max((weight.nbytes for weight in sizes.block_trained), default=0)
    accumulates = next(item for item in composed.micro_batch if isinstance(item, Compute)).held[GRADIENTS] > 0

    def held(item: Compute) -> list[int]:
        own, of = [*item.held], part_of(item.label)
        own[OPTIMIZER] += (0 if offload else states) - sizes.optimizer - sizes.averages
        backward = of in ("turn", "backward")
        if of == "update":
            own[GRADIENTS] = kept + part
        elif stage == 2:
            own[GRADIENTS] = kept * (accumulates + backward)
        elif accumulates and backward:
            own[GRADIENTS] += kept
        if offload:
            own[GRADIENTS] = 0
            own[BUFFERS] += sizes.largest_gradient
        own[BUFFERS] += buckets if backward else 0
        return own

    ready: list[tuple[int, int]] = []
    reduced: list[int] = []

    def reduce_at_once(bucket: tuple[int, int]) -> None:
        event, nbytes = bucket
        reduced.append(rank.copy("network", summed(nbytes, ranks), (event,), "gradients"))
        if offload:
            reduced.append(rank.copy("outward", ceil(nbytes, ranks), (reduced[-1],), "gradients"))

    _passes(rank, composed.micro_batch, held, sizes, zero_bucket(sizes), reduce_at_once if stage == 2 else ready.append)
    rank.wait(*reduced[-2:])
    micro_batch = rank.taken()
    _sum_up(rank, ready, ranks)
    rank.before_update(composed.update, held, 0 if offload else kept)
    if offload:
        rank.update_in_host(part, part)
    rank.write(composed.update, held, divided_by=0 if offload else ranks)
    rank.wait(rank.copy("network", sent(ranks * part, ranks), (rank.reached(),), "updated weights"))
    host = states + 3 * part + kept * accumulates + sizes.largest_gradient if offload else 0
    return planned(composed, micro_batch, rank.taken(), host)


def _passes(
    rank: Rank,
    items: Iterable[Item],
    held: Callable[[Compute], Sequence[int]],
    sizes: Sizes,
    bucket: int,
    ready: Callable[[tuple[int, int]], None],
) -> None:
    """Writes a micro-batch's items; tells of each bucket its bytes, and the event from which on they are there.

    Blocks fill buckets one after the other, each whole, and what is outside of blocks comes with the last.
    """
    label, waiting, left = "", 0, sizes.gradients
    for item in items:
        if not isinstance(item, Compute):
            rank.items.append(item)
            continue
        if item.label != label:
            waiting += sizes.block_gradients if part_of(label) == "backward" else 0
            if waiting >= bucket:
                ready((rank.reached(), waiting))
                waiting, left = 0, left - waiting
            label = item.label
        rank.compute(item.work, label, held(item))
    ready((rank.reached(), left))


def _sum_up(rank: Rank, ready: Iterable[tuple[int, int]], ranks: int) -> None:
    """Sums gradients up, which the update waits for."""
    copies = [rank.copy("network", summed(nbytes, ranks), (event,), "gradients") for event, nbytes in ready]
    rank.wait(*copies[-1:])
