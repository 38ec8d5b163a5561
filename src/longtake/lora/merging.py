# ruff: noqa: F722
"""An adapter's state against the weights that it changes: whether it fits, and merging it into them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from longtake.errors import ModelError, Problem
from longtake.lora.adapter import MAGNITUDE, Adapter, State, modules_of

if TYPE_CHECKING:
    from jaxtyping import Float

_SHOWN = 3


def check_fits(state: State, transformer: nn.Module) -> None:
    """Raises ModelError that names the first layers where `state` does not fit `transformer`."""
    check_shapes(state, {name: _shape(transformer, name) for name in modules_of(state)})


def check_shapes(state: State, shapes: Mapping[str, tuple[int, ...] | None]) -> None:
    """`check_fits` against the shapes of the layers' weights; None, or no entry, where there is no such layer."""
    if problems := [*_misfits(state, shapes)]:
        raise ModelError(shortened(problems))


def merge(transformer: nn.Module, adapter: Adapter) -> None:
    """Merges `adapter` into the weights of a `transformer` that carries none, in place.

    Raises ModelError where it does not fit.
    """
    check_fits(adapter.state, transformer)
    with torch.no_grad():
        for name in adapter.modules:
            weight = transformer.get_parameter(f"{name}.weight")
            weight.copy_(merged(weight.detach(), adapter, name))


def merged(weight: Float[Tensor, "out inputs"], adapter: Adapter, name: str) -> Float[Tensor, "out inputs"]:
    """`weight` of the layer `name` with alpha / rank * B A added, the rows of a DoRA brought to their lengths.

    Formed in fp32 and rounded once to the weight's type.
    """
    down, up = (
        adapter.state[f"{name}.{half}.weight"].to(weight.device, torch.float32) for half in ("lora_A", "lora_B")
    )
    whole = torch.addmm(weight.float(), up, down, alpha=adapter.scales[name])
    magnitude = adapter.state.get(f"{name}.{MAGNITUDE}.weight")
    if magnitude is not None:
        lengths = torch.linalg.vector_norm(whole, dim=1)
        whole *= (magnitude.to(weight.device, torch.float32) / lengths)[:, None]
    return whole.to(weight.dtype)


def shortened(problems: Sequence[Problem]) -> list[Problem]:
    """The first few of `problems`, the last of them saying how many more there are."""
    if len(problems) <= _SHOWN:
        return list(problems)
    more = f"and {len(problems) - _SHOWN} more of this kind"
    return [*problems[:_SHOWN], replace(problems[_SHOWN], what=more, where="", remedy="")]


def _misfits(state: State, shapes: Mapping[str, tuple[int, ...] | None]) -> Iterator[Problem]:
    for name in modules_of(state):
        down, up = state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"]
        shape = shapes.get(name)
        if shape is None:
            what = "the LoRA adapts a layer that the model does not have"
            yield Problem(what, name, "is it a LoRA of this model?", code="lora-layer-unknown")
        elif (up.shape[0], down.shape[1]) != shape:
            yield Problem(
                f"the LoRA is made for a layer of {up.shape[0]}x{down.shape[1]}, the model's has {shape[0]}x{shape[1]}",
                name,
                "is it a LoRA of this model?",
                code="lora-layer-size-differs",
            )


def _shape(transformer: nn.Module, name: str) -> tuple[int, ...] | None:
    """Of the weight of the linear layer called `name`, under a peft layer if one is attached."""
    try:
        module = transformer.get_submodule(name)
    except AttributeError:
        return None
    module = getattr(module, "base_layer", module)
    return tuple(module.weight.shape) if isinstance(module, nn.Linear) else None
