"""Which engine a config means, put on a transformer, and the groups of ranks that share clips."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as processes
from torch import nn

from longtake.config.schema import ParallelConfig
from longtake.config.sharing import SHARDED
from longtake.distributed.backend import Backend, Named, SingleDevice
from longtake.distributed.ddp import DataParallel
from longtake.distributed.pieces import Read
from longtake.distributed.ranks import Ranks, connect_alone
from longtake.distributed.sequence_parallel import SequenceParallel
from longtake.errors import ConfigError, Problem


def chosen(parallel: ParallelConfig, ranks: Ranks) -> ParallelConfig:
    """`parallel` with an engine in place of `auto`: the simplest one, where no plan has chosen another."""
    if parallel.strategy != "auto":
        return parallel
    return parallel.model_copy(update={"strategy": "single" if ranks.world == 1 else "ddp"})


def require(parallel: ParallelConfig) -> None:
    """Raises ConfigError where the library of an engine is missing."""
    if parallel.strategy.startswith("deepspeed") and find_spec("deepspeed") is None:
        remedy = "pip install 'longtake[deepspeed]', or use \"fsdp2\""
        raise ConfigError(
            Problem("deepspeed is not installed", "parallel.strategy", remedy, code="deepspeed-not-installed")
        )


def engage(
    transformer: Any,
    parameters: Named,
    optimizer_of: Callable[[Named], torch.optim.Optimizer],
    parallel: ParallelConfig,
    ranks: Ranks,
    fp16: bool,
) -> Backend:
    """Puts the engine that `parallel` names on `transformer`; `optimizer_of` makes the optimiser of what it trains.

    A transformer for an engine of `SHARDED` must have been shared out by `shared_out` before. Every rank has to call
    it.
    """
    if parallel.strategy == "single":
        assert ranks.world == 1
        return SingleDevice(transformer, parameters, optimizer_of(parameters), fp16)
    connect_alone()
    if parallel.strategy == "ddp":
        return DataParallel(transformer, parameters, optimizer_of, ranks, fp16, waits=parallel.sp > 1)
    if parallel.strategy == "fsdp2":
        from longtake.distributed.fsdp2 import FullyShardedData

        return FullyShardedData(transformer, parameters, optimizer_of, ranks, fp16)
    from longtake.distributed.deepspeed import ZeRO

    return ZeRO(transformer, parameters, optimizer_of, parallel, ranks, fp16)


def shared_out(
    transformer: Any, blocks: nn.ModuleList, parallel: ParallelConfig, ranks: Ranks, device: torch.device, read: Read
) -> None:
    """Leaves each rank its part of all weights, for an engine of `SHARDED`; nothing is done for another.

    Weights on `meta` get their values from `read`, so that no rank ever has all of them; the others have theirs.
    """
    if parallel.strategy not in SHARDED:
        return
    connect_alone()
    if parallel.strategy == "fsdp2":
        from longtake.distributed import fsdp2

        fsdp2.shard(transformer, blocks, ranks, device, parallel.dp_replicate)
        fsdp2.materialise(transformer, device, read)
        return
    from longtake.distributed import deepspeed

    deepspeed.library()
    for index, block in enumerate(blocks):
        deepspeed.partition(block, _prefix(transformer, blocks, index), parallel, ranks, read)
    deepspeed.partition(transformer, "", parallel, ranks, read)


def _prefix(transformer: nn.Module, blocks: nn.ModuleList, index: int) -> str:
    return next(f"{name}.{index}." for name, module in transformer.named_modules() if module is blocks)


def sequence_parallel_of(parallel: ParallelConfig, ranks: Ranks, heads: int) -> SequenceParallel | None:
    """This rank's part in a group of neighbours that share clips; None where each has clips of its own."""
    if parallel.sp == 1:
        return None
    found = None
    for first in range(0, ranks.world, parallel.sp):
        members = range(first, first + parallel.sp)
        group = processes.new_group([*members])
        if ranks.rank in members:
            found = SequenceParallel(group, parallel.sp, ranks.rank - first, heads)
    return found
