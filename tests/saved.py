"""Checkpoints as plain tensors, for tests that write and compare them whole."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from longtake.distributed.backend import Held, optimizer_tensors
from longtake.distributed.pieces import Group, whole
from longtake.training.checkpoint import load_checkpoint, save_checkpoint
from longtake.training.optimizer import allocate_states
from longtake.training.restoring import load_states
from longtake.training.tensor_files import TensorFiles, write_pieces

Tensors = Mapping[str, Tensor]
GROUPS: tuple[Group, ...] = ("trained", "optimizer", "ema")


@dataclass(frozen=True)
class Saved:
    """What one checkpoint holds."""

    step: int
    trained: Tensors
    optimizer: Tensors = field(default_factory=dict)
    ema: Tensors = field(default_factory=dict)
    state: Mapping[str, Any] = field(default_factory=dict)


def save(run: Path, saved: Saved, keep: int) -> Path:
    """Writes it as one process would."""
    held: Held = {group: [whole(*item) for item in getattr(saved, group).items()] for group in GROUPS}
    return save_checkpoint(run, saved.step, held, saved.state, keep)


def read(folder: Path) -> Saved:
    """All of a checkpoint that is known to be whole."""
    found = load_checkpoint(folder)
    return Saved(found.step, *(found.tensors(group) for group in GROUPS), found.state)


def save_states(folder: Path, tensors: Tensors) -> TensorFiles:
    """An optimiser's states in a folder, to be loaded."""
    write_pieces(folder / "optimizer.safetensors", [whole(*item) for item in tensors.items()])
    return TensorFiles(folder, "optimizer")


def restore_states(optimizer: Any, parameters: Mapping[str, nn.Parameter], files: TensorFiles) -> None:
    """As a run that is resumed does it."""
    allocate_states(optimizer)
    load_states([whole(*item) for item in optimizer_tensors(optimizer, parameters).items()], files)
