"""The trainer's own step on a model on `meta`: forward, loss and backward of a micro-batch, and the update."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from longtake.config.schema import MemoryStrategy, TrainingConfig
from longtake.memory.optimizer_offload import OffloadedAdamW
from longtake.planner.meta_model import MetaModel
from longtake.planner.operators import DeviceType
from longtake.planner.planned_copies import PlannedCopies
from longtake.training.batch import Batch, summed_loss
from longtake.training.optimizer import allocate_states, build_optimizer
from longtake.training.precision import compute_in

_AUTOCAST = torch.device("cpu")
"""Whose switch `planner.operators` reads as the planned device's."""


def forward_and_backward(
    model: MetaModel, batch: Batch, between: Callable[[], None] = lambda: None, keep_casts: bool = True
) -> None:
    """`training.trainer.Trainer._accumulate` for one micro-batch; `between` is called before the backward pass."""
    training = model.subject.training
    with compute_in(model.transformer, model.spec, training.precision, _AUTOCAST, keep_casts):
        loss = summed_loss(model.transformer, model.spec, batch) / training.global_batch_size
        between()
        loss.backward()


def update(parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, training: TrainingConfig) -> None:
    """`training.trainer.Trainer._update`: clipping, the optimiser's step; then the gradients are dropped."""
    nn.utils.clip_grad_norm_(parameters, training.clip_norm or float("inf"))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def optimizer_for(
    parameters: dict[str, nn.Parameter],
    training: TrainingConfig,
    strategy: MemoryStrategy,
    copies: PlannedCopies,
    device_type: DeviceType,
) -> torch.optim.Optimizer:
    """The strategy's, with its states, updating as on the device: on CUDA in one kernel, or chunk by chunk."""
    optimizer = build_optimizer(parameters, training, strategy, copies)
    if device_type == "cuda":
        way = "foreach" if isinstance(optimizer, OffloadedAdamW) else "fused"
        for group in (optimizer.defaults, *optimizer.param_groups):
            group[way] = True
    if not isinstance(optimizer, OffloadedAdamW):
        allocate_states(optimizer)
    return optimizer
