"""A rank's step where weights are shared out too: torch's FSDP2 and DeepSpeed's ZeRO stage 3. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, TypeAlias

from longtake.planner.events import Compute, Item
from longtake.planner.rank_items import (
    BUFFERS,
    GRADIENTS,
    OPTIMIZER,
    WEIGHTS,
    Rank,
    ceil,
    part_of,
    planned,
    sent,
    summed,
)
from longtake.planner.shards import Shares, Sizes, fsdp2_shares, zero3_shares, zero_bucket

if TYPE_CHECKING:
    from longtake.planner.composition import Composed

Offload: TypeAlias = Literal["none", "optimizer", "parameters"]


def fsdp2(composed: Composed, ranks: int, replicas: int, sizes: Sizes, rank: Rank) -> Composed:
    """Under `fully_shard` of each block and of the model, whose own weights stay gathered until the pass has ended.

    Of several `replicas` each has all shards, among `ranks / replicas` ranks; gradients are summed up over the ranks of
    one and then, shard by shard, over the replicas.

    While a block is computed, it is there gathered, and once more: in forward the buffer that it was gathered in, which
    is freed when the next one has come, in backward that of the next one (`FSDPParamGroup.wait_for_unshard` and
    `_backward_prefetch`, torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py). Gradients of a block are whole
    until it is done, and once more in the buffer from which they are reduced and scattered, beside the next block
    (`reduce_scatter_max_input_buffers`, by default 1). They are, in every micro-batch. Autocast is on as on one GPU, so
    that gathered weights and gradients have their own types.
    """
    shares = fsdp2_shares(sizes, ranks // replicas)
    states = _scaled(sizes.optimizer + sizes.averages, shares, sizes)

    def held(item: Compute) -> list[int]:
        own, part = _with_shards(item, sizes, shares), part_of(item.label)
        own[OPTIMIZER] += states - sizes.optimizer - sizes.averages
        own[GRADIENTS] = _scaled(own[GRADIENTS], shares, sizes)
        if part == "backward":
            own[GRADIENTS] += sizes.block_gradients
            own[BUFFERS] += shares.block_gradients
        if part in ("turn", "backward"):
            own[GRADIENTS] += sizes.other_gradients
        if part != "update":
            own[BUFFERS] += shares.others * (2 if part == "prologue" else 1) + _gathered(part) * shares.block
        return own

    micro_batch = _Passes(rank, shares, "none", replicas).written(composed.micro_batch, held)
    rank.write(composed.update, held, divided_by=shares.ranks)
    return planned(composed, micro_batch, rank.taken(), 0)


def zero3(composed: Composed, offload: Offload, ranks: int, sizes: Sizes, rank: Rank) -> Composed:
    """Under ZeRO 3, weights gathered as their layers need them, in the order that an earlier step has shown.

    Gathered weights are there ahead of their use until `stage3_max_live_parameters`, the values of two blocks, are, and
    the weight with which they are, each in a buffer of its own (`stage3_allgather_sequential`: what is gathered
    together is copied out of a common buffer, which stays until the last of it is used). A layer's are released after
    it, `stage3_max_reuse_distance` being 1, but frozen ones of a block that is recomputed after its backward pass
    (`_fetch_sub_module_impl`, deepspeed/runtime/zero/partitioned_param_coordinator.py). A whole block as a leaf
    (`set_z3_leaf_modules`) would be released before its adapters' gradients are added up. Those of up to 100,000
    values, the default of `stage3_param_persistence_threshold`, are whole on each rank beside their shards.

    A rank's gradients are in a buffer of their own from the start, and flat once more in the update
    (`_prepare_fp32_grad_for_sub_group`, stage3.py); those on their way are in a bucket that is always there, in what
    it is reduced from, and before that one by one. fp32 weights have no second copy: the engine lets what is updated
    share their memory.

    `offload` to the host takes the states, the averages, a copy of trained weights and their gradients, twice: as they
    came and as they are used. "parameters" takes all shards too, which are then copied in before they are gathered.
    What is always whole stays on the device.
    """
    shares, bucket = zero3_shares(sizes, ranks), zero_bucket(sizes)
    states = _scaled(sizes.optimizer + sizes.averages, shares, sizes)

    def held(item: Compute) -> list[int]:
        own, part = _with_shards(item, sizes, shares), part_of(item.label)
        own[OPTIMIZER] += (states if offload == "none" else 0) - sizes.optimizer - sizes.averages
        own[GRADIENTS] = shares.trained * (2 if part == "update" else 1) if offload == "none" else 0
        own[BUFFERS] += bucket * (2 if part in ("turn", "backward") else 1)
        own[BUFFERS] += sizes.largest_gradient if part == "backward" else 0
        ahead = 0 if part == "update" else _ahead(item.label, shares)
        own[BUFFERS] += ahead
        if offload == "parameters":
            own[WEIGHTS] -= shares.frozen
            own[sizes.trained_index] -= shares.trained
            own[BUFFERS] += ceil(ahead, ranks)
        return own

    micro_batch = _Passes(rank, shares, offload).written(composed.micro_batch, held)
    rank.before_update(composed.update, held, shares.trained if offload == "none" else 0)
    if offload != "none":
        rank.update_in_host(shares.trained, shares.trained if offload == "optimizer" else 0)
    rank.write(composed.update, held, divided_by=ranks if offload == "none" else 0)
    if whole := shares.whole_frozen + shares.whole_trained:
        rank.wait(rank.copy("network", sent(whole, ranks), (rank.reached(),), "small weights"))
    host = 0 if offload == "none" else states + 3 * shares.trained
    if offload == "parameters":
        host += shares.frozen + shares.trained
    return planned(composed, micro_batch, rank.taken(), host)


class _Passes:
    """Writes a micro-batch: a block's weights come beside the block before it, its gradients go after it."""

    def __init__(self, rank: Rank, shares: Shares, offload: Offload, replicas: int = 1) -> None:
        self.rank, self.shares, self.offload, self.replicas = rank, shares, offload, replicas
        self.uses: list[str] = []
        self.coming = 0
        self.going: tuple[int, ...] = ()

    def written(self, items: tuple[Item, ...], held: Callable[[Compute], list[int]]) -> tuple[Item, ...]:
        """The items, with what each of them holds."""
        labels = dict.fromkeys(item.label for item in items if isinstance(item, Compute))
        self.uses = [label for label in reversed(labels) if part_of(label) in ("forward", "backward")]
        self.rank.wait(self._gather(self.shares.others, (), "others"))
        self._next(())
        label = ""
        for item in items:
            if not isinstance(item, Compute):
                self.rank.items.append(item)
                continue
            if item.label != label:
                self._between(label, item.label)
                label = item.label
            self.rank.compute(item.work, label, held(item))
        self._between(label, "")
        self._reduce(self.shares.other_gradients, self.rank.reached())
        self.rank.wait(*self.going)
        return self.rank.taken()

    def _between(self, before: str, after: str) -> None:
        """The program's moment between two parts of the step."""
        start = self.rank.reached()
        if part_of(before) == "backward":
            self._reduce(self.shares.block_gradients, start)
        if part_of(after) in ("forward", "backward"):
            self.rank.wait(self.coming)
            self._next((start,))

    def _next(self, after: tuple[int, ...]) -> None:
        if self.uses:
            self.coming = self._gather(self.shares.block, after, self.uses.pop())

    def _gather(self, nbytes: int, after: tuple[int, ...], label: str) -> int:
        if self.offload == "parameters":
            after = (self.rank.copy("inward", ceil(nbytes, self.shares.ranks), after, label),)
        return self.rank.copy("network", sent(nbytes, self.shares.ranks), after, label)

    def _reduce(self, nbytes: int, start: int) -> None:
        """After the gradients before them have gone: there is one buffer."""
        if not nbytes:
            return
        self.rank.wait(*self.going)
        self.going = (self.rank.copy("network", sent(nbytes, self.shares.ranks), (start,), "gradients"),)
        if self.replicas > 1:
            shard = ceil(nbytes, self.shares.ranks)
            self.going = (self.rank.copy("network", summed(shard, self.replicas), self.going, "gradients of replicas"),)
        if self.offload != "none":
            self.going = (self.rank.copy("outward", ceil(nbytes, self.shares.ranks), self.going, "gradients"),)


def _with_shards(item: Compute, sizes: Sizes, shares: Shares) -> list[int]:
    """The bytes on the device, of weights the shards and what is always whole."""
    own = [*item.held]
    own[WEIGHTS] += shares.frozen + shares.whole_frozen - sizes.frozen
    own[sizes.trained_index] += shares.trained + shares.whole_trained - sizes.gradients
    return own


def _scaled(nbytes: int, shares: Shares, sizes: Sizes) -> int:
    """A rank's part of what all trained weights have so much of."""
    return ceil(nbytes * shares.trained, sizes.gradients)


def _gathered(part: str) -> int:
    """Buffers of a block's size: in the block and in what is next to be, or has been."""
    return {"forward": 2, "backward": 2, "update": 0}.get(part, 1)


def _ahead(label: str, shares: Shares) -> int:
    """What DeepSpeed has gathered; the large weights outside of blocks are used before the first and after the last."""
    outside = part_of(label) in ("prologue", "turn") or label == "backward 1"
    return 2 * shares.block + max(shares.block_largest, shares.other_largest if outside else 0)
