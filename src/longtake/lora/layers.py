# ruff: noqa: F722
"""peft's low-rank layers on a transformer: attached, read out, filled."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from diffusers import ModelMixin
from peft import LoraConfig as PeftConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from longtake.config.schema import LoraConfig
from longtake.errors import ConfigError, ModelError, Problem
from longtake.lora.files import Adapter
from longtake.lora.merging import check_fits, shortened
from longtake.models.wan.keys import to_original

if TYPE_CHECKING:
    from jaxtyping import Float, Float32

GROUPS = {
    "attention": tuple(f"attn{i}.{leaf}" for i in (1, 2) for leaf in ("to_q", "to_k", "to_v", "to_out.0")),
    "ffn": ("ffn.net.0.proj", "ffn.net.2"),
    "image": ("attn2.add_k_proj", "attn2.add_v_proj"),
}
"""What the words in [lora].targets stand for, as suffixes of module names."""

_NAME = "default"
_HALVES = ("lora_A", "lora_B")


def attach(transformer: ModelMixin, lora: LoraConfig, seed: int, device: torch.device | None = None) -> None:
    """Puts trainable fp32 adapters on the blocks' linear layers that `lora.targets` name and freezes all other weights.

    They are on `device`, or else where the weight of their layer is, which may be quantised or, given a `device`,
    without values. A is drawn from Kaiming's uniform distribution as a function of `seed` alone (the same on every
    device, the global random state untouched), B is zero, so that the adapter starts as the identity (LoRA,
    arXiv:2106.09685, section 4.1). Raises ConfigError for each target that matches nothing.
    """
    _inject(transformer, _targets(transformer, lora.targets), lora, device)
    _draw(transformer, seed)


def attach_adapter(transformer: ModelMixin, adapter: Adapter) -> None:
    """Puts `adapter` as it was read from a file on `transformer`; raises ModelError where it does not fit."""
    check_fits(adapter.state, transformer)
    lora = LoraConfig(rank=adapter.rank, alpha=adapter.alpha, targets=adapter.modules)
    _inject(transformer, adapter.modules, lora)
    load_adapter_state(transformer, adapter.state)


def adapter_state(transformer: nn.Module) -> dict[str, Float32[Tensor, "_ _"]]:
    """The attached adapter, copied to the CPU in fp32: `<module>.lora_A.weight` [rank, in], `lora_B` [out, rank]."""
    return {key: weight.detach().to("cpu", torch.float32, copy=True) for key, weight in _weights(transformer)}


def load_adapter_state(transformer: nn.Module, state: Mapping[str, Float[Tensor, "_ _"]]) -> None:
    """Fills the attached adapter from what `adapter_state` gave.

    Raises ModelError for missing, unknown and mis-shaped keys; nothing is changed then.
    """
    weights = dict(_weights(transformer))
    if problems := [*_differences(weights, state)]:
        raise ModelError(shortened(problems))
    with torch.no_grad():
        for key, weight in weights.items():
            weight.copy_(state[key])


def _targets(transformer: nn.Module, targets: tuple[str, ...]) -> tuple[str, ...]:
    linear = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    adaptable = [name for name in linear if name.startswith("blocks.")]
    matches = {target: [name for name in adaptable if _matches(name, target)] for target in targets}
    if missing := [target for target, names in matches.items() if not names]:
        groups = [group for group in GROUPS if any(_matches(name, group) for name in adaptable)]
        suffixes = dict.fromkeys(name.split(".", 2)[2] for name in adaptable)
        remedy = f"choose among the groups {', '.join(groups)} and the suffixes {', '.join(suffixes)}"
        raise ConfigError([Problem(f"{target!r} matches no layer", "lora.targets", remedy) for target in missing])
    chosen = {name for names in matches.values() for name in names}
    return tuple(name for name in adaptable if name in chosen)


def _matches(name: str, target: str) -> bool:
    suffixes = GROUPS.get(target, (target,))
    spellings = (name, to_original(name))
    return any(f".{spelling}".endswith(f".{suffix}") for spelling in spellings for suffix in suffixes)


def _inject(
    transformer: ModelMixin, modules: tuple[str, ...], lora: LoraConfig, device: torch.device | None = None
) -> None:
    assert not any(isinstance(module, LoraLayer) for module in transformer.modules()), "an adapter is attached already"
    config = PeftConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=list(modules), lora_dropout=lora.dropout, bias="none"
    )
    transformer.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        transformer.add_adapter(config, _NAME)
    for _, layer in _layers(transformer):
        for half in _HALVES:
            linear = getattr(layer, half)[_NAME]
            if device is not None and linear.weight.is_meta:
                linear.to_empty(device=device)
                nn.init.zeros_(linear.weight)
            linear.to(device=device, dtype=torch.float32).requires_grad_(True)


def _draw(transformer: nn.Module, seed: int) -> None:
    """peft draws from the global generator of the CPU; a resumed or distributed run needs the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in _layers(transformer):
            weight = layer.lora_A[_NAME].weight
            values = torch.empty(weight.shape, dtype=torch.float32)
            weight.copy_(nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator))


def _layers(transformer: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    for name, module in transformer.named_modules():
        if isinstance(module, LoraLayer) and _NAME in module.lora_A:
            yield name, module


def _weights(transformer: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, layer in _layers(transformer):
        for half in _HALVES:
            yield f"{name}.{half}.weight", getattr(layer, half)[_NAME].weight


def _differences(
    weights: Mapping[str, Float[Tensor, "_ _"]], state: Mapping[str, Float[Tensor, "_ _"]]
) -> Iterator[Problem]:
    for key, weight in weights.items():
        if key not in state:
            yield Problem("the adapter's state lacks this key", key)
        elif state[key].shape != weight.shape:
            yield Problem(f"the shape is {list(state[key].shape)}, the adapter's is {list(weight.shape)}", key)
    for key in state.keys() - weights.keys():
        yield Problem("the adapter has no such weight", key)
