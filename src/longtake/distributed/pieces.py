"""What a rank holds of the tensors of a run, in a form that no engine shows in: stretches of named, flat tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal, TypeAlias

from torch import Tensor

Group: TypeAlias = Literal["trained", "optimizer", "ema"]
Read: TypeAlias = Callable[[Mapping[str, tuple[int, Tensor]]], None]
"""Fills flat tensors, each with the values of the parameter of that name from the given one on."""


@dataclass(frozen=True)
class Piece:
    """Values from `start` on, in row-major order, of the tensor `name` of `shape`.

    `values` [length] is the memory that the run computes with: what is written there is trained on. `saved` says
    whether this rank is the one of those that hold the piece that writes it into a checkpoint.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    values: Tensor
    saved: bool = True

    @property
    def stop(self) -> int:
        """The first value behind it."""
        return self.start + self.values.numel()

    @property
    def is_whole(self) -> bool:
        """Whether it is all of the tensor."""
        return self.values.numel() == prod(self.shape)


def whole(name: str, tensor: Tensor, saved: bool = True) -> Piece:
    """A tensor that a rank has all of."""
    return Piece(name, tuple(tensor.shape), 0, flat(tensor), saved)


def shape_of(parameter: Tensor) -> tuple[int, ...]:
    """The whole parameter's shape, of which DeepSpeed's stage 3 leaves an empty row in its place."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def flat(tensor: Tensor) -> Tensor:
    """`tensor` in a row, in the same memory."""
    return tensor.detach().view(-1)
