"""Checkpoints: staged, synced, hashed, renamed; the newest valid one is found, the last ones are kept.

A folder `checkpoints/step-00000100` holds `trained.safetensors`, `optimizer.safetensors`, `ema.safetensors` where there
is an average, `state.json`, and `manifest.json` with the hash of each, written last. Several ranks write a file each,
`trained-00001-of-00002.safetensors`; of a tensor that none of them has whole, each writes the values that it has. What
was written by any number of ranks under any engine is read by any other. Of a model of two transformers, names begin
with `transformer:` or `transformer_2:`.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from longtake import disk, files
from longtake.distributed.backend import Held
from longtake.distributed.pieces import Group
from longtake.distributed.ranks import ALONE, Ranks
from longtake.errors import Problem, RunError
from longtake.training.tensor_files import TensorFiles, write_pieces
from longtake.units import format_bytes

FOLDER = "checkpoints"
HEADER_BYTES = 100
"""What a file says of a tensor beside its name and its values, at most but for enormous shapes."""


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
    with files.removed_on_failure([staged] if ranks.is_first else []):
        described = ranks.together(lambda: _written(staged, {"step": step, **state}, held, ranks))
        ranks.first(lambda: files.finish_folder(staged, folder, {k: v for each in described for k, v in each.items()}))
    ranks.first(lambda: _remove_old(run, keep))
    return folder


def held_bytes(held: Held) -> int:
    """About what this rank's files of a checkpoint take."""
    saved = (piece for pieces in held.values() for piece in pieces if piece.saved)
    return sum(piece.values.nbytes + len(piece.name) + HEADER_BYTES for piece in saved)


def check_room(run: Path, held: Held, keep: int, say: Callable[[str], None], ranks: Ranks = ALONE) -> None:
    """Says where the disk has no room for all the checkpoints that are to be there at a time; every rank calls it.

    Raises RunError on all where it has none for the next.
    """
    (summed,) = ranks.summed(float(held_bytes(held)))
    needed = int(summed)

    def look() -> None:
        with files.refusals(run):
            free = files.free_bytes(run)
        if free < needed:
            what = f"a checkpoint takes {format_bytes(needed)} and {format_bytes(free)} are free there"
            raise RunError(Problem(what, str(run), "make room, then continue with --resume", code="disk-full"))
        to_come = keep + 1 - len(_all(run))  # the new one is written before the oldest goes
        if free < to_come * needed:
            room = f"{to_come} checkpoints of {format_bytes(needed)} and {format_bytes(free)} are free"
            say(f"{run}: the disk may become full: there are to be {room}; make room, or lower output.keep")

    ranks.first(look)


def load_newest(run: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that is whole; damaged ones are said. None where a run has none yet.

    Raises RunError where there are checkpoints and all of them are damaged.
    """
    found = _all(run)
    for path in reversed(found):
        damage = files.damage(path)
        if damage is None:
            checkpoint = load_checkpoint(path)
            if path == checkpoint_path(run, checkpoint.step):
                return checkpoint
            damage = f"it is the one after step {checkpoint.step}"
        say(f"{path}: the checkpoint is damaged ({damage}); trying the one before")
    if found:
        raise RunError(
            Problem("all checkpoints are damaged", str(run / FOLDER), "start a new run", code="checkpoint-all-damaged")
        )
    return None


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads one checkpoint that is known to be whole; raises RunError where its state is none that a run writes."""
    try:
        state = dict(json.loads((path / "state.json").read_text(encoding="utf-8")))
        return Checkpoint(int(state.pop("step")), path, state)
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        what = f"this is no state of a run ({type(error).__name__})"
        remedy = "go back to another checkpoint: remove this one"
        raise RunError(Problem(what, str(path / "state.json"), remedy, code="checkpoint-unreadable")) from error


def checkpoint_path(run: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` updates."""
    return run / FOLDER / f"step-{step:08d}"


def _begun(folder: Path) -> Path:
    if folder.exists():  # one that was found damaged when the run was resumed before it
        files.discard_folder(folder)
    return files.begin_folder(folder)


def _written(staged: Path, state: Mapping[str, Any], held: Held, ranks: Ranks) -> dict[str, dict[str, Any]]:
    """What the manifest says of this rank's files, which are on the disk then."""
    own: list[Path] = []
    where = checkpoint_path(staged.parent.parent, state["step"])
    with files.refusals(where, held_bytes(held)), files.removed_on_failure(own):
        for group, pieces in held.items():
            saved = [piece for piece in pieces if piece.saved]
            if saved:
                own.append(staged / (f"{group}.safetensors" if ranks.world == 1 else _shard(group, ranks)))
                with disk.writing(own[-1]):
                    write_pieces(own[-1], saved)
        if ranks.is_first:
            own.append(staged / "state.json")
            with disk.writing(own[-1]):
                own[-1].write_text(json.dumps(state, indent=1), encoding="utf-8")
        return files.described(own)


def _shard(group: Group, ranks: Ranks) -> str:
    return f"{group}-{ranks.rank + 1:05d}-of-{ranks.world:05d}.safetensors"


def _remove_old(run: Path, keep: int) -> None:
    for old in _all(run)[:-keep]:
        files.discard_folder(old)


def _all(run: Path) -> list[Path]:
    """Checkpoints by step, oldest first."""
    return sorted(path for path in (run / FOLDER).glob("step-*") if files.STAGED not in path.name)
