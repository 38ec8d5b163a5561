"""Where the tokens of a clip enter a Wan transformer and where they leave it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor

Own: TypeAlias = Callable[[int], slice]
"""The part of so many tokens that is one's own."""


def entries() -> dict[str, Callable[[Any, Own], Any]]:
    """Modules that give something for every token, and how it is cut."""
    return {"rope": _tables, "patch_embedding": _patches}


def given() -> dict[str, Callable[[tuple[Any, ...], dict[str, Any], Own], tuple[Any, dict[str, Any]]]]:
    """Modules that are given something for every token, and how the arguments of their call are cut."""
    return {"condition_embedder": _timesteps}


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


def _timesteps(arguments: tuple[Any, ...], keywords: dict[str, Any], own: Own) -> tuple[Any, dict[str, Any]]:
    """Timesteps [batch * tokens], where the first frame is given: embedded and modulated are then own tokens alone."""
    timesteps, *others = arguments
    tokens = keywords["timestep_seq_len"]
    if tokens is None:
        return arguments, keywords
    part = own(tokens)
    own_timesteps = timesteps.view(-1, tokens)[:, part].flatten()
    return (own_timesteps, *others), keywords | {"timestep_seq_len": part.stop - part.start}
