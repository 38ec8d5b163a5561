# ruff: noqa: F722
"""How a Wan block is cut around its self-attention: its own modules, called on a slice of the tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import Tensor

from longtake.models.spec import Shared
from longtake.models.wan.first_and_rest import FirstAndRest

if TYPE_CHECKING:
    from jaxtyping import Float

SHIFT, SCALE, GATE, FFN_SHIFT, FFN_SCALE, FFN_GATE = range(6)
"""Which row of a block's modulation is what."""


def before(
    block: WanTransformerBlock, hidden_states: Float[Tensor, "batch tokens dim"], shared: Shared
) -> tuple[
    Float[Tensor, "batch heads tokens head_dim"],
    Float[Tensor, "batch heads tokens head_dim"],
    Float[Tensor, "batch heads tokens head_dim"],
]:
    """Query, key and value of a slice: normed, modulated, projected, query and key normed again and rotated."""
    _, temb, (cosines, sines) = shared
    attention, modulation = block.attn1, _modulation(block, temb)
    normed = block.norm1(hidden_states.float()) * (1 + modulation[SCALE]) + modulation[SHIFT]
    given = normed.type_as(hidden_states)
    query, key = attention.norm_q(attention.to_q(given)), attention.norm_k(attention.to_k(given))
    query, key, value = (rows.unflatten(2, (attention.heads, -1)) for rows in (query, key, attention.to_v(given)))
    query, key = _rotated(query, cosines, sines), _rotated(key, cosines, sines)
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


def after(
    block: WanTransformerBlock,
    hidden_states: Float[Tensor, "batch tokens dim"],
    attended: Float[Tensor, "batch heads tokens head_dim"],
    shared: Shared,
) -> Float[Tensor, "batch tokens dim"]:
    """The block's output for a slice: self-attention's projection, cross-attention and feed-forward, each added."""
    text, temb, _ = shared
    modulation = _modulation(block, temb)
    projection, dropout = block.attn1.to_out
    projected = dropout(projection(attended.transpose(1, 2).flatten(2)))
    hidden_states = (hidden_states.float() + projected * modulation[GATE]).type_as(hidden_states)
    normed = block.norm2(hidden_states.float()).type_as(hidden_states)
    hidden_states = hidden_states + block.attn2(normed, text, None, None)
    normed = block.norm3(hidden_states.float()) * (1 + modulation[FFN_SCALE]) + modulation[FFN_SHIFT]
    fed = block.ffn(normed.type_as(hidden_states))
    return (hidden_states.float() + fed.float() * modulation[FFN_GATE]).type_as(hidden_states)


def cut(shared: Shared, tokens: slice) -> Shared:
    """Text embedding, time embedding and rotary tables (text, temb, (cosines, sines)) for a slice of the tokens.

    A time embedding [batch, 6, dim] holds for all tokens, one of [batch, tokens, 6, dim] has a row for each; the tables
    are [1, tokens, 1, head_dim].
    """
    text, temb, (cosines, sines) = shared
    return text, _of(temb, tokens), (cosines[:, tokens], sines[:, tokens])


def _of(temb: Tensor | FirstAndRest, tokens: slice) -> Tensor | FirstAndRest:
    if isinstance(temb, FirstAndRest):
        return temb.of(tokens)
    return temb[:, tokens] if temb.ndim == 4 else temb


def _modulation(block: WanTransformerBlock, temb: Any) -> tuple[Any, ...]:
    """Six fp32 tensors [batch, 1 or tokens, dim], or what stands for such."""
    return tuple(
        row.squeeze(-2) if temb.ndim == 4 else row for row in (block.scale_shift_table + temb.float()).chunk(6, dim=-2)
    )


def _rotated(rows: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotary embedding [batch, tokens, heads, head_dim]: pairs of neighbours turned (RoFormer, arXiv:2104.09864, 34).

    The tables hold every angle twice.
    """
    even, odd = rows.unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = cosines[..., ::2], sines[..., ::2]
    turned = torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1)
    return turned.flatten(-2).type_as(rows)
