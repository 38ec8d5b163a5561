"""What of [memory] and [parallel] cannot go together on so many ranks. Needs no torch."""

from collections.abc import Iterator

from longtake.config.schema import MemoryStrategy, ParallelConfig
from longtake.errors import Problem

SHARDED = ("fsdp2", "deepspeed_stage_3")
OFFLOADS = {"optimizer": ("deepspeed_stage_2", "deepspeed_stage_3"), "parameters": ("deepspeed_stage_3",)}


def sharing_conflicts(
    strategy: MemoryStrategy, parallel: ParallelConfig, ranks: int, heads: int | None = None
) -> Iterator[Problem]:
    """Every conflict on `ranks` ranks, with a model of `heads` heads where the model is known."""
    name, where = parallel.strategy, "parallel.strategy"
    if name == "single" and ranks > 1:
        remedy = 'use "auto" or an engine, or start one process'
        yield Problem(f"{ranks} ranks under 'single'", where, remedy, code="engine-of-one-rank")
    yield from _sequence(strategy, parallel, ranks, heads)
    yield from _replicas(parallel, ranks)
    if parallel.offload != "none" and name not in (*OFFLOADS[parallel.offload], "auto"):
        remedy = f'leave it out, or use parallel.strategy = "{OFFLOADS[parallel.offload][-1]}"'
        what = f"{name} does not keep it in host memory"
        yield Problem(what, "parallel.offload", remedy, code="engine-without-offload")
    if name not in ("auto", "single", "ddp"):
        yield from _engine(strategy, name)


def _sequence(strategy: MemoryStrategy, parallel: ParallelConfig, ranks: int, heads: int | None) -> Iterator[Problem]:
    sp = parallel.sp
    possible = [degree for degree in range(1, ranks + 1) if ranks % degree == 0 and degree <= (heads or ranks)]
    if sp not in possible:
        shared = f"{ranks} ranks" if heads is None else f"{ranks} ranks and {heads} heads"
        remedy = f"use one of {', '.join(map(str, possible))}"
        yield Problem(f"{shared} cannot be shared out {sp} ways", "parallel.sp", remedy, code="rank-share-uneven")
    elif heads is not None and strategy.attention_head_groups > heads // sp:
        what = f"a rank has {heads // sp} heads in attention"
        yield Problem(what, "memory.attention_head_groups", f"at most {heads // sp}", code="head-groups-too-many")


def _replicas(parallel: ParallelConfig, ranks: int) -> Iterator[Problem]:
    where, replicas = "parallel.dp_replicate", parallel.dp_replicate
    if replicas == 1:
        return
    if parallel.strategy != "fsdp2":
        what = f"{parallel.strategy} has no groups that each have all shards"
        yield Problem(what, where, 'use 1, or "fsdp2"', code="engine-without-replicas")
    elif ranks % replicas or (ranks // replicas) % parallel.sp:
        possible = [each for each in range(1, ranks + 1) if ranks % each == 0 and (ranks // each) % parallel.sp == 0]
        what = f"{ranks} ranks that share clips {parallel.sp} ways are no {replicas} groups"
        remedy = f"use one of {', '.join(map(str, possible))}" if possible else "use 1"
        yield Problem(what, where, remedy, code="rank-groups-uneven")


def _engine(strategy: MemoryStrategy, name: str) -> Iterator[Problem]:
    """What is under DDP alone, where each rank's model is as on one GPU."""
    remedy = 'leave it out, or use parallel.strategy = "ddp"'
    if strategy.block_swap:
        what = f"{name} moves the weights itself"
        yield Problem(what, "memory.block_swap", remedy, code="engine-moves-weights")
    if strategy.quantization != "none":
        what = f"{name} cannot share out quantised weights"
        yield Problem(what, "memory.quantization", remedy, code="engine-cannot-quantize")
    if strategy.optimizer_offload:
        what = f"{name} has the states itself"
        yield Problem(what, "memory.optimizer_offload", remedy, code="engine-keeps-states")
    if strategy.optimizer == "adamw8bit":
        what = f"{name} cannot share out 8-bit states"
        yield Problem(what, "memory.optimizer", remedy, code="engine-without-8bit-states")
    if strategy.checkpoint_every > 1 and name in SHARDED:
        what = f"{name} would gather the blocks of a segment once more each"
        yield Problem(what, "memory.checkpoint_every", remedy, code="engine-gathers-again")
    if name == "deepspeed_stage_3":
        for field in ("slices", "attention_head_groups"):
            if getattr(strategy, field) > 1:
                what = f"{name} gathers the weights of a layer while it is called, and a slice calls it many times"
                remedy = 'leave it out, or use parallel.strategy = "fsdp2"'
                yield Problem(what, f"memory.{field}", remedy, code="engine-gathers-again")
