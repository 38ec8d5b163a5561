"""Puts a MemoryStrategy on a transformer, on real or on `meta` tensors, and takes it off again."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from torch import nn

from longtake.config.conflicts import memory_conflicts
from longtake.config.schema import MemoryStrategy
from longtake.errors import ConfigError
from longtake.memory.activation_offload import Offload, activation_offload
from longtake.memory.gradient_checkpointing import gradient_checkpointing
from longtake.models.spec import ModelSpec


@contextmanager
def apply(transformer: nn.Module, spec: ModelSpec, strategy: MemoryStrategy, scratch: Path) -> Iterator[None]:
    """`strategy` holds for `transformer` inside the context; `scratch` is a folder for what goes to disk.

    Raises ConfigError where the strategy cannot work.
    """
    if found := [*memory_conflicts(strategy)]:
        raise ConfigError(found)
    with ExitStack() as features:
        offload: Offload | None = None
        if strategy.activation_offload != "none":
            folder = scratch if strategy.activation_offload == "disk" else None
            offload = features.enter_context(activation_offload(folder))
        if strategy.gradient_checkpointing != "none":
            blocks = getattr(transformer, spec.blocks)
            fraction = strategy.activation_offload_fraction
            moved = round(len(blocks) * fraction) if offload else 0
            features.enter_context(gradient_checkpointing(transformer, blocks, offload, moved))
        yield
