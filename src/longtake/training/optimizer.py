"""AdamW with its states in fp32, in 8 bits or in host memory, and the learning rate of a step."""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from longtake.config.schema import MemoryStrategy, TrainingConfig
from longtake.distributed.pieces import shape_of
from longtake.memory.copies import Copies, copies_for
from longtake.memory.optimizer_offload import OffloadedAdamW
from longtake.memory.quantization import require_torchao

ON_DEVICE = MemoryStrategy()


def trained_parameters(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of everything that the optimiser steps, in the module's order."""
    return {name: parameter for name, parameter in transformer.named_parameters() if parameter.requires_grad}


def build_optimizer(
    parameters: Mapping[str, nn.Parameter],
    training: TrainingConfig,
    memory: MemoryStrategy = ON_DEVICE,
    copies: Copies | None = None,
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101); weight decay for matrices only.

    A group's `lr_factor` is what the learning rate of a step is multiplied by: `training.lora_plus_ratio` for adapters'
    B (LoRA+, arXiv:2402.12354).
    Its states are where and what `memory` says, moved by `copies`, the device's own without it; an `OffloadedAdamW`
    must be closed. Raises ConfigError where torchao, which has the 8-bit states, is missing, and RunError where the
    host refuses the memory.
    """
    groups = _groups(parameters, training)
    if memory.optimizer == "adamw8bit":
        return _adamw8bit(groups, training.learning_rate)
    if memory.optimizer_offload:
        device = next(iter(parameters.values())).device
        return OffloadedAdamW(groups, training.learning_rate, copies or copies_for(device))
    # one kernel on CUDA: tensor by tensor it would be thousands, and torch's default takes a copy of what is trained
    fused = all(parameter.is_cuda for parameter in parameters.values())
    return torch.optim.AdamW(groups, lr=training.learning_rate, fused=fused)


@torch.no_grad()
def allocate_states(optimizer: torch.optim.Optimizer) -> None:
    """Allocates the states that the first step would, so that memory runs out before it or not at all.

    States that are there are left alone, and so is everything else.
    """
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        if not optimizer.state[parameter]:
            optimizer.state[parameter] = _fresh_state(optimizer, parameter)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Gives every group its learning rate for the next step, of which `rate` is the one without a factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_factor", 1.0)


def learning_rate(step: int, training: TrainingConfig) -> float:
    """The rate of optimiser step `step`, counted from 0: linear warm-up, then constant or half a cosine to zero."""
    if step < training.warmup_steps:
        return training.learning_rate * (step + 1) / training.warmup_steps
    if training.schedule == "constant":
        return training.learning_rate
    done = (step - training.warmup_steps) / max(1, training.steps - training.warmup_steps)
    return training.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def _groups(parameters: Mapping[str, nn.Parameter], training: TrainingConfig) -> list[dict[str, Any]]:
    """Parameters with equal weight decay and equal factor of the learning rate, in that order."""
    found: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        factor = training.lora_plus_ratio if ".lora_B." in name else 1.0
        found.setdefault((len(shape_of(parameter)) < 2, factor), []).append(parameter)
    return [
        {
            "params": own,
            "weight_decay": 0.0 if plain else training.weight_decay,
            "lr": training.learning_rate * factor,
            "lr_factor": factor,
        }
        for (plain, factor), own in sorted(found.items(), key=lambda item: item[0])
    ]


def _adamw8bit(groups: list[dict[str, Any]], rate: float) -> torch.optim.Optimizer:
    """torchao's, for learning rates that are set as numbers; only on CUDA does it need to be compiled."""
    optim = require_torchao("torchao.optim", "memory.optimizer")
    compiled = groups[0]["params"][0].is_cuda

    class AdamW8bit(optim.AdamW8bit):  # type: ignore[name-defined]  # imported where it is needed
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32)
            # else the update of each shape would be built by a C++ compiler, which is slow and may be missing
            with nullcontext() if compiled else torch.compiler.set_stance("force_eager"):
                return super().step(closure)

    return AdamW8bit(groups, lr=rate)


def _fresh_state(optimizer: Any, parameter: nn.Parameter) -> dict[str, Tensor]:
    if isinstance(optimizer, torch.optim.AdamW):
        moments = [torch.zeros_like(parameter, memory_format=torch.preserve_format) for _ in range(2)]
    else:  # as torchao's step does it
        moments = [optimizer._new_buffer(parameter, signed) for signed in (True, False)]
    step = torch.zeros((), device=parameter.device if optimizer.defaults.get("fused") else "cpu")
    return {"step": step, "exp_avg": moments[0], "exp_avg_sq": moments[1]}
