# ruff: noqa: F722
"""An adapter's state against the weights that it changes: whether it fits, and merging it into them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from longtake.errors import ModelError, Problem

if TYPE_CHECKING:
    from jaxtyping import Float

_SHOWN = 3


def check_fits(state: Mapping[str, Float[Tensor, "_ _"]], transformer: nn.Module) -> None:
    """Raises ModelError that names the first layers where `state` does not fit `transformer`."""
    if problems := [*_misfits(state, transformer)]:
        raise ModelError(shortened(problems))


def merge(transformer: nn.Module, state: Mapping[str, Float[Tensor, "_ _"]], alpha: float) -> None:
    """Adds alpha / rank * B A to the weights of a `transformer` that carries no adapter, in place.

    The sum is formed in fp32 and rounded once to the weight's type. Raises ModelError where `state` does not fit.
    """
    check_fits(state, transformer)
    with torch.no_grad():
        for name in modules_of(state):
            weight = transformer.get_parameter(f"{name}.weight")
            down, up = (
                state[f"{name}.{half}.weight"].to(weight.device, torch.float32) for half in ("lora_A", "lora_B")
            )
            weight.copy_(torch.addmm(weight.float(), up, down, alpha=alpha / down.shape[0]))


def modules_of(state: Mapping[str, Float[Tensor, "_ _"]]) -> tuple[str, ...]:
    """Names of the layers that `state` adapts, in order."""
    return tuple(dict.fromkeys(key.rpartition(".lora_")[0] for key in state))


def shortened(problems: Sequence[Problem]) -> list[Problem]:
    """The first few of `problems`, the last of them saying how many more there are."""
    if len(problems) <= _SHOWN:
        return list(problems)
    return [*problems[:_SHOWN], Problem(f"and {len(problems) - _SHOWN} more of this kind")]


def _misfits(state: Mapping[str, Float[Tensor, "_ _"]], transformer: nn.Module) -> Iterator[Problem]:
    for name in modules_of(state):
        down, up = state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"]
        layer = _base(transformer, name)
        if layer is None:
            yield Problem("the LoRA adapts a layer that the model does not have", name, "is it a LoRA of this model?")
        elif (up.shape[0], down.shape[1]) != tuple(layer.weight.shape):
            yield Problem(
                f"the LoRA is made for a layer of {up.shape[0]}x{down.shape[1]}, the model's has"
                f" {layer.weight.shape[0]}x{layer.weight.shape[1]}",
                name,
                "is it a LoRA of this model?",
            )


def _base(transformer: nn.Module, name: str) -> nn.Linear | None:
    """The linear layer called `name`, under a peft layer if one is attached."""
    try:
        module = transformer.get_submodule(name)
    except AttributeError:
        return None
    module = getattr(module, "base_layer", module)
    return module if isinstance(module, nn.Linear) else None
