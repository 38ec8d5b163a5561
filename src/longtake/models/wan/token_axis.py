"""Where the tokens of a clip enter a Wan transformer and where they leave it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor

Own: TypeAlias = Callable[[int], slice]
"""The part of so many tokens that is one's own."""


def entries() -> dict[str, Callable[[Any, Own], Any]]:
    """Modules that give something for every token, and how it is cut."""
    return {"rope": _tables, "patch_embedding": _patches, "condition_embedder": _conditions}


def leaving() -> str:
    """The module that gives [batch, tokens, values of a patch], from which the velocity is put together."""
    return "proj_out"


def _patches(output: Tensor, own: Own) -> Tensor:
    """Embedded patches [batch, dim, frames, rows, columns], which the transformer lays in a row next."""
    row = output.flatten(2)
    return row[:, :, own(row.shape[2])].unflatten(2, (1, 1, -1))


def _tables(output: tuple[Tensor, ...], own: Own) -> tuple[Tensor, ...]:
    """Rotary tables [1, tokens, 1, head_dim]."""
    return tuple(table[:, own(table.shape[1])] for table in output)


def _conditions(output: tuple[Any, ...], own: Own) -> tuple[Any, ...]:
    """Time embedding and modulation, which have a token axis where the first frame is given; text and image stay."""
    temb, modulation, *others = output
    if temb.ndim == 3:
        temb, modulation = (rows[:, own(rows.shape[1])] for rows in (temb, modulation))
    return temb, modulation, *others
