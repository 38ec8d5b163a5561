"""Checkpoints as plain tensors, for tests that write and compare them whole."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longtake.distributed.backend import Held, optimizer_tensors
from longtake.distributed.pieces import Group, Piece, whole
from longtake.distributed.ranks import ALONE, Ranks
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


def numbered(step: int, ema: bool = True) -> Saved:
    """A checkpoint whose values name its step."""
    weights = {"a.weight": torch.full((4, 3), float(step)), "b": torch.arange(5.0) + step}
    state = {"a.weight/exp_avg": torch.full((4, 3), step / 7), "a.weight/step": torch.tensor(float(step))}
    average = {name: tensor / 2 for name, tensor in weights.items()}
    return Saved(step, weights, state, average if ema else {}, {"backend": {"scale": 65536.0}})


def equal(one: Saved, other: Saved) -> bool:
    """Whether two checkpoints hold the same."""
    tensors = all(
        getattr(one, group).keys() == getattr(other, group).keys()
        and all(torch.equal(tensor, getattr(other, group)[name]) for name, tensor in getattr(one, group).items())
        for group in GROUPS
    )
    return tensors and (one.step, one.state) == (other.step, other.state)


def save(run: Path, saved: Saved, keep: int, ranks: Ranks = ALONE) -> Path:
    """Writes it as one process would, or as each of `ranks` that share every tensor out."""
    held: Held = {group: [_part(whole(*item), ranks) for item in getattr(saved, group).items()] for group in GROUPS}
    return save_checkpoint(run, saved.step, held, saved.state, keep, ranks)


def _part(piece: Piece, ranks: Ranks) -> Piece:
    """The rank's stretch of it; the first has what is too small to be shared out."""
    count = piece.values.numel()
    start, stop = (count * rank // ranks.world for rank in (ranks.rank, ranks.rank + 1))
    if not piece.shape:
        return replace(piece, saved=ranks.is_first)
    return replace(piece, start=start, values=piece.values[start:stop])


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
