# ruff: noqa: F722
"""DoRA: each row of an adapted weight has a trained length, and a direction that the low-rank update turns.

The weight of a layer is m * (W + s B A) / |W + s B A|, row by row, with the trained magnitude m [out]
(arXiv:2402.09353, equation 5); the norm in it counts as a constant for the gradient (section 4.3 there). peft's layer
makes the whole product B A in each pass, through an identity matrix, and the norms in the weight's type, so that in
bf16 a fresh adapter is off by a rounding. This one, in its place inside peft's layer and of the same parameters, takes
the norms from |W + s B A|^2 = |W|^2 + 2 s <W, B A> + s^2 |B A|^2 in fp32, which needs W A^T [out, rank] alone. So
frozen weights may be quantised, stream through a ring of buffers, or be gathered by an engine; |W|^2 is taken when the
adapter is attached.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from longtake.lora.adapter import MAGNITUDE
from longtake.models.weight_files import WeightFile, read_weights

if TYPE_CHECKING:
    from jaxtyping import Float, Float32

NO_FILES: Mapping[str, WeightFile] = MappingProxyType({})
_AT_ONCE = 512
"""Rows, or columns, of a weight that pass through fp32 at a time."""


class Magnitude(nn.Module):
    """The trained lengths of a layer's rows, and what they and the direction add to the layer's output."""

    squares: Tensor

    def __init__(self, squares: Float32[Tensor, " out"]) -> None:
        """`squares` are those of the lengths of the frozen weight's rows, with which training starts."""
        super().__init__()
        self.weight = nn.Parameter(squares.sqrt())
        self.register_buffer("squares", squares, persistent=False)

    def forward(
        self,
        x: Float[Tensor, "*batch inputs"],
        *,
        lora_A: nn.Linear,
        lora_B: nn.Linear,
        scaling: float,
        base_layer: nn.Linear,
        base_result: Float[Tensor, "*batch out"] | None = None,
        **_ignored: Any,
    ) -> Float[Tensor, "*batch out"]:
        """What is added to `base_result`, the output for `x` of the frozen `base_layer`; without it, what x gives."""
        ratio = self.weight / self.norms(lora_A.weight, lora_B.weight, scaling, base_layer.weight)
        turned = lora_B(lora_A(x))
        if base_result is None:
            plain = linear(x, base_layer.weight)
        else:
            plain = base_result if base_layer.bias is None else base_result - base_layer.bias
        return (ratio - 1).to(plain.dtype) * plain + (ratio * scaling).to(turned.dtype) * turned

    @torch.no_grad()
    def norms(
        self,
        down: Float32[Tensor, "rank inputs"],
        up: Float32[Tensor, "out rank"],
        scaling: float,
        weight: Float[Tensor, "out inputs"],
    ) -> Float32[Tensor, " out"]:
        """Lengths of the rows of weight + scaling * up @ down; `weight` is the one whose squares these are."""
        along = linear(down.to(weight.dtype), weight).float()  # [rank, out]
        # a plan is made on `meta` tensors under the CPU's autocast
        with torch.autocast("cpu" if down.is_meta else down.device.type, enabled=False):
            across = up @ (down @ down.T)
            squares = self.squares + 2 * scaling * (up * along.T).sum(1) + scaling**2 * (up * across).sum(1)
        return squares.clamp_min(torch.finfo(torch.float32).tiny).sqrt()


def add_magnitude(
    name: str, layer: LoraLayer, adapter: str, device: torch.device | None, files: Mapping[str, WeightFile] = NO_FILES
) -> None:
    """Makes a DoRA of the adapter on peft's linear `layer`, on `device`, or else where its weight is.

    A weight on `meta` is read from that of `files` that is called as the layer `name` in the transformer.
    """
    weight = frozen_weight(name, layer, files)
    magnitude = Magnitude(row_squares(weight).to(device or weight.device))
    layer.adapter_layer_names = (*layer.adapter_layer_names, MAGNITUDE)
    layer.lora_magnitude_vector[adapter] = magnitude.requires_grad_(True)
    layer.use_dora[adapter] = True
    layer.lora_variant[adapter] = DoraLinearVariant()


def frozen_weight(name: str, layer: LoraLayer, files: Mapping[str, WeightFile]) -> Float[Tensor, "out inputs"]:
    """The weight of the layer under an adapter, from its file where it is on `meta` and there is one."""
    weight: Tensor = layer.get_base_layer().weight.detach()
    key = f"{name}.weight"
    if not weight.is_meta or key not in files:
        return weight
    empty = lambda _name: torch.empty(weight.shape, dtype=weight.dtype)  # noqa: E731
    return read_weights({key: files[key]}, empty, lambda _name, tensor: tensor)[key]


@torch.no_grad()
def row_squares(weight: Float[Tensor, "out inputs"]) -> Float32[Tensor, " out"]:
    """Squared lengths of the rows of `weight`, which may be quantised: it is seen through what it multiplies then."""
    if not is_traceable_wrapper_subclass(weight):
        return torch.cat([part.float().square().sum(1) for part in weight.split(_AT_ONCE)])
    inputs, squares = weight.shape[1], torch.zeros(weight.shape[0], device=weight.device)
    for first in range(0, inputs, _AT_ONCE):
        columns = torch.zeros(min(_AT_ONCE, inputs - first), inputs, dtype=weight.dtype, device=weight.device)
        columns[:, first:].fill_diagonal_(1)
        squares += linear(columns, weight).float().square().sum(0)
    return squares
