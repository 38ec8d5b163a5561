"""Tensors in safetensors files, whole or in pieces: written by each rank for itself, read by any for any stretch."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from longtake.distributed.pieces import Group, Piece
from longtake.errors import Problem, RunError

SHAPES = "shapes"
_PIECE = re.compile(r"(?P<name>.+)\[(?P<start>\d+):(?P<stop>\d+)\]")


def write_pieces(path: Path, pieces: Sequence[Piece]) -> None:
    """Writes `pieces`, whole tensors by their name, others as `name[start:stop]`."""
    tensors = {
        piece.name if piece.is_whole else f"{piece.name}[{piece.start}:{piece.stop}]": _shaped(piece)
        for piece in pieces
    }
    shapes = {piece.name: piece.shape for piece in pieces if not piece.is_whole}
    # one key: the library writes several in any order
    save_file(tensors, path, {SHAPES: json.dumps(shapes)} if shapes else None)


@dataclass(frozen=True)
class _Stored:
    """Where values `start` to `stop` of a tensor lie."""

    file: Path
    key: str
    start: int
    stop: int


class TensorFiles:
    """The tensors of `group` in a checkpoint's folder, however many ranks wrote them.

    They are those whose names begin with `prefix`, which they have lost here.
    """

    def __init__(self, folder: Path, group: Group, prefix: str = "") -> None:
        self.folder = folder
        self.prefix = prefix
        self.stored: dict[str, list[_Stored]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        files = [folder / f"{group}.safetensors", *sorted(folder.glob(f"{group}-*-of-*.safetensors"))]
        for file in (file for file in files if file.is_file()):
            self._read_header(file)

    def names(self) -> list[str]:
        """Of the tensors."""
        return [*self.shapes]

    def whole(self, name: str) -> Tensor:
        """A tensor, on the CPU."""
        shape = self.shapes[name]
        return self.stretch(name, 0, prod(shape)).view(shape)

    def stretch(self, name: str, start: int, stop: int) -> Tensor:
        """Values `start` to `stop` of a tensor in row-major order; raises RunError where some were not saved."""
        parts, reached = [], start
        for stored in sorted(self.stored[name], key=lambda each: each.start):
            if stored.start <= reached < stored.stop and reached < stop:
                until = min(stop, stored.stop)
                parts.append(_values(stored, reached - stored.start, until - stored.start))
                reached = until
        if reached < stop:
            what = f"{stop - reached} values of {name} are in no file"
            raise RunError(
                Problem(
                    what,
                    str(self.folder),
                    "go back to another checkpoint: remove this one",
                    code="checkpoint-incomplete",
                )
            )
        if not parts:  # no values are asked for: of those ranks that have none
            return torch.empty(0)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _read_header(self, path: Path) -> None:
        with _refusals(path), safe_open(path, framework="pt") as file:
            shapes: Mapping[str, Any] = json.loads((file.metadata() or {}).get(SHAPES, "{}"))
            for key in file.keys():  # noqa: SIM118  # it is no mapping
                if not key.startswith(self.prefix):
                    continue
                match = _PIECE.fullmatch(key)
                if match is None:
                    shape = tuple(file.get_slice(key).get_shape())
                    self._add(key, shape, _Stored(path, key, 0, prod(shape)))
                else:
                    stored = _Stored(path, key, int(match["start"]), int(match["stop"]))
                    self._add(match["name"], tuple(shapes[match["name"]]), stored)

    def _add(self, stored_name: str, shape: tuple[int, ...], stored: _Stored) -> None:
        name = stored_name.removeprefix(self.prefix)
        self.shapes[name] = shape
        self.stored.setdefault(name, []).append(stored)


def fill(pieces: Sequence[Piece], files: TensorFiles) -> Iterator[Piece]:
    """Writes what `files` has into `pieces`; gives those of which it knows nothing.

    Raises RunError, and writes no more, where a tensor was saved in another shape.
    """
    for piece in pieces:
        if piece.name not in files.shapes:
            yield piece
            continue
        if files.shapes[piece.name] != piece.shape:
            what = f"{piece.name} was saved as {list(files.shapes[piece.name])} and is {list(piece.shape)} now"
            raise RunError(
                Problem(
                    what,
                    str(files.folder),
                    "use the settings that the run was started with",
                    code="checkpoint-other-shape",
                )
            )
        with torch.no_grad():
            piece.values.copy_(files.stretch(piece.name, piece.start, piece.stop))


def _values(stored: _Stored, first: int, last: int) -> Tensor:
    with _refusals(stored.file), safe_open(stored.file, framework="pt") as file:
        found = file.get_slice(stored.key)
        if len(found.get_shape()) == 1:
            return found[first:last]
        return file.get_tensor(stored.key).view(-1)[first:last]


@contextmanager
def _refusals(path: Path) -> Iterator[None]:
    """What is none of the files that `write_pieces` writes becomes a RunError, though a manifest may vouch for it."""
    try:
        yield
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        what = f"this is no file of a checkpoint ({error})"
        remedy = "go back to another checkpoint: remove this one"
        raise RunError(Problem(what, str(path), remedy, code="checkpoint-unreadable")) from error


def _shaped(piece: Piece) -> Tensor:
    values = piece.values.detach().to("cpu")
    if not piece.shape:  # DeepSpeed counts steps once for many parameters, and the library writes no memory twice
        values = values.clone()
    return values.view(piece.shape) if piece.is_whole else values
