"""A strategy in a few words. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from longtake.config.schema import MemoryStrategy, ParallelConfig

MACHINE_GPUS = 8
"""As many as a machine has at most."""
_MODES = {
    "none": "no checkpointing",
    "block": "checkpointing",
    "block_keep_attention": "checkpointing, attention kept",
}


def name_of(strategy: MemoryStrategy, parallel: ParallelConfig, blocks: int, micro_batch_size: int) -> str:
    """`checkpointing, attention kept, all to host, 35 of 40 blocks swapped, 4 slices x 4 head groups`."""
    return ", ".join(_parts(strategy, parallel, blocks, micro_batch_size))


def sharing_notes(pinned: Mapping[str, Any], gpus: int, network: float) -> Iterator[str]:
    """What has to be said of a plan for `gpus` GPUs with a network of so many bytes/s, of [parallel] `pinned`."""
    engine, offload = pinned.get("strategy", "single"), pinned.get("offload", "none")
    if gpus > MACHINE_GPUS:
        yield f"between machines the network is taken to be as fast as inside of one: {network / 1e9:.0f} GB/s each way"
    if gpus > 1:
        yield "what GPUs send each other, and what NCCL takes, is computed; none of it was measured on GPUs"
    elif engine not in ("auto", "single"):
        what = f"one GPU has nobody to share with: {engine} makes nothing smaller on it"
        if offload != "none":
            what += f", but has its {_offloaded(offload)} in host memory"
        elif engine == "deepspeed_stage_3":
            what += '; with parallel.offload = "parameters" weights wait in host memory'
        yield what


def _parts(strategy: MemoryStrategy, parallel: ParallelConfig, blocks: int, micro_batch_size: int) -> Iterator[str]:
    yield _MODES[strategy.gradient_checkpointing]
    if strategy.checkpoint_every > 1:
        yield f"every {strategy.checkpoint_every} blocks"
    if strategy.activation_offload != "none":
        share = strategy.activation_offload_fraction
        yield f"{'all' if share == 1 else f'{share:.0%}'} to {strategy.activation_offload}"
    if strategy.block_swap:
        place = " from disk" if strategy.block_swap_from == "disk" else ""
        yield f"{strategy.block_swap} of {blocks} blocks swapped{place}"
    if strategy.slices > 1 or strategy.attention_head_groups > 1:
        yield f"{strategy.slices} slices x {strategy.attention_head_groups} head groups"
    if strategy.quantization != "none":
        yield f"weights in {strategy.quantization}"
    if strategy.optimizer != "adamw":
        yield "8-bit AdamW"
    if strategy.optimizer_offload:
        yield "AdamW's states in host memory"
    if micro_batch_size > 1:
        yield f"micro-batches of {micro_batch_size}"
    if parallel.strategy not in ("auto", "single"):
        yield parallel.strategy
    if parallel.offload != "none":
        yield f"its {_offloaded(parallel.offload)} in host memory"
    if parallel.dp_replicate > 1:
        yield f"{parallel.dp_replicate} replicas"
    if parallel.sp > 1:
        yield f"sp {parallel.sp}"


def _offloaded(offload: str) -> str:
    return "parameters" if offload == "parameters" else "optimiser"
