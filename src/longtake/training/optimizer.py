"""AdamW with fp32 states, the learning rate as a function of the step, and the moving average of weights."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from longtake.config.schema import TrainingConfig


def trained_parameters(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of everything that the optimiser steps, in the module's order."""
    return {name: parameter for name, parameter in transformer.named_parameters() if parameter.requires_grad}


def build_optimizer(parameters: Mapping[str, nn.Parameter], training: TrainingConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101); weight decay for matrices only."""
    decayed = [parameter for parameter in parameters.values() if parameter.ndim >= 2]
    plain = [parameter for parameter in parameters.values() if parameter.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": training.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=training.learning_rate)


def learning_rate(step: int, training: TrainingConfig) -> float:
    """The rate of optimiser step `step`, counted from 0: linear warm-up, then constant or half a cosine to zero."""
    if step < training.warmup_steps:
        return training.learning_rate * (step + 1) / training.warmup_steps
    if training.schedule == "constant":
        return training.learning_rate
    done = (step - training.warmup_steps) / max(1, training.steps - training.warmup_steps)
    return training.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


class MovingAverage:
    """Exponential moving average of parameters: average = decay average + (1 - decay) value."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.parameters = parameters
        self.averages = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Moves the averages towards the parameters; to be called after each optimiser step."""
        torch._foreach_lerp_([*self.averages.values()], [*self.parameters.values()], 1 - self.decay)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Inside the context the parameters hold the averages."""
        kept = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self._copy(self.averages)
        try:
            yield
        finally:
            self._copy(kept)

    @torch.no_grad()
    def _copy(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The optimiser's states as `<parameter>/<state>` -> tensor."""
    return {
        f"{name}/{key}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Inverse of `optimizer_tensors`."""
    for name, parameter in parameters.items():
        prefix = f"{name}/"
        state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        if state:
            placed = {key: value if key == "step" else value.to(parameter.device) for key, value in state.items()}
            optimizer.state[parameter] = placed
