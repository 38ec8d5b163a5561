"""Where the tokens of a clip enter a Wan transformer and where they leave it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

from torch import Tensor

from longtake.models.wan.first_and_rest import FirstAndRest, first_and_rest

Own: TypeAlias = Callable[[int], slice]
"""The part of so many tokens that is one's own."""


def held_once(transformer: Any) -> AbstractContextManager[None]:
    """Inside the context what is made of a timestep is not there for each of its tokens."""
    return first_and_rest(transformer)


def entries() -> dict[str, Callable[[Any, Own], Any]]:
    """Modules that give something for every token, and how it is cut."""
    return {"rope": _tables, "patch_embedding": _patches, "condition_embedder": _embedded}


def leaving() -> str:
    """The module that gives [batch, tokens, values of a patch], from which the velocity is put together."""
    return "proj_out"


def _patches(output: Tensor, own: Own) -> Tensor:
    """Embedded patches [batch, dim, frames, rows, columns], which the transformer lays in a row next."""
    row = output.flatten(2)
    return row[:, :, own(row.shape[2])].unflatten(2, (1, 1, -1))


def _tables(output: tuple[Tensor, ...], own: Own) -> tuple[Tensor, ...]:
    """Rotary tables [1, tokens, 1, head_dim]; copied, since a view keeps those of all tokens until backward."""
    return tuple(table[:, own(table.shape[1])].clone() for table in output)


def _embedded(output: tuple[Any, ...], own: Own) -> tuple[Any, ...]:
    """The time embedding, and what blocks make their modulation of, where tokens have timesteps of their own."""
    return (*(_own_rows(each, own) for each in output[:2]), *output[2:])


def _own_rows(embedded: Tensor | FirstAndRest, own: Own) -> Tensor | FirstAndRest:
    if isinstance(embedded, FirstAndRest):
        return embedded.of(own(embedded.tokens))
    return embedded[:, own(embedded.shape[1])] if embedded.ndim == 3 else embedded
