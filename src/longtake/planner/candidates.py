"""Which strategies are worth looking at. Needs no torch and knows no model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import product
from typing import Any

from longtake.config.conflicts import conflicts, memory_conflicts
from longtake.config.schema import MemoryStrategy, ParallelConfig, RunConfig
from longtake.config.sharing import sharing_conflicts
from longtake.errors import ConfigError, Problem

CUTS = ((1, 1), (4, 4), (16, 4))
"""Slices and head groups. Four of each already take two thirds off a block; sixteen slices are the most frugal."""
SWAP_STEPS = 8
"""Block swap is tried in eighths of the blocks, so that what a small budget allows a larger one allows too."""
FRACTIONS = (0.5, 1.0)
MOST_TOKENS = 32_768
"""In a micro-batch of several clips: with more, a GPU has long been busy, and memory grows for nothing."""
LAST_RESORTS: tuple[Mapping[str, str], ...] = (
    {"optimizer": "adamw8bit"},
    {"quantization": "int8"},
    {"quantization": "nf4"},
)
"""What rounds is tried only where nothing exact fits, the most exact first."""
SAVED_BY = {"int8": 0.5, "fp8": 0.5, "nf4": 0.75, "adamw8bit": 0.75}
"""Share of the bytes of 16-bit weights, or of AdamW's states, that a type saves at most."""


@dataclass(frozen=True)
class Freedom:
    """What the user has left open: `pinned` has the fields of [memory] that are given, with their values.

    `pinned_parallel` has those of [parallel].
    """

    pinned: Mapping[str, Any] = field(default_factory=dict)
    micro_batch_size: int | None = None
    pinned_parallel: Mapping[str, Any] = field(default_factory=dict)

    def choices(self, name: str, *values: Any) -> tuple[Any, ...]:
        """The pinned value of a field, or else all of `values`."""
        return (self.pinned[name],) if name in self.pinned else values


def open_conflicts(config: RunConfig, ranks: int) -> Iterator[Problem]:
    """What cannot go together in a config that is to be planned for `ranks` ranks, whatever its plan will be.

    Where the plan chooses how many ranks share a clip, it also sees to it that the clips come out even.
    """
    batch, shared = "training.global_batch_size", ("parallel.sp", "parallel.dp_replicate")
    chosen = ranks > 1 and "sp" not in config.parallel.model_fields_set
    for problem in conflicts(config, ranks):
        if ranks == 1 and problem.where in shared:
            yield Problem(
                "one GPU has nobody to share with",
                problem.where,
                "say how many there are with --gpus",
                code="gpus-nobody-to-share",
            )
        elif not (chosen and problem.where == batch):
            yield problem
    if chosen:
        yield from (problem for problem in conflicts(config) if problem.where == batch)


def bases(
    freedom: Freedom, cut: tuple[int, int], quantized: Mapping[str, Any], coarse: bool = False
) -> Iterator[MemoryStrategy]:
    """Strategies without block swap, each of another way to keep, cut and move, the least computation first.

    With `coarse` all is moved or nothing, and to host memory, because there is much else to choose.
    """
    modes = freedom.choices("gradient_checkpointing", "none", "block_keep_attention", "block")
    offloads = freedom.choices("activation_offload", *(("none", "host") if coarse else ("none", "host", "disk")))
    fractions = freedom.choices("activation_offload_fraction", *((1.0,) if coarse else FRACTIONS))
    optimizers = freedom.choices("optimizer_offload", False, True)
    for mode, optimizer, offload, fraction in product(modes, optimizers, offloads, fractions):
        if (offload == "none" and fraction != fractions[0]) or (mode == "none" and cut != CUTS[0]):
            continue
        fields = {
            **{name: value for name, value in freedom.pinned.items() if name not in ("block_swap", "block_swap_from")},
            "gradient_checkpointing": mode,
            "activation_offload": offload,
            "activation_offload_fraction": fraction if offload != "none" else 1.0,
            "optimizer_offload": optimizer,
            "slices": cut[0],
            "attention_head_groups": cut[1],
            **quantized,
        }
        strategy = MemoryStrategy(**fields)
        if not [*memory_conflicts(strategy)]:
            yield strategy


