"""Puts a MemoryStrategy on a transformer, on real or on `meta` tensors, and takes it off again."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from longtake.config.conflicts import memory_conflicts
from longtake.config.schema import MemoryStrategy
from longtake.errors import ConfigError, Problem
from longtake.memory.activation_offload import activation_offload, keep_first
from longtake.memory.block_swap import block_swap, make_resident, resident_blocks
from longtake.memory.block_weights import Waiting, slots_for
from longtake.memory.copies import Copies, MetaCopies, copies_for
from longtake.memory.gradient_checkpointing import gradient_checkpointing
from longtake.memory.host_buffers import DiskTier, HostTier, Keep, disk_tier, keep_on_device
from longtake.memory.keep_attention import keep_attention
from longtake.memory.quantization import quantize_blocks
from longtake.memory.slices import slices
from longtake.memory.turns import Turns, in_turns
from longtake.models.spec import Exchange, ModelSpec
from longtake.models.weight_files import WeightFile

MOST_FRUGAL_SLICES = 16
"""More gain nothing: queries, keys, values and their gradients remain."""
MOST_FRUGAL_HEAD_GROUPS = 4


@dataclass(frozen=True)
class Among:
    """What a transformer shares, with other ranks: the tokens of each clip, if there is an `exchange`; the `weights`,
    which an engine moves. With transformers of its shape, one of which is used at a time: the buffers of `turns`.
    """

    exchange: Exchange | None = None
    weights: bool = False
    turns: Turns | None = None


ALONE = Among()


@contextmanager
def apply(
    transformer: Any,
    spec: ModelSpec,
    strategy: MemoryStrategy,
    scratch: Path,
    weight_files: Mapping[str, WeightFile] | None = None,
    copies: Copies | None = None,
    among: Among = ALONE,
) -> Iterator[None]:
    """`strategy` holds for `transformer` inside the context; quantised weights stay so afterwards.

    `scratch` is a folder for what goes to disk, and this process's own. `weight_files` tells where the transformer's
    parameters lie in safetensors files. `copies` are the device's own without it. `among` says what it
    shares with other ranks and transformers. Raises ConfigError where the strategy cannot work, RunError where host or
    disk refuse.
    """
    blocks = getattr(transformer, spec.blocks)
    if found := [
        *memory_conflicts(strategy),
        *_unfit(strategy, blocks, spec),
        *_unfit_fallbacks(strategy, blocks, spec),
        *_ignored(strategy, among),
    ]:
        raise ConfigError(found)
    if strategy.quantization != "none":
        quantize_blocks(transformer, spec, strategy.quantization)
    with ExitStack() as features:
        if among.turns is not None:
            copies = among.turns.copies
        elif copies is None and (strategy.activation_offload != "none" or strategy.block_swap):
            copies = copies_for(next(transformer.parameters()).device)
            features.callback(copies.close)
        kept = _kept(strategy, copies, scratch, among.turns, features)
        keep_for = features.enter_context(keeping(strategy, len(blocks), copies, kept))
        files = (f"{spec.blocks}.", weight_files or {})
        if strategy.block_swap or among.turns is not None:
            assert copies is not None
            tier = _tier(strategy.block_swap_from, "weights", copies, scratch, features)
            waiting = Waiting(copies, tier, *files)
            features.enter_context(_coming_and_going(transformer, blocks, strategy, waiting, among.turns))
        elif not among.weights:
            make_resident(blocks, 0, next(transformer.parameters()).device, files)
        features.enter_context(recomputing(transformer, spec, strategy, keep_for, among.exchange))
        yield


def ladder(strategy: MemoryStrategy, transformer: nn.Module, spec: ModelSpec) -> tuple[MemoryStrategy, ...]:
    """Strategies to go on with after running out of memory under `strategy`, each more frugal than the one before."""
    blocks = getattr(transformer, spec.blocks)
    frozen = not all(parameter.requires_grad for parameter in blocks.parameters())
    slices = max(strategy.slices, MOST_FRUGAL_SLICES)
    groups = max(strategy.attention_head_groups, min(spec.heads, MOST_FRUGAL_HEAD_GROUPS))
    changes: tuple[dict[str, Any], ...] = (
        {"gradient_checkpointing": "block", "checkpoint_every": 1},
        {"activation_offload": "host", "activation_offload_fraction": 1.0}
        if strategy.activation_offload == "none"
        else {"activation_offload_fraction": 1.0},
        {"block_swap": len(blocks)} if frozen else {},
        {} if _drops_out(blocks) else {"slices": slices, "attention_head_groups": groups},
    )
    rungs, last = [], strategy
    for change in changes:
        rung = last.model_copy(update=change)
        if rung != last and not [*memory_conflicts(rung), *_unfit(rung, blocks, spec)]:
            rungs.append(rung.model_copy(update={"fallbacks": ()}))
        last = rung
    return tuple(rungs)


def unfit(strategy: MemoryStrategy, shape: tuple[int, int], frozen: bool, drops_out: bool) -> Iterator[Problem]:
    """What a model of `shape` (blocks, heads) does not allow, whose blocks have frozen weights, or draw dropout."""
    blocks, heads = shape
    if strategy.block_swap > blocks:
        yield Problem(
            f"the model has {blocks} blocks", "memory.block_swap", f"at most {blocks}", code="block-swap-too-many"
        )
    if strategy.block_swap and not frozen:
        yield Problem(
            "all weights are trained, none can be streamed",
            "memory.block_swap",
            "leave it out",
            code="weights-trained-and-streamed",
        )
    if strategy.attention_head_groups > heads:
        yield Problem(
            f"the model has {heads} heads",
            "memory.attention_head_groups",
            f"at most {heads}",
            code="head-groups-too-many",
        )
    if (strategy.slices > 1 or strategy.attention_head_groups > 1) and drops_out:
        what = "a block in slices would draw its dropout differently"
        yield Problem(what, "memory.slices", "leave out lora.dropout, or the slices", code="dropout-drawn-apart")


def _unfit(strategy: MemoryStrategy, blocks: nn.ModuleList, spec: ModelSpec) -> Iterator[Problem]:
    """What the model at hand does not allow."""
    frozen = not all(parameter.requires_grad for parameter in blocks.parameters())
    return unfit(strategy, (len(blocks), spec.heads), frozen, _drops_out(blocks))


def _unfit_fallbacks(strategy: MemoryStrategy, blocks: nn.ModuleList, spec: ModelSpec) -> Iterator[Problem]:
    for index, rung in enumerate(strategy.fallbacks):
        for problem in _unfit(rung, blocks, spec):
            where = problem.where.replace("memory", f"memory.fallbacks[{index}]", 1)
            yield replace(problem, where=where)


def _ignored(strategy: MemoryStrategy, among: Among) -> Iterator[Problem]:
    """Weights wait somewhere only if some are away: those of swapped blocks, or of another transformer's."""
    if strategy.block_swap_from != "host" and not strategy.block_swap and among.turns is None:
        yield Problem(
            "it would be ignored", "memory.block_swap_from", "set memory.block_swap", code="config-key-ignored"
        )


