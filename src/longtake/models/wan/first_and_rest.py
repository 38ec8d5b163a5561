# ruff: noqa: F722
"""What Wan derives from timesteps that differ between the first frame and the rest, held once for each of the two."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from operator import add, mul
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float


class FirstAndRest(NamedTuple):
    """Stands for a tensor [batch, tokens, ...] whose first tokens are all alike, and so are the rest of them.

    `rows` [batch, 2, ...] has what the `first` of the `tokens` tokens have and what the others have. It can what a
    time embedding has to do in diffusers' `WanTransformer3DModel` and in its blocks, whose code runs on it as it is:
    with numbers and weights it gives another one of its kind, with a hidden state [batch, tokens, dim] a tensor. A
    named tuple, since what looks for tensors in a module's arguments (engines, slices) finds those inside of it.
    """

    rows: Tensor
    first: int
    tokens: int

    @property
    def ndim(self) -> int:
        """Of the tensor that it stands for, like `device`."""
        return self.rows.ndim

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.rows.device

    def of(self, tokens: slice) -> FirstAndRest:
        """That of a part of the tokens, with the same `rows`."""
        start, stop, _ = tokens.indices(self.tokens)
        return self._replace(first=min(max(self.first - start, 0), stop - start), tokens=stop - start)

    def to(self, device: torch.device) -> FirstAndRest:
        """On a device."""
        return self._replace(rows=self.rows.to(device))

    def float(self) -> FirstAndRest:
        """In fp32."""
        return self._replace(rows=self.rows.float())

    def unflatten(self, dim: int, sizes: tuple[int, ...]) -> FirstAndRest:
        """Like a tensor's, as are the next three; the axes are those behind the tokens."""
        return self._replace(rows=self.rows.unflatten(dim, sizes))

    def unsqueeze(self, dim: int) -> FirstAndRest:
        """See `unflatten`."""
        return self._replace(rows=self.rows.unsqueeze(dim))

    def squeeze(self, dim: int) -> FirstAndRest:
        """See `unflatten`."""
        return self._replace(rows=self.rows.squeeze(dim))

    def chunk(self, count: int, dim: int) -> tuple[FirstAndRest, ...]:
        """See `unflatten`."""
        return tuple(self._replace(rows=part) for part in self.rows.chunk(count, dim))

    def __radd__(self, other: Any) -> Any:
        """A hidden state and this, or a number or a weight [1, 1, ..., dim] and this."""
        if isinstance(other, Tensor) and other.ndim == self.ndim == 3:
            return self._with(other, add)
        return self._replace(rows=other + self.rows)

    def __rmul__(self, other: Tensor) -> Tensor:  # type: ignore[override]  # nobody repeats it, which a tuple allows
        """A hidden state times this."""
        return self._with(other, mul)

    def _with(
        self, hidden_states: Float[Tensor, "batch tokens dim"], change: Callable[[Tensor, Tensor], Tensor]
    ) -> Float[Tensor, "batch tokens dim"]:
        assert hidden_states.shape[1] == self.tokens, "another clip's tokens"
        one, other = self.rows.split(1, dim=1)
        if self.first in (0, self.tokens):
            return change(hidden_states, one if self.first else other)
        if self.tokens % self.first == 0:  # whole frames, which need no copy to be put together again
            frames = self.tokens // self.first
            rows = torch.cat([one, other.expand(-1, frames - 1, -1)], dim=1).unsqueeze(2)
            return change(hidden_states.unflatten(1, (frames, self.first)), rows).flatten(1, 2)
        of_first, of_rest = hidden_states.split((self.first, self.tokens - self.first), dim=1)
        return torch.cat([change(of_first, one), change(of_rest, other)], dim=1)


@contextmanager
def first_and_rest(transformer: Any) -> Iterator[None]:
    """Inside the context timesteps [batch, tokens] are embedded, and modulate, once for the first frame and the rest.

    All tokens of a frame must have one timestep, and all frames but the first: Wan's models have no other. Velocity and
    gradients are those of the transformer alone, but for the order of sums.
    """
    call = _Call()
    embedder = transformer.condition_embedder
    hooks = [
        transformer.rope.register_forward_pre_hook(call.begin),
        embedder.register_forward_pre_hook(call.distinct, with_kwargs=True),
        # before all others, which may cut what it gives
        embedder.register_forward_hook(call.together, prepend=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Call:
    """From the beginning of a forward pass to the end of its embedding; inside of another one it has no effect."""

    def __init__(self) -> None:
        self.frames = self.tokens = 0
        self.changed = False

    def begin(self, rope: Any, arguments: tuple[Tensor]) -> None:
        """Rotary tables are made first, from the latents [batch, channels, frames, height, width]."""
        sides = [side // patch for side, patch in zip(arguments[0].shape[2:], rope.patch_size, strict=True)]
        self.frames, self.tokens = sides[0], prod(sides)

    def distinct(
        self, _embedder: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Timesteps [batch * tokens] become [batch * 4], each of two twice.

        CPUs sum products of fewer than four rows in another order: one clip alone would not be diffusers' to the bit.
        """
        timesteps, *others = arguments
        self.changed = keywords["timestep_seq_len"] == self.tokens
        if not self.changed:
            return None
        by_token = timesteps.view(-1, self.tokens)
        of_first, of_rest = by_token[:, 0], by_token[:, -1]
        four = torch.stack((of_first, of_first, of_rest, of_rest), dim=1)
        return (four.flatten(), *others), keywords | {"timestep_seq_len": 4}

    def together(self, _embedder: Any, _arguments: Any, output: tuple[Any, ...]) -> tuple[Any, ...]:
        """What was made of the timesteps goes on with the number of tokens that it is for."""
        if not self.changed or isinstance(output[0], FirstAndRest):
            return output
        embedded = (FirstAndRest(each[:, ::2], self.tokens // self.frames, self.tokens) for each in output[:2])
        return (*embedded, *output[2:])
