"""Where a parameter's bytes lie in a safetensors file, and reading them onto their final type and device."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import FileIO
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from longtake.errors import ModelError, Problem

STAGING_BYTES = 32 * 2**20
"""Host memory through which values pass whose type or device changes."""


@dataclass(frozen=True)
class WeightFile:
    """The `nbytes` bytes from `start` on of the file `path` are the parameter's values in `dtype`, row by row."""

    path: Path
    start: int
    nbytes: int
    dtype: torch.dtype


def read_weights(
    weights: Mapping[str, WeightFile], empty: Callable[[str], Tensor], convert: Callable[[str, Tensor], Tensor]
) -> dict[str, Tensor]:
    """Every weight, in the order of the files so that the disk reads ahead: `convert` of the filled `empty` tensor.

    Plain reads: pages of a mapped file would count as the process's memory. Beyond what is returned this takes one
    tensor and `STAGING_BYTES`. Raises ModelError where a file ended early.
    """
    in_order = sorted(weights.items(), key=lambda item: (str(item[1].path), item[1].start))
    state: dict[str, Tensor] = {}
    # One for all: a new one for each tensor leaves holes in the heap, hundreds of MiB of them.
    staging = torch.empty(STAGING_BYTES, dtype=torch.uint8)
    for path, group in groupby(in_order, key=lambda item: item[1].path):
        with path.open("rb", buffering=0) as file:
            for name, weight in group:
                # no name for what is read: it would live on while the next tensor is made
                state[name] = convert(name, _filled(file, weight, empty(name), staging))
    return state


def _filled(file: FileIO, weight: WeightFile, final: Tensor, staging: Tensor) -> Tensor:
    """`final` with its values, through the bytes of `staging` where the dtype or the device differs."""
    file.seek(weight.start)
    if final.device.type == "cpu" and final.dtype == weight.dtype:
        _fill(file, final.view(-1), weight.path)
        return final
    values = staging.view(weight.dtype)
    for part in final.view(-1).split(values.numel()):
        _fill(file, values[: part.numel()], weight.path)
        part.copy_(values[: part.numel()])
    return final


def _fill(file: FileIO, values: Tensor, path: Path) -> None:
    rest = values.view(torch.uint8).numpy().data
    while rest:
        count = file.readinto(rest)
        if not count:
            raise ModelError(Problem("the file ended early: it was changed while it was read", str(path)))
        rest = rest[count:]
