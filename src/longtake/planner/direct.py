"""A whole step of the whole model on `meta` under `memory.strategy.apply`, nothing composed: what plans are held to."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from longtake.config.schema import MemoryStrategy
from longtake.memory.host_buffers import use
from longtake.memory.optimizer_offload import OffloadedAdamW
from longtake.memory.strategy import ALONE, Among, apply
from longtake.memory.turns import Turns
from longtake.planner.composition import Composed
from longtake.planner.events import KINDS, Compute, Item
from longtake.planner.ledger import Ledger
from longtake.planner.log import Fold, Span
from longtake.planner.meta_model import MetaModel, as_it_was, batch_tensors
from longtake.planner.operators import operators_of
from longtake.planner.planned_copies import PlannedCopies
from longtake.planner.recording import label_gradients
from longtake.planner.step import forward_and_backward, optimizer_for, update
from longtake.training.batch import Batch

_NOWHERE = Path("/nonexistent")


def trace(
    model: MetaModel, strategy: MemoryStrategy, batch: Batch, micro_batches: int = 1, idle: MetaModel | None = None
) -> Composed:
    """`micro_batches` passes of `batch` and the update. `micro_batch` of the result has the items of all passes.

    `idle` is another model that a run trains, whose turn it is not.
    """
    subject = model.subject
    log: list[Any] = []
    ledger = Ledger(log=log)
    copies = PlannedCopies(ledger, log)
    models = [model] if idle is None else [model, idle]
    among = Among(turns=Turns(copies)) if idle is not None and subject.lora is not None else ALONE
    with ExitStack() as stack:
        for each in models:
            stack.enter_context(as_it_was(each.transformer))
        optimizers = [
            optimizer_for(each.parameters, subject.training, strategy, copies, subject.device_type) for each in models
        ]
        parameters, optimizer = model.parameters, optimizers[0]
        stack.enter_context(operators_of(subject.device_type))
        stack.enter_context(label_gradients(ledger, [*parameters.values()]))
        for each, its in zip(models, optimizers, strict=True):
            stack.enter_context(apply(each.transformer, each.spec, strategy, _NOWHERE, copies=copies, among=among))
            frozen = [parameter for parameter in each.transformer.parameters() if not parameter.requires_grad]
            ledger.hold("weights", copies.on_device([*frozen, *each.transformer.buffers()]))
            ledger.hold(each.trained_kind, each.parameters.values())
            if not isinstance(its, OffloadedAdamW):
                ledger.hold("optimizer", (value for state in its.state.values() for value in state.values()))
        if among.turns is not None:
            ledger.hold("weights", (use(copies, slot.buffer) for slot in among.turns.staying))
        ledger.hold("block", batch_tensors(batch))
        before = len(log)
        with ledger:
            for _ in range(micro_batches):
                forward_and_backward(model, batch)
            passes = len(log)
            update([*parameters.values()], optimizer, subject.training)
        end = len(log)
    fold = Fold(log[:before])
    held = [*fold.totals()]
    items = [_items(fold, part, held) for part in (log[before:passes], log[passes:end])]
    peak = max((item.held for part in items for item in part if isinstance(item, Compute)), key=sum)
    return Composed(tuple(items[0]), tuple(items[1]), peak, copies.host_bytes, copies.disk_bytes)


def _items(fold: Fold, log: list[Any], held: list[int]) -> list[Item]:
    """The log as items; `held` is brought up to date."""
    items: list[Item] = []
    for entry in fold.entries(log):
        if isinstance(entry, Span):
            highest = tuple(now + own for now, own in zip(held, entry.peak, strict=True))
            items.append(Compute(entry.work, "", highest))
            held[:] = [now + change for now, change in zip(held, entry.net, strict=True)]
        else:
            items.append(entry)  # type: ignore[arg-type]  # nothing is logged as a seam
    assert len(held) == len(KINDS)
    return items
