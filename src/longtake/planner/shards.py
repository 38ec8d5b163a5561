"""What one rank holds of weights that an engine shares out among ranks. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from longtake.planner.events import KINDS
from longtake.planner.rank_items import ceil, rounded

PERSISTENT_VALUES = 100_000
"""DeepSpeed's `stage3_param_persistence_threshold`: smaller parameters are whole on each rank beside their shard."""

ZERO_BUCKET_VALUES = 2**24


class Weight(NamedTuple):
    """A parameter: its size along its first axis, the values of a row, the bytes of a value."""

    rows: int
    row_values: int
    itemsize: int

    @property
    def values(self) -> int:
        """All."""
        return self.rows * self.row_values

    @property
    def nbytes(self) -> int:
        """On a device, whole."""
        return rounded(self.values * self.itemsize)


@dataclass(frozen=True)
class Sizes:
    """The parameters of the whole model: of each of `blocks` blocks and of all else.

    `trained_kind` is the kind of bytes that trained ones are; their gradients are of their type. `optimizer` are the
    bytes of the optimiser's states on a device that holds all, `averages` those of the averaged weights.
    """

    blocks: int
    block_frozen: tuple[Weight, ...]
    block_trained: tuple[Weight, ...]
    other_frozen: tuple[Weight, ...]
    other_trained: tuple[Weight, ...]
    optimizer: int
    averages: int = 0
    trained_kind: str = "adapters"

    @cached_property
    def frozen(self) -> int:
        """Bytes of all frozen weights."""
        return self.blocks * _bytes(self.block_frozen) + _bytes(self.other_frozen)

    @cached_property
    def block_gradients(self) -> int:
        """Bytes of a block's gradients, or trained weights."""
        return _bytes(self.block_trained)

    @cached_property
    def other_gradients(self) -> int:
        """Bytes of the gradients outside the blocks."""
        return _bytes(self.other_trained)

    @cached_property
    def gradients(self) -> int:
        """Bytes of all gradients, or trained weights."""
        return self.blocks * self.block_gradients + self.other_gradients

    @cached_property
    def trained_bytes(self) -> int:
        """Bytes of all trained weights, not rounded."""
        per_block = sum(weight.values * weight.itemsize for weight in self.block_trained)
        return self.blocks * per_block + sum(weight.values * weight.itemsize for weight in self.other_trained)

    @cached_property
    def largest_gradient(self) -> int:
        """Bytes of the largest gradient."""
        return max((weight.nbytes for weight in (*self.block_trained, *self.other_trained)), default=0)

    @cached_property
    def trained_index(self) -> int:
        """Place of `trained_kind` in the counts of bytes."""
        return KINDS.index(self.trained_kind)


@dataclass(frozen=True)
class Shares:
    """Bytes of one of `ranks` ranks: its shards of `frozen` and `trained` weights, and weights that are `whole` always.

    `block` is a gathered block, `others` are the gathered weights outside the blocks, `block_gradients` and
    `other_gradients` the trained ones among them, `block_largest` and `other_largest` the largest weights, all with
    what is padded so that ranks have equal parts.
    """

    ranks: int
    frozen: int
    trained: int
    whole_frozen: int
    whole_trained: int
    block: int
    others: int
    block_gradients: int
    other_gradients: int
    block_largest: int
    other_largest: int


def fsdp2_shares(sizes: Sizes, ranks: int) -> Shares:
    """Torch's `fully_shard`: each parameter by rows, so many for every rank as the first has.

    `FSDPParam._init_sharded_param` (torch/distributed/fsdp/_fully_shard/_fsdp_param.py). One of a single row, such as
    a modulation table, is whole on every rank.
    """
    return _shares(sizes, ranks, lambda weight: ceil(weight.rows, ranks) * weight.row_values, persistent=-1)


def zero3_shares(sizes: Sizes, ranks: int) -> Shares:
    """DeepSpeed's stage 3: each parameter's values in a row, in equal parts; small ones are kept whole besides.

    `Init._partition_param` (deepspeed/runtime/zero/partition_parameters.py) and `mark_persistent_parameters`
    (parameter_offload.py).
    """
    return _shares(sizes, ranks, lambda weight: ceil(weight.values, ranks), persistent=PERSISTENT_VALUES)


def zero_partition(sizes: Sizes, ranks: int) -> int:
    """Bytes of a rank's part of all trained weights in a row, whose end is padded to twice as many values as ranks.

    `nccl_start_alignment_factor` (deepspeed/runtime/zero/stage_1_and_2.py); trained weights are fp32.
    """
    return ceil(sizes.trained_bytes // 4, 2 * ranks) * 8


def zero_bucket(sizes: Sizes) -> int:
    """Bytes of the buffer in which ZeRO collects gradients to be reduced, DeepSpeed's `reduce_bucket_size`.

    2^24 values, or the largest gradient's, but no more than there are: the default, 5e8, takes 2 GB.
    """
    return min(max(4 * ZERO_BUCKET_VALUES, sizes.largest_gradient), rounded(sizes.trained_bytes))


def _shares(sizes: Sizes, ranks: int, shard: Any, persistent: int) -> Shares:
    def own(weights: Iterable[Weight]) -> int:
        return sum(rounded(shard(weight) * weight.itemsize) for weight in weights)

    def gathered(*groups: Iterable[Weight]) -> list[int]:
        moving = (weight for group in groups for weight in group if weight.values > persistent)
        return [ranks * shard(weight) * weight.itemsize for weight in moving]

    def whole(block: Iterable[Weight], other: Iterable[Weight]) -> int:
        return sizes.blocks * _small(block, persistent) + _small(other, persistent)

    block = gathered(sizes.block_frozen, sizes.block_trained)
    others = gathered(sizes.other_frozen, sizes.other_trained)
    return Shares(
        ranks,
        sizes.blocks * own(sizes.block_frozen) + own(sizes.other_frozen),
        sizes.blocks * own(sizes.block_trained) + own(sizes.other_trained),
        whole(sizes.block_frozen, sizes.other_frozen),
        whole(sizes.block_trained, sizes.other_trained),
        sum(block),
        sum(others),
        sum(ranks * shard(weight) * weight.itemsize for weight in sizes.block_trained),
        sum(ranks * shard(weight) * weight.itemsize for weight in sizes.other_trained),
        max(block, default=0),
        max(others, default=0),
    )


def _small(weights: Iterable[Weight], persistent: int) -> int:
    return _bytes(weight for weight in weights if weight.values <= persistent)


def _bytes(weights: Iterable[Weight]) -> int:
    return sum(weight.nbytes for weight in weights)
