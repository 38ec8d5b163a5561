# ruff: noqa: F722
"""An adapter of a lower rank: of each layer's product B A the best approximation of it (Eckart and Young 1936)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longtake.lora.adapter import MAGNITUDE, Adapter

if TYPE_CHECKING:
    from jaxtyping import Float32, Float64


@dataclass(frozen=True)
class Reduced:
    """`errors` are |D - D'| / |D| of each layer's update D, in the Frobenius norm; `error` is that of all together."""

    adapter: Adapter
    errors: dict[str, float]
    error: float

    @property
    def worst(self) -> str:
        """The layer that lost most."""
        return max(self.errors, key=lambda module: self.errors[module])


def reduced(adapter: Adapter, rank: int) -> Reduced:
    """`adapter` with at most `rank` in each layer, alpha being the rank, so that every scale is 1.

    A DoRA's lengths stay; what is approximated is its update before the rows are brought to them.
    """
    state: dict[str, Tensor] = {}
    errors, squares = {}, torch.zeros(2, dtype=torch.float64)
    for module, scale in adapter.scales.items():
        down, up = (adapter.state[f"{module}.{half}.weight"] for half in ("lora_A", "lora_B"))
        state[f"{module}.lora_A.weight"], state[f"{module}.lora_B.weight"], values = truncated(down, up, scale, rank)
        if (lengths := adapter.state.get(f"{module}.{MAGNITUDE}.weight")) is not None:
            state[f"{module}.{MAGNITUDE}.weight"] = lengths
        own = torch.stack([values[rank:].square().sum(), values.square().sum()])
        errors[module] = _quotient(own)
        squares += own
    alphas = {module: float(min(rank, own)) for module, own in adapter.ranks.items()}
    return Reduced(Adapter(state, alphas, adapter.metadata), errors, _quotient(squares))


def truncated(
    down: Float32[Tensor, "rank inputs"], up: Float32[Tensor, "out rank"], scale: float, kept: int
) -> tuple[Float32[Tensor, "kept inputs"], Float32[Tensor, "out kept"], Float64[Tensor, " rank"]]:
    """(A, B, all singular values) of the best approximation of rank `kept` of scale * up @ down.

    The singular values of B A are those of the small matrix that the triangular factors of B and of A's transpose give.
    A and B have equal norms. In double precision, rounded once.
    """
    left, left_factor = torch.linalg.qr(up.double() * scale)
    right, right_factor = torch.linalg.qr(down.double().T)
    u, values, v = torch.linalg.svd(left_factor @ right_factor.T, full_matrices=False)
    roots = values[:kept].sqrt()
    b = left @ (u[:, :kept] * roots)
    a = (right @ (v[:kept].T * roots)).T
    return a.float().contiguous(), b.float().contiguous(), values


def _quotient(squares: Tensor) -> float:
    """Of the roots of lost and whole; 0 of nothing."""
    lost, whole = squares.tolist()
    return float((lost / whole) ** 0.5) if whole else 0.0
