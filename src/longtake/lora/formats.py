# ruff: noqa: F722
"""The names that a LoRA's tensors have in ComfyUI's, diffusers' and kohya's files, to and from our own.

Our own are peft's on diffusers' module names without the adapter's name: `blocks.0.attn1.to_q.lora_A.weight`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from longtake.config.schema import LoraFormat
from longtake.errors import ModelError
from longtake.models.wan.keys import to_diffusers, to_original

if TYPE_CHECKING:
    from jaxtyping import Float

Part = Literal["lora_A", "lora_B", "alpha"]

_PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer_2.", "transformer.")
_KOHYA = "lora_unet_"
_KEY = re.compile(r"(?P<module>.+)\.(?:(?P<half>lora_A|lora_B|lora_down|lora_up)(?:\.\w+)?\.weight|alpha)")
_HALF: dict[str, Part] = {"lora_A": "lora_A", "lora_down": "lora_A", "lora_B": "lora_B", "lora_up": "lora_B"}
_KOHYA_MODULE = re.compile(
    r"blocks_(?P<block>\d+)_(?:(?P<attention>self_attn|cross_attn)_(?P<leaf>\w+)|ffn_(?P<ffn>\d))"
)
_ADAPTER_METADATA = "lora_adapter_metadata"
_METADATA_PREFIX = "transformer."


@dataclass(frozen=True)
class Entry:
    """What one key of a file holds: half of a layer's adapter, or its alpha."""

    module: str
    part: Part

    @property
    def key(self) -> str:
        """Our own name of the tensor."""
        return f"{self.module}.{self.part}.weight"


def named(state: Mapping[str, Float[Tensor, "_ _"]], alpha: float, form: LoraFormat) -> dict[str, Tensor]:
    """`state` under the names of `form`, with a scalar `.alpha` a layer where the format has one."""
    tensors = {}
    for key, tensor in state.items():
        module, _, half = key.removesuffix(".weight").rpartition(".")
        if form == "diffusers":
            tensors[f"transformer.{key}"] = tensor
            continue
        stem = _stem(module, form)
        tensors[f"{stem}.{_half_name(half, form)}.weight"] = tensor
        tensors[f"{stem}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
    return tensors


def parse(key: str) -> Entry | None:
    """What `key` of a file in any of the formats holds; None where it is no plain LoRA tensor of this family."""
    match = _KEY.fullmatch(key)
    module = _module(match["module"]) if match else None
    if match is None or module is None:
        return None
    return Entry(module, _HALF[match["half"]] if match["half"] else "alpha")


def looks_like_lora(keys: Iterable[str]) -> bool:
    """Whether any of `keys` is spelled as a LoRA's of whatever model."""
    return any(re.search(r"lora_(A|B|down|up|unet|te)|\.lora\.|lokr_|hada_", key) for key in keys)


def adapter_metadata(modules: Iterable[str], rank: int, alpha: float) -> dict[str, str]:
    """The entry of a file's metadata from which diffusers takes rank and alpha; its format has no `.alpha` keys."""
    config = {"r": rank, "lora_alpha": float(alpha), "target_modules": sorted(modules)}
    text = json.dumps({f"{_METADATA_PREFIX}{name}": value for name, value in config.items()}, sort_keys=True)
    return {_ADAPTER_METADATA: text}


def metadata_alphas(metadata: Mapping[str, str], modules: Iterable[str]) -> dict[str, float]:
    """alpha of each module by diffusers' metadata; empty where there is none.

    Raises ValueError where the metadata cannot be read, or asks for more than a plain LoRA.
    """
    text = metadata.get(_ADAPTER_METADATA)
    if text is None:
        return {}
    table = json.loads(text)
    if not isinstance(table, dict):
        raise ValueError(f"{_ADAPTER_METADATA} is no table")
    config = {key.removeprefix(_METADATA_PREFIX): value for key, value in table.items()}
    if special := [name for name in ("use_dora", "use_rslora", "lora_bias") if config.get(name)]:
        raise ValueError(f"{_ADAPTER_METADATA} asks for {special[0]}")
    if "lora_alpha" not in config:
        return {}
    patterns = config.get("alpha_pattern") or {}
    return {module: _by_pattern(patterns, module, float(config["lora_alpha"])) for module in modules}


def _by_pattern(patterns: Mapping[str, Any], module: str, default: float) -> float:
    for pattern, alpha in patterns.items():
        if f".{module}".endswith(f".{pattern.removeprefix('^')}"):
            return float(alpha)
    return default


def _stem(module: str, form: LoraFormat) -> str:
    original = to_original(module)
    return f"{_KOHYA}{original.replace('.', '_')}" if form == "kohya" else f"diffusion_model.{original}"


def _half_name(half: str, form: LoraFormat) -> str:
    return {"lora_A": "lora_down", "lora_B": "lora_up"}[half] if form == "kohya" else half


def _module(stem: str) -> str | None:
    """diffusers' name of the layer that a file calls `stem`; None where the transformer has no such layer."""
    if stem.startswith(_KOHYA):
        stem = _from_kohya(stem.removeprefix(_KOHYA))
    for prefix in _PREFIXES:
        stem = stem.removeprefix(prefix)
    with suppress(ModelError):
        return to_diffusers(stem)
    with suppress(ModelError):
        return to_diffusers(to_original(stem))
    return None


def _from_kohya(stem: str) -> str:
    """`blocks_0_cross_attn_k_img` as `blocks.0.cross_attn.k_img`; other names are left as they are."""
    match = _KOHYA_MODULE.fullmatch(stem)
    if match is None:
        return stem
    leaf = f"{match['attention']}.{match['leaf']}" if match["attention"] else f"ffn.{match['ffn']}"
    return f"blocks.{match['block']}.{leaf}"
