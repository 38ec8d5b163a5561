"""The update that ends a step: clipping and the optimiser, over the trained parameters of all blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from longtake.config.schema import MemoryStrategy
from longtake.memory.optimizer_offload import OffloadedAdamW
from longtake.planner.kernels import kernels_of
from longtake.planner.ledger import Ledger
from longtake.planner.log import INDEX, Fold
from longtake.planner.meta_model import META, MetaModel
from longtake.planner.planned_copies import PlannedCopies
from longtake.planner.recorded import Update
from longtake.planner.step import optimizer_for, update

_FIRST_EVENT = 1_000_000
"""The events of the update follow those of the passes before it, whatever their number."""


def record_update(model: MetaModel, strategy: MemoryStrategy) -> Update:
    """The update of the whole model, of which `model` may have a few blocks only."""
    log: list[Any] = []
    ledger = Ledger(log=log)
    copies = PlannedCopies(ledger, log, _FIRST_EVENT)
    subject = model.subject
    parameters = all_parameters(model)
    for parameter in parameters.values():
        parameter.grad = torch.empty_like(parameter)
    optimizer = optimizer_for(parameters, subject.training, strategy, copies, subject.device_type)
    ledger.hold(model.trained_kind, parameters.values())
    ledger.hold("gradients", (parameter.grad for parameter in parameters.values() if parameter.grad is not None))
    if not isinstance(optimizer, OffloadedAdamW):
        ledger.hold("optimizer", (value for state in optimizer.state.values() for value in state.values()))
    if subject.training.ema:
        ledger.hold("optimizer", averages := [torch.empty_like(each) for each in parameters.values()])
    before = len(log)
    with kernels_of(subject.device_type), ledger:
        update([*parameters.values()], optimizer, subject.training)
        if subject.training.ema:
            torch._foreach_lerp_(averages, [each.detach() for each in parameters.values()], 0.5)
    fold = Fold(log[:before])
    held = fold.totals()
    gradients, others = (
        tuple(nbytes for storage, nbytes in fold.exact.items() if (fold.kinds[storage] == INDEX["gradients"]) is wanted)
        for wanted in (True, False)
    )
    return Update(tuple(fold.entries(log[before:])), held, copies.host_bytes, others, gradients)


def all_parameters(model: MetaModel) -> dict[str, nn.Parameter]:
    """The trained parameters of the whole model, in order, new and without values."""
    prefix, own = f"{model.spec.blocks}.", model.parameters
    first = {name: own[name] for name in own if name.startswith(f"{prefix}0.")}
    found: dict[str, nn.Parameter] = {}
    for name, parameter in own.items():
        if not name.startswith(prefix):
            found[name] = _like(parameter)
        elif name in first and prefix not in "".join(found):
            found |= {
                name.replace(f"{prefix}0.", f"{prefix}{index}.", 1): _like(each)
                for index in range(model.subject.blocks)
                for name, each in first.items()
            }
    return found


def _like(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(parameter, device=META))
