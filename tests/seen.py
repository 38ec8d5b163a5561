"""What transformers are given and give, in a run or in a pipeline: seen by hooks that torch calls for every module."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook


@dataclass(frozen=True)
class Call:
    """One forward pass: its keyword arguments, what reached `patch_embedding`, and the velocity that came of it.

    `learning` is whether a backward pass may follow.
    """

    transformer: WanTransformer3DModel
    given: dict[str, Any]
    hidden_states: Tensor
    velocity: Tensor
    learning: bool

    @property
    def timestep(self) -> float:
        """That of the first sample; its greatest, where there is one a token."""
        return float(self.given["timestep"].flatten().max())


@contextmanager
def transformer_calls() -> Iterator[list[Call]]:
    """Every forward pass of a Wan transformer inside the context, in order."""
    calls: list[Call] = []
    patched: list[Tensor] = []

    def see(module: nn.Module, given: Any, keywords: dict[str, Any], output: Any) -> None:
        if type(module) is nn.Conv3d:  # the VAE's convolutions are of a class of their own
            patched[:] = [given[0].detach().clone()]
        elif isinstance(module, WanTransformer3DModel):
            velocity = (output[0] if isinstance(output, tuple) else output.sample).detach().clone()
            calls.append(Call(module, dict(keywords), patched[0], velocity, torch.is_grad_enabled()))

    hook = register_module_forward_hook(see, with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()
