"""A step on several GPUs: how one rank's differs from the step of one GPU, and which engines come into question.

All of it is arithmetic over a composed step and the parameters' sizes, per rank; what waits in host memory or on disk
is one rank's too. Weights, gradients and states are shared out among all ranks, those of sequence parallelism included,
whose gradients are summed up as well, or, with `dp_replicate`, among those of a replica. Not counted: the norm for
clipping, a number from each rank, and latencies. Bytes are held to those of real ranks by
`tests/distributed/test_rank_bytes.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

from longtake.config.schema import MemoryStrategy, ParallelConfig
from longtake.config.sharing import sharing_conflicts
from longtake.planner.rank_items import FIRST_EVENT, Rank, planned
from longtake.planner.replicas import ddp, zero
from longtake.planner.sequence import Exchange, degrees, exchanged
from longtake.planner.sharded import fsdp2, zero3
from longtake.planner.shards import Sizes

if TYPE_CHECKING:
    from longtake.planner.composition import Composed

__all__ = ["Sizes", "distribute", "engines"]

Method: TypeAlias = Literal["lora", "full"]
_ENGINE_EVENTS = FIRST_EVENT + 500_000
"""Those before are of exchanges between ranks that share a clip."""


def distribute(
    composed: Composed, parallel: ParallelConfig, gpus: int, sizes: Sizes, exchange: Exchange | None = None
) -> Composed:
    """The step of one of `gpus` ranks, of which `composed` is the step if there were no engine.

    Under sequence parallelism `composed` is that of a batch of `meta_batch(..., sp=parallel.sp)`, and `exchange` says
    what ranks exchange. Under DDP it should be composed as accumulating, as the buckets are there from the start. The
    result's items are listed like those of `composed`, which may be repeated for each micro-batch.
    """
    if parallel.strategy in ("single", "auto"):
        assert gpus == 1, f"{parallel.strategy} is no engine for {gpus} GPUs"
        return composed
    assert parallel.sp == (exchange.sp if exchange else 1), "the exchange of another degree"
    if exchange is not None and exchange.sp > 1:
        rank = Rank()
        exchanged(composed.micro_batch, exchange, rank)
        composed = planned(composed, rank.taken(), composed.update, 0)
    rank = Rank(_ENGINE_EVENTS)
    match parallel.strategy:
        case "ddp":
            return ddp(composed, gpus, sizes, rank)
        case "deepspeed_stage_1" | "deepspeed_stage_2":
            stage = int(parallel.strategy[-1])
            return zero(composed, stage, parallel.offload == "optimizer", gpus, sizes, rank)
        case "fsdp2":
            return fsdp2(composed, gpus, parallel.dp_replicate, sizes, rank)
        case "deepspeed_stage_3":
            return zero3(composed, parallel.offload, gpus, sizes, rank)
        case _:
            raise AssertionError(f"no engine {parallel.strategy}")


def engines(strategy: MemoryStrategy, gpus: int, method: Method, heads: int) -> tuple[ParallelConfig, ...]:
    """The configurations worth considering for a model of `heads` heads under `strategy`, none with a conflict.

    Adapters, their gradients and states are small: sharing out them alone, as stages 1 and 2 do, gains nothing.
    """
    if gpus == 1:
        return (ParallelConfig(strategy="single"),)
    fields: list[tuple[str, str]] = [("ddp", "none"), ("fsdp2", "none"), ("deepspeed_stage_3", "none")]
    if method == "full":
        fields += [("deepspeed_stage_1", "none"), ("deepspeed_stage_2", "none")]
        fields += [("deepspeed_stage_2", "optimizer"), ("deepspeed_stage_3", "optimizer")]
    fields.append(("deepspeed_stage_3", "parameters"))
    found = [
        ParallelConfig.model_validate({"strategy": name, "offload": offload, "sp": sp})
        for sp in degrees(heads, gpus)
        for name, offload in fields
    ]
    return tuple(each for each in found if not any(sharing_conflicts(strategy, each, gpus, heads)))
