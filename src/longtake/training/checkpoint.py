"""Checkpoints: staged, synced, hashed, renamed; the newest valid one is found, the last ones are kept.

A folder `checkpoints/step-00000100` holds `trained.safetensors`, `optimizer.safetensors`, `ema.safetensors` where there
is an average, `state.json`, and `manifest.json` with the hash of each, written last. Several ranks write a file each,
`trained-00001-of-00002.safetensors`; of a tensor that none of them has whole, each writes the values that it has. What
was written by any number of ranks under any engine is read by any other. Of a model of two transformers, names begin
with `transformer:` or `transformer_2:`.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from longtake import files
from longtake.distributed.backend import Held
from longtake.distributed.pieces import Group
from longtake.distributed.ranks import ALONE, Ranks
from longtake.errors import Problem, RunError
from longtake.training.tensor_files import TensorFiles, write_pieces

FOLDER = "checkpoints"


@dataclass(frozen=True)
class Checkpoint:
    """What a run continues from after `step` updates; tensors are read from `folder` when they are asked for."""

    step: int
    folder: Path
    state: Mapping[str, Any]

    def of(self, group: Group, prefix: str = "") -> TensorFiles:
        """The tensors of a group, by parameter name; of a group that was not saved none.

        `prefix` is what an expert's names begin with where there are several.
        """
        return TensorFiles(self.folder, group, prefix)

    def tensors(self, group: Group) -> dict[str, Tensor]:
        """All of them, whole, on the CPU."""
        found = self.of(group)
        return {name: found.whole(name) for name in found.names()}


def save_checkpoint(
    run: Path, step: int, held: Held, state: Mapping[str, Any], keep: int, ranks: Ranks = ALONE
) -> Path:
    """Writes the checkpoint after `step` updates and then removes all but the newest `keep`; every rank calls it.

    Each rank writes what it holds, and the first one the rest. Raises RunError on all where the disk refuses one.
    """
    folder = checkpoint_path(run, step)
    staged = ranks.first(lambda: _begun(folder))
    try:
        described = ranks.together(lambda: _written(staged, step, held, state, ranks))
        ranks.first(lambda: files.finish_folder(staged, folder, {k: v for each in described for k, v in each.items()}))
    except RunError:
        if ranks.is_first:
            shutil.rmtree(staged, ignore_errors=True)
        raise
    if ranks.is_first:
        _remove_old(run, keep)
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
    return Checkpoint(state.pop("step"), path, state)


def checkpoint_path(run: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` updates."""
    return run / FOLDER / f"step-{step:08d}"


def _begun(folder: Path) -> Path:
    if folder.exists():  # one that was found damaged when the run was resumed before it
        shutil.rmtree(folder)
    return files.begin_folder(folder)


def _written(staged: Path, step: int, held: Held, state: Mapping[str, Any], ranks: Ranks) -> dict[str, dict[str, Any]]:
    """What the manifest says of this rank's files, which are on the disk then."""
    own: list[Path] = []
    with files.refusals(checkpoint_path(staged.parent.parent, step)):
        for group, pieces in held.items():
            file = staged / (f"{group}.safetensors" if ranks.world == 1 else _shard(group, ranks))
            if write_pieces(file, [piece for piece in pieces if piece.saved]):
                own.append(file)
        if ranks.is_first:
            own.append(staged / "state.json")
            own[-1].write_text(json.dumps({"step": step, **state}, indent=1))
        return files.described(own)


def _shard(group: Group, ranks: Ranks) -> str:
    return f"{group}-{ranks.rank + 1:05d}-of-{ranks.world:05d}.safetensors"


def _remove_old(run: Path, keep: int) -> None:
    for old in _all(run)[:-keep]:
        # renamed first, so that a kill while removing leaves nothing that looks like a checkpoint
        gone = old.with_name(f"{old.name}{files.STAGED}removed")
        old.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def _all(run: Path) -> list[Path]:
    """Checkpoints by step, oldest first."""
    return sorted(path for path in (run / FOLDER).glob("step-*") if files.STAGED not in path.name)