def sharings(
    freedom: Freedom, usual: Sequence[ParallelConfig], ranks: int, heads: int, clips: int
) -> list[ParallelConfig]:
    """`usual` ways to share out the work with what is pinned put in, those with which `clips` clips come out even.

    An engine that is not installed is proposed only where it is pinned. Raises ConfigError where none can work.
    """
    wanted = [*dict.fromkeys(each.model_copy(update={**freedom.pinned_parallel}) for each in usual)]
    refused = [[*sharing_conflicts(MemoryStrategy(), each, ranks, heads)] for each in wanted]
    possible = [each for each, problems in zip(wanted, refused, strict=True) if not problems]
    if not possible:
        raise ConfigError(refused[0])
    if "strategy" not in freedom.pinned_parallel and find_spec("deepspeed") is None:
        possible = [each for each in possible if not each.strategy.startswith("deepspeed")]
    size = freedom.micro_batch_size or 1
    even = [each for each in possible if clips % (size * (ranks // each.sp)) == 0]
    if not even:
        unit = size * ranks // max(each.sp for each in possible)
        what = f"{clips} clips a step do not come out even on {ranks} GPUs"
        raise ConfigError(
            Problem(
                what,
                "training.global_batch_size",
                f"use {-(-clips // unit) * unit}, or other --gpus",
                code="batch-not-divisible",
            )
        )
    return even


def allowed(wanted: MemoryStrategy, parallel: ParallelConfig, ranks: int, heads: int) -> MemoryStrategy:
    """`wanted` without what cannot go together with `parallel`."""
    problems = sharing_conflicts(wanted, parallel, ranks, heads)
    refused = {problem.where.removeprefix("memory.") for problem in problems if problem.where.startswith("memory.")}
    if "block_swap" in refused:
        refused.add("block_swap_from")
    return wanted.model_copy(update={name: MemoryStrategy.model_fields[name].default for name in refused})


def cuts(freedom: Freedom, heads: int, drops_out: bool) -> tuple[tuple[int, int], ...]:
    """Slices and head groups to try, coarser ones first."""
    if "slices" in freedom.pinned or "attention_head_groups" in freedom.pinned:
        return ((freedom.pinned.get("slices", 1), freedom.pinned.get("attention_head_groups", 1)),)
    if drops_out or freedom.pinned.get("checkpoint_every", 1) > 1:
        return (CUTS[0],)
    return tuple(dict.fromkeys((slices, min(groups, heads)) for slices, groups in CUTS))


def frugal(blocks: int, frozen: bool, cut: tuple[int, int]) -> dict[str, Any]:
    """Fields of [memory] with which a model of `blocks` blocks holds least, wherever what is moved may wait."""
    fields: dict[str, Any] = {"gradient_checkpointing": "block", "activation_offload_fraction": 1.0}
    if frozen and blocks > 2:
        fields["block_swap"] = blocks
    return fields | {"slices": cut[0], "attention_head_groups": cut[1]}


def swaps(freedom: Freedom, blocks: int, every: int) -> tuple[int, ...]:
    """Numbers of swapped blocks to try, rising; a ring that saves nothing is left out."""
    if "block_swap" in freedom.pinned:
        return (freedom.pinned["block_swap"],)
    steps = sorted({blocks * step // SWAP_STEPS for step in range(1, SWAP_STEPS + 1)})
    return (0, *(number for number in steps if number > every + 1))


def micro_batches(freedom: Freedom, clips: int, tokens: int) -> tuple[int, ...]:
    """Sizes of micro-batches that `clips` clips of `tokens` tokens each come out even with."""
    if freedom.micro_batch_size is not None:
        return (freedom.micro_batch_size,)
    return tuple(
        size for size in range(1, clips + 1) if clips % size == 0 and (size == 1 or size * tokens <= MOST_TOKENS)
    )