def _drops_out(blocks: nn.ModuleList) -> bool:
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in blocks.modules())


@contextmanager
def _coming_and_going(
    transformer: Any, blocks: nn.ModuleList, strategy: MemoryStrategy, waiting: Waiting, turns: Turns | None
) -> Iterator[None]:
    """Inside the context swapped blocks' weights are on the device for their use, all others for the transformer's."""
    number, every = strategy.block_swap, strategy.checkpoint_every
    with ExitStack() as features:
        if turns is None:
            device = next(transformer.parameters()).device
            make_resident(blocks, number, device, (waiting.prefix, waiting.files))
        else:
            features.enter_context(in_turns(turns, transformer, blocks, resident_blocks(len(blocks), number), waiting))
        if number:
            if turns is not None and not turns.streaming:
                turns.streaming = slots_for(blocks, every + 1, waiting.copies)
            ring = features.enter_context(
                block_swap(blocks, number, every, waiting, turns.streaming if turns is not None else None)
            )
            features.callback(transformer.register_forward_pre_hook(lambda *_: ring.begin()).remove)
        yield


@contextmanager
def keeping(
    strategy: MemoryStrategy, count: int, copies: Copies | None, tier: HostTier | DiskTier | None
) -> Iterator[Callable[[int], Keep]]:
    """Yields how a segment, by its number, of a model of `count` blocks keeps what is its own until backward.

    What is moved is moved by `copies` to `tier`.
    """
    if strategy.activation_offload == "none":
        yield lambda _segment: keep_on_device
        return
    assert copies is not None
    assert tier is not None
    with activation_offload(copies, tier) as moving:
        segments = -(-count // strategy.checkpoint_every)
        yield keep_first(round(segments * strategy.activation_offload_fraction), moving, keep_on_device)


def kept_in(
    strategy: MemoryStrategy, copies: Copies | None, scratch: Path, features: ExitStack
) -> HostTier | DiskTier | None:
    """Where activations that are moved wait, for as long as `features`."""
    if strategy.activation_offload == "none" or copies is None:
        return None
    return _tier(strategy.activation_offload, "activations", copies, scratch, features)


def _kept(
    strategy: MemoryStrategy, copies: Copies | None, scratch: Path, turns: Turns | None, features: ExitStack
) -> HostTier | DiskTier | None:
    """`kept_in`, which transformers that take turns need once: none keeps anything beyond its turn."""
    if turns is None:
        return kept_in(strategy, copies, scratch, features)
    turns.kept = turns.kept or kept_in(strategy, copies, scratch, features)
    return turns.kept


@contextmanager
def recomputing(
    transformer: Any,
    spec: ModelSpec,
    strategy: MemoryStrategy,
    keep_for: Callable[[int], Keep],
    exchange: Exchange | None = None,
) -> Iterator[None]:
    """Inside the context a block keeps by `keep_for` what `strategy` says, and computes all else again in backward.

    Under any strategy what is the same for many tokens is there once.
    """
    blocks, every = getattr(transformer, spec.blocks), strategy.checkpoint_every
    keeps_attention = strategy.gradient_checkpointing == "block_keep_attention"
    with ExitStack() as features:
        features.enter_context(spec.token_axis().held_once(transformer))
        if strategy.gradient_checkpointing == "none":
            yield
            return
        if strategy.slices > 1 or strategy.attention_head_groups > 1:
            groups = strategy.attention_head_groups
            cut = slices(blocks, spec.stages(), strategy.slices, groups, keep_for, keeps_attention, exchange)
            features.enter_context(cut)
            yield
            return
        contexts = None
        if keeps_attention:
            of_block: Callable[[int], Keep] = lambda index: keep_for(index // every)  # noqa: E731
            contexts = features.enter_context(keep_attention(blocks, spec.self_attention, of_block))
        features.enter_context(gradient_checkpointing(transformer, blocks, every, keep_for, contexts))
        yield


def _tier(
    where: Literal["host", "disk"], purpose: str, copies: Copies, scratch: Path, features: ExitStack
) -> HostTier | DiskTier:
    if isinstance(copies, MetaCopies):
        return HostTier(copies, copies.host if where == "host" else copies.disk)
    if where == "host":
        return HostTier(copies)
    return features.enter_context(disk_tier(scratch, purpose))
