"""What peft and diffusers write of a LoRA into its file's metadata: rank and alpha, for which they have no tensors."""

import json
from collections import Counter
from typing import Any

from longtake.lora.adapter import Adapter
from longtake.models.wan.peft_alphas import KEY, PREFIX


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
    return {KEY: json.dumps({f"{PREFIX}{name}": value for name, value in config.items()}, sort_keys=True)}
