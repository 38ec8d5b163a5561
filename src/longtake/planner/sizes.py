"""The sizes of a model's weights, frozen and trained, of its blocks and of the rest."""

from __future__ import annotations

from typing import Any

from longtake.planner.meta_model import MetaModel
from longtake.planner.rank_items import OPTIMIZER
from longtake.planner.recorded import Update
from longtake.planner.shards import Sizes, Weight


def sizes_of(model: MetaModel, update: Update) -> Sizes:
    """Those of the whole model, of which `model` may have a few blocks only, unquantised."""
    prefix = f"{model.spec.blocks}."
    groups: dict[tuple[bool, bool], list[Weight]] = {(a, b): [] for a in (False, True) for b in (False, True)}
    for name, parameter in model.transformer.named_parameters():
        if not name.startswith(prefix) or name.startswith(f"{prefix}0."):
            groups[name.startswith(prefix), parameter.requires_grad].append(_weight(parameter))
    trained = model.subject.blocks * _total(groups[True, True]) + _total(groups[False, True])
    averages = trained if model.subject.training.ema else 0
    return Sizes(
        model.subject.blocks,
        tuple(groups[True, False]),
        tuple(groups[True, True]),
        tuple(groups[False, False]),
        tuple(groups[False, True]),
        update.held[OPTIMIZER] - averages,
        averages,
        model.trained_kind,
    )


def _weight(parameter: Any) -> Weight:
    rows = parameter.shape[0] if parameter.dim() else 1
    return Weight(rows, parameter.numel() // rows, parameter.element_size())


def _total(weights: list[Weight]) -> int:
    return sum(weight.nbytes for weight in weights)
