"""The exponential moving average of what is trained: each rank has that of its own part."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from longtake.distributed.backend import Backend
from longtake.distributed.pieces import Piece


class MovingAverage:
    """average = decay average + (1 - decay) value, of the weights that `backend` trains."""

    def __init__(self, backend: Backend, decay: float) -> None:
        self.backend = backend
        self.decay = decay
        with backend.tensors() as held:
            self.pieces: list[Piece] = [replace(piece, values=piece.values.clone()) for piece in held["trained"]]

    @torch.no_grad()
    def update(self) -> None:
        """Moves the averages towards the weights; to be called after each optimiser step."""
        with self.backend.tensors() as held:
            weights = [piece.values for piece in held["trained"]]
            torch._foreach_lerp_([piece.values for piece in self.pieces], weights, 1 - self.decay)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Inside the context the weights are the averages."""
        with self.backend.tensors() as held:
            kept = [piece.values.clone() for piece in held["trained"]]
        self._write([piece.values for piece in self.pieces])
        try:
            yield
        finally:
            self._write(kept)

    @torch.no_grad()
    def _write(self, values: list[Tensor]) -> None:
        with self.backend.tensors(write=True) as held:
            for piece, value in zip(held["trained"], values, strict=True):
                piece.values.copy_(value)
