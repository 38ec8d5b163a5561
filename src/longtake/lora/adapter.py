# ruff: noqa: F722
"""An adapter apart from any transformer: the matrices of each layer, and by what their product is scaled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, Literal, TypeAlias

from torch import Tensor

from longtake.config.schema import LoraConfig

if TYPE_CHECKING:
    from jaxtyping import Float

    State: TypeAlias = Mapping[str, Float[Tensor, "*_"]]
else:
    State = Mapping

MAGNITUDE: Literal["lora_magnitude_vector"] = "lora_magnitude_vector"
"""What peft calls the trained lengths of a layer's rows (DoRA, arXiv:2402.09353)."""


@dataclass(frozen=True)
class Adapter:
    """`state` as `adapter_state` gives it, fp32 on the CPU; each layer has a rank and an alpha of its own.

    `<layer>.lora_A.weight` is [rank, in], `<layer>.lora_B.weight` [out, rank]; a DoRA has
    `<layer>.lora_magnitude_vector.weight` [out] too. A layer adds alpha / rank * B A to its weight.
    """

    state: dict[str, Float[Tensor, "*_"]]
    alphas: dict[str, float]
    metadata: dict[str, str]

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the adapted layers."""
        return modules_of(self.state)

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of each layer."""
        return {module: self.state[f"{module}.lora_A.weight"].shape[0] for module in self.modules}

    @property
    def rank(self) -> int:
        """The greatest of the layers' ranks."""
        return max(self.ranks.values())

    @property
    def scales(self) -> dict[str, float]:
        """What the product B A of each layer is multiplied by."""
        return {module: self.alphas[module] / rank for module, rank in self.ranks.items()}

    @property
    def is_dora(self) -> bool:
        """Whether some layer has trained lengths."""
        return any(f".{MAGNITUDE}." in key for key in self.state)


def trained_adapter(state: dict[str, Float[Tensor, "*_"]], lora: LoraConfig, metadata: Mapping[str, str]) -> Adapter:
    """The adapter that a run of `lora` trained."""
    ranks = {module: state[f"{module}.lora_A.weight"].shape[0] for module in modules_of(state)}
    return Adapter(state, {module: scale(lora, rank) * rank for module, rank in ranks.items()}, dict(metadata))


def scale(lora: LoraConfig, rank: int) -> float:
    """alpha / rank, under rsLoRA (arXiv:2312.03732, section 3) alpha / sqrt(rank)."""
    return lora.alpha / (sqrt(rank) if lora.rslora else rank)


def modules_of(state: State) -> tuple[str, ...]:
    """Names of the layers that `state` adapts, in order."""
    return tuple(dict.fromkeys(key.rpartition(".lora_")[0] for key in state))
