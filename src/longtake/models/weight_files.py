"""Where a parameter's bytes lie in a safetensors file, and reading them onto their final type and device."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from io import FileIO
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from longtake.errors import ModelError, Problem

STAGING_BYTES = 32 * 2**20
"""Host memory through which values pass whose type or device changes."""

_SCALED_VALUES = 2**22
"""Values that are multiplied by their scales at a time: in fp32 they take 16 MiB, and their product no more."""


@dataclass(frozen=True)
class WeightFile:
    """The `nbytes` bytes from `start` on of the file `path` are the parameter's values in `dtype`, row by row.

    With a `scale` they are its values divided by that.
    """

    path: Path
    start: int
    nbytes: int
    dtype: torch.dtype
    scale: "WeightScale | None" = None

    def holds(self, dtype: torch.dtype) -> bool:
        """Whether the bytes are those of the parameter in `dtype`, just as they are."""
        return self.scale is None and self.dtype == dtype

    def part(self, first: int, count: int) -> "WeightFile":
        """Where `count` of the values lie, from the one at `first` on."""
        size = self.dtype.itemsize
        scale = self.scale and replace(self.scale, first=self.scale.first + first)
        return replace(self, start=self.start + first * size, nbytes=count * size, scale=scale)


@dataclass(frozen=True)
class WeightScale:
    """What stored values are multiplied by: `factors` has one for each `run` of them; `first` is the first's index."""

    factors: WeightFile
    run: int
    first: int = 0


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
    scale = weight.scale
    if scale is not None:
        return _scaled(file, weight, scale, final, staging)
    file.seek(weight.start)
    if final.device.type == "cpu" and final.dtype == weight.dtype:
        _fill(file, final.view(-1), weight.path)
        return final
    values = staging.view(weight.dtype)
    for part in final.view(-1).split(values.numel()):
        _fill(file, values[: part.numel()], weight.path)
        part.copy_(values[: part.numel()])
    return final


def _scaled(file: FileIO, weight: WeightFile, scale: WeightScale, final: Tensor, staging: Tensor) -> Tensor:
    """`final` with the products of values and scales in fp32, each rounded once to its type."""
    factors = _factors(scale.factors).to(final.device)
    file.seek(weight.start)
    values, position = staging.view(weight.dtype)[:_SCALED_VALUES], scale.first
    for part in final.view(-1).split(values.numel()):
        _fill(file, values[: part.numel()], weight.path)
        stored = values[: part.numel()].to(final.device).to(torch.float32)
        part.copy_(stored.mul_(_factor_of_each(factors, scale.run, position, part.numel())))
        position += part.numel()
    return final


def _factors(place: WeightFile) -> Tensor:
    factors = torch.empty(place.nbytes // place.dtype.itemsize, dtype=place.dtype)
    with place.path.open("rb", buffering=0) as file:
        file.seek(place.start)
        _fill(file, factors, place.path)
    return factors.to(torch.float32)


def _factor_of_each(factors: Tensor, run: int, first: int, count: int) -> Tensor:
    """The factor of each of `count` values from the one at `first` on, or the only one."""
    runs = factors[first // run : (first + count - 1) // run + 1]
    if runs.numel() <= 1:
        return runs
    lengths = torch.full((runs.numel(),), run, device=runs.device)
    lengths[0] = run - first % run
    lengths[-1] -= runs.numel() * run - first % run - count
    return runs.repeat_interleave(lengths, output_size=count)


def _fill(file: FileIO, values: Tensor, path: Path) -> None:
    rest = values.view(torch.uint8).numpy().data
    while rest:
        count = file.readinto(rest)
        if not count:
            what = "the file ended early: it was changed while it was read"
            raise ModelError(Problem(what, str(path), code="weights-changed-while-read"))
        rest = rest[count:]
