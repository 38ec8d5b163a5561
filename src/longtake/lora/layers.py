# ruff: noqa: F722
"""peft's low-rank layers on a transformer: attached, read out, filled."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from diffusers import ModelMixin
from peft import LoraConfig as PeftConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from longtake.config.schema import LoraConfig
from longtake.errors import ModelError, Problem
from longtake.lora.adapter import MAGNITUDE, Adapter, State, scale
from longtake.lora.dora import NO_FILES, add_magnitude
from longtake.lora.merging import check_fits, shortened
from longtake.lora.targets import target_ranks
from longtake.models.weight_files import WeightFile

if TYPE_CHECKING:
    from jaxtyping import Float32

NAME = "default"
"""The adapter's name, in the names of its parameters."""
_HALVES = ("lora_A", "lora_B")


def attach(
    transformer: ModelMixin,
    lora: LoraConfig,
    seed: int,
    device: torch.device | None = None,
    files: Mapping[str, WeightFile] = NO_FILES,
) -> None:
    """Puts trainable fp32 adapters on the blocks' linear layers that `lora.targets` name and freezes all other weights.

    They are on `device`, or else where the weight of their layer is, which may be quantised or, given a `device`,
    without values. A is drawn from Kaiming's uniform distribution as a function of `seed` alone (the same on every
    device, the global random state untouched), B is zero, so that the adapter starts as the identity (LoRA,
    arXiv:2106.09685, section 4.1). A DoRA takes the lengths of rows without values from `files`, by the weights' names.
    Raises ConfigError for each target that matches nothing and for blocks that are not there.
    """
    ranks = target_ranks(transformer, lora)
    _inject(transformer, ranks, {name: scale(lora, rank) for name, rank in ranks.items()}, lora.dropout, device)
    _draw(transformer, seed)
    if lora.dora:
        for name, layer in adapted_layers(transformer):
            add_magnitude(name, layer, NAME, device, files)


def attach_adapter(transformer: ModelMixin, adapter: Adapter) -> None:
    """Puts `adapter` as it was read from a file on `transformer`; raises ModelError where it does not fit."""
    check_fits(adapter.state, transformer)
    _inject(transformer, adapter.ranks, adapter.scales)
    for name, layer in adapted_layers(transformer):
        if f"{name}.{MAGNITUDE}.weight" in adapter.state:
            add_magnitude(name, layer, NAME, None)
    load_adapter_state(transformer, adapter.state)


def adapter_state(transformer: nn.Module) -> dict[str, Float32[Tensor, "*_"]]:
    """The attached adapter, copied to the CPU in fp32: `<module>.lora_A.weight` [rank, in], `lora_B` [out, rank].

    Of a DoRA `<module>.lora_magnitude_vector.weight` [out] too.
    """
    return {key: weight.detach().to("cpu", torch.float32, copy=True) for key, weight in _weights(transformer)}


def load_adapter_state(transformer: nn.Module, state: State) -> None:
    """Fills the attached adapter from what `adapter_state` gave.

    Raises ModelError for missing, unknown and mis-shaped keys; nothing is changed then.
    """
    weights = dict(_weights(transformer))
    if problems := [*_differences(weights, state)]:
        raise ModelError(shortened(problems))
    with torch.no_grad():
        for key, weight in weights.items():
            weight.copy_(state[key])


def adapted_layers(transformer: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """The layers that have an adapter, by name."""
    for name, module in transformer.named_modules():
        if isinstance(module, LoraLayer) and NAME in module.lora_A:
            yield name, module


def _inject(
    transformer: ModelMixin,
    ranks: Mapping[str, int],
    scales: Mapping[str, float],
    dropout: float = 0.0,
    device: torch.device | None = None,
) -> None:
    assert not any(isinstance(module, LoraLayer) for module in transformer.modules()), "an adapter is attached already"
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != usual}
    config = PeftConfig(r=usual, rank_pattern=others, target_modules=list(ranks), lora_dropout=dropout, bias="none")
    transformer.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        transformer.add_adapter(config, NAME)
    for name, layer in adapted_layers(transformer):
        layer.lora_alpha[NAME], layer.scaling[NAME] = scales[name] * ranks[name], scales[name]
        for half in _HALVES:
            linear = getattr(layer, half)[NAME]
            if device is not None and linear.weight.is_meta:
                linear.to_empty(device=device)
                nn.init.zeros_(linear.weight)
            linear.to(device=device, dtype=torch.float32).requires_grad_(True)


def _draw(transformer: nn.Module, seed: int) -> None:
    """peft draws from the global generator of the CPU; a resumed or distributed run needs the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in adapted_layers(transformer):
            weight = layer.lora_A[NAME].weight
            values = torch.empty(weight.shape, dtype=torch.float32)
            weight.copy_(nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator))


def _weights(transformer: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, layer in adapted_layers(transformer):
        for part in (*_HALVES, MAGNITUDE):
            if NAME in getattr(layer, part):
                yield f"{name}.{part}.weight", getattr(layer, part)[NAME].weight


def _differences(weights: State, state: State) -> Iterator[Problem]:
    for key, weight in weights.items():
        if key not in state:
            yield Problem("the adapter's state lacks this key", key, code="adapter-weight-missing")
        elif state[key].shape != weight.shape:
            what = f"the shape is {list(state[key].shape)}, the adapter's is {list(weight.shape)}"
            yield Problem(what, key, code="adapter-weight-shape-differs")
    for key in state.keys() - weights.keys():
        yield Problem("the adapter has no such weight", key, code="adapter-weight-unknown")
