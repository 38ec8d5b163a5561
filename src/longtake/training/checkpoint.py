"""Checkpoints: staged, synced, hashed, renamed; the newest valid one is found, the last ones are kept.

A folder `checkpoints/step-00000100` holds `trained.safetensors`, `optimizer.safetensors`, `ema.safetensors` where there
is an average, `state.json`, and `manifest.json` with the hash of each, written last.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from longtake import files
from longtake.errors import Problem, RunError

FOLDER = "checkpoints"


@dataclass(frozen=True)
class Checkpoint:
    """Everything that a run continues from after `step` updates; tensors on the CPU, by parameter name."""

    step: int
    trained: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    ema: Mapping[str, Tensor]
    state: dict[str, Any]


def save_checkpoint(run: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Writes the checkpoint and then removes all but the newest `keep`; raises RunError where the disk refuses."""
    folder = checkpoint_path(run, checkpoint.step)
    if folder.exists():  # one that was found damaged when the run was resumed before it
        shutil.rmtree(folder)
    files.write_folder(folder, lambda staged: _write(staged, checkpoint))
    for old in _all(run)[:-keep]:
        # renamed first, so that a kill while removing leaves nothing that looks like a checkpoint
        gone = old.with_name(f"{old.name}{files.STAGED}removed")
        old.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
    return folder


def load_newest(run: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that is whole; damaged ones are said. None where a run has none yet.

    Raises RunError where there are checkpoints and all of them are damaged.
    """
    found = _all(run)
    for path in reversed(found):
        damage = files.damage(path)
        if damage is None:
            return load_checkpoint(path)
        say(f"{path}: the checkpoint is damaged ({damage}); trying the one before")
    if found:
        raise RunError(Problem("all checkpoints are damaged", str(run / FOLDER), "start a new run"))
    return None


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads one checkpoint that is known to be whole."""
    state = json.loads((path / "state.json").read_text())
    ema = path / "ema.safetensors"
    return Checkpoint(
        step=state.pop("step"),
        trained=load_file(path / "trained.safetensors"),
        optimizer=load_file(path / "optimizer.safetensors"),
        ema=load_file(ema) if ema.exists() else {},
        state=state,
    )


def checkpoint_path(run: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` updates."""
    return run / FOLDER / f"step-{step:08d}"


def _all(run: Path) -> list[Path]:
    """Checkpoints by step, oldest first."""
    return sorted(path for path in (run / FOLDER).glob("step-*") if files.STAGED not in path.name)


def _write(folder: Path, checkpoint: Checkpoint) -> None:
    _save(checkpoint.trained, folder / "trained.safetensors")
    _save(checkpoint.optimizer, folder / "optimizer.safetensors")
    if checkpoint.ema:
        _save(checkpoint.ema, folder / "ema.safetensors")
    (folder / "state.json").write_text(json.dumps({"step": checkpoint.step, **checkpoint.state}, indent=1))


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}, path)
