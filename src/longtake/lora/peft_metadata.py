"""What peft and diffusers write of a LoRA into its file's metadata: rank and alpha, for which they have no tensors."""

import json
from collections import Counter
from collections.abc import Mapping
from math import sqrt
from typing import Any

from longtake.lora.adapter import Adapter

_KEY = "lora_adapter_metadata"
_PREFIX = "transformer."


def adapter_metadata(adapter: Adapter) -> dict[str, str]:
    """The entry from which diffusers takes ranks and alphas; those of few layers are patterns in it."""
    ranks, alphas = adapter.ranks, adapter.alphas
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    config: dict[str, Any] = {"r": rank, "lora_alpha": float(alpha), "target_modules": sorted(adapter.modules)}
    if other := {f"^{module}": own for module, own in ranks.items() if own != rank}:
        config["rank_pattern"] = other
    if scaled := {f"^{module}": float(own) for module, own in alphas.items() if own != alpha}:
        config["alpha_pattern"] = scaled
    if adapter.is_dora:
        config["use_dora"] = True
    return {_KEY: json.dumps({f"{_PREFIX}{name}": value for name, value in config.items()}, sort_keys=True)}


def metadata_alphas(metadata: Mapping[str, str], ranks: Mapping[str, int], is_dora: bool) -> dict[str, float]:
    """alpha of each layer by the metadata, such that alpha / rank is its scale; empty where there is none.

    Raises ValueError where the metadata cannot be read, or asks for what the file does not have.
    """
    text = metadata.get(_KEY)
    if text is None:
        return {}
    table = json.loads(text)
    if not isinstance(table, dict):
        raise ValueError(f"{_KEY} is no table")
    config = {key.removeprefix(_PREFIX): value for key, value in table.items()}
    if config.get("lora_bias"):
        raise ValueError(f"{_KEY} asks for lora_bias")
    if config.get("use_dora") and not is_dora:
        raise ValueError(f"{_KEY} asks for use_dora, and the file has no lengths for it")
    if "lora_alpha" not in config:
        return {}
    patterns, default = config.get("alpha_pattern") or {}, float(config["lora_alpha"])
    own = {module: _by_pattern(patterns, module, default) for module in ranks}
    return {module: alpha * sqrt(ranks[module]) if config.get("use_rslora") else alpha for module, alpha in own.items()}


def _by_pattern(patterns: Mapping[str, Any], module: str, default: float) -> float:
    for pattern, alpha in patterns.items():  # regular expressions, of which names have points alone
        if f".{module}".endswith("." + pattern.removeprefix("^").replace("\\", "")):
            return float(alpha)
    return default
