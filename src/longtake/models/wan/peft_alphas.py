"""alpha of a LoRA's layers by what peft and diffusers write of it into its file's metadata. Needs no torch."""

import json
from collections.abc import Mapping
from math import sqrt
from typing import Any

KEY = "lora_adapter_metadata"
PREFIX = "transformer."


def metadata_alphas(metadata: Mapping[str, str], ranks: Mapping[str, int], is_dora: bool) -> dict[str, float]:
    """alpha of each layer by the metadata, such that alpha / rank is its scale; empty where there is none.

    Raises ValueError where the metadata cannot be read, or asks for what the file does not have.
    """
    text = metadata.get(KEY)
    if text is None:
        return {}
    table = json.loads(text)
    if not isinstance(table, dict):
        raise ValueError(f"{KEY} is no table")
    config = {key.removeprefix(PREFIX): value for key, value in table.items()}
    if config.get("lora_bias"):
        raise ValueError(f"{KEY} asks for lora_bias")
    if config.get("use_dora") and not is_dora:
        raise ValueError(f"{KEY} asks for use_dora, and the file has no lengths for it")
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
