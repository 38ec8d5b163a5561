"""The names that a LoRA's tensors have in ComfyUI's, diffusers' and kohya's files, to and from our own.

Our own are peft's on diffusers' module names without the adapter's name: `blocks.0.attn1.to_q.lora_A.weight`, and of a
DoRA `blocks.0.attn1.to_q.lora_magnitude_vector.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from longtake.config.schema import LoraFormat
from longtake.errors import ModelError
from longtake.lora.adapter import MAGNITUDE, Adapter
from longtake.models.wan.keys import to_diffusers, to_original

Part = Literal["lora_A", "lora_B", "lora_magnitude_vector", "alpha"]

_PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer_2.", "transformer.")
_KOHYA = "lora_unet_"
_KEY = re.compile(
    r"(?P<module>.+)\.(?:(?P<half>lora_A|lora_B|lora_down|lora_up)(?:\.\w+)?\.weight|alpha"
    r"|(?P<magnitude>dora_scale|lora_magnitude_vector(?:\.\w+){0,2}))"
)
_HALF: dict[str, Part] = {"lora_A": "lora_A", "lora_down": "lora_A", "lora_B": "lora_B", "lora_up": "lora_B"}
_KOHYA_MODULE = re.compile(
    r"blocks_(?P<block>\d+)_(?:(?P<attention>self_attn|cross_attn)_(?P<leaf>\w+)|ffn_(?P<ffn>\d))"
)


@dataclass(frozen=True)
class Entry:
    """What one key of a file holds: half of a layer's adapter, or its alpha."""

    module: str
    part: Part

    @property
    def key(self) -> str:
        """Our own name of the tensor."""
        return f"{self.module}.{self.part}.weight"


def named(adapter: Adapter, form: LoraFormat) -> dict[str, Tensor]:
    """The adapter's tensors under the names of `form`, with a scalar `.alpha` a layer where the format has one.

    diffusers names a DoRA's lengths as peft does, `.lora_magnitude_vector` [out]; the others `.dora_scale` [out, 1].
    """
    tensors = {}
    for key, tensor in adapter.state.items():
        module, _, part = key.removesuffix(".weight").rpartition(".")
        if form == "diffusers":
            tensors[f"transformer.{key.removesuffix('.weight') if part == MAGNITUDE else key}"] = tensor
            continue
        stem = _stem(module, form)
        if part == MAGNITUDE:
            tensors[f"{stem}.dora_scale"] = tensor[:, None]
            continue
        tensors[f"{stem}.{_half_name(part, form)}.weight"] = tensor
        tensors[f"{stem}.alpha"] = torch.tensor(adapter.alphas[module], dtype=torch.float32)
    return tensors


def parse(key: str) -> Entry | None:
    """What `key` of a file in any of the formats holds; None where it is no plain LoRA tensor of this family."""
    match = _KEY.fullmatch(key)
    module = _module(match["module"]) if match else None
    if match is None or module is None:
        return None
    if match["magnitude"]:
        return Entry(module, MAGNITUDE)
    return Entry(module, _HALF[match["half"]] if match["half"] else "alpha")


def looks_like_lora(keys: Iterable[str]) -> bool:
    """Whether any of `keys` is spelled as a LoRA's of whatever model."""
    return any(re.search(r"lora_(A|B|down|up|unet|te)|\.lora\.|lokr_|hada_", key) for key in keys)


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
