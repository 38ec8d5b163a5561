"""One forward and backward pass of a few blocks, recorded so that it can stand for a model of many."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from longtake.config.schema import MemoryStrategy
from longtake.memory.block_swap import hooked
from longtake.memory.block_weights import Layout
from longtake.memory.flattened import inner_tensors
from longtake.memory.host_buffers import Keep, Kept
from longtake.memory.quantization import quantize_blocks
from longtake.memory.strategy import recomputing
from longtake.planner.events import KINDS
from longtake.planner.kernels import GRANULE, rounded
from longtake.planner.ledger import Ledger
from longtake.planner.log import Entry, Fold, Seam
from longtake.planner.meta_model import MetaModel, as_it_was, batch_tensors
from longtake.planner.operators import operators_of
from longtake.planner.recorded import Part, Recording, Segment
from longtake.planner.step import forward_and_backward
from longtake.training.batch import Batch


def record(
    model: MetaModel, structure: MemoryStrategy, batch: Batch, accumulating: bool, keep_casts: bool = True
) -> Recording:
    """Forward and backward of one micro-batch; when `accumulating` gradients of an earlier one are there.

    Nothing is moved; the seams at which a strategy would move something are in the recording.
    """
    log: list[Any] = []
    ledger = Ledger(log=log)
    seams = _Seams(ledger, log)
    blocks = getattr(model.transformer, model.spec.blocks)
    with ExitStack() as stack:
        stack.enter_context(as_it_was(model.transformer))
        stack.enter_context(operators_of(model.subject.device_type))
        if structure.quantization != "none":
            with Ledger():  # which remembers what slow kernels on `meta` give
                quantize_blocks(model.transformer, model.spec, structure.quantization)
        stack.enter_context(recomputing(model.transformer, model.spec, structure, seams.keep_for))
        stack.enter_context(_hooks(model, blocks, seams, ledger))
        stack.enter_context(_gradients(model, ledger, accumulating))
        hold(ledger, model, batch)
        before = len(log)
        layout, block = Layout(blocks[0]), _frozen_sizes(blocks[0])
        inputs, own = _sizes(batch_tensors(batch)), _frozen_sizes(model.transformer)
        held = Counter(weights=_total(own), block=_total(inputs))
        with ledger:
            forward_and_backward(model, batch, keep_casts=keep_casts)
        after = len(log)
    segments = tuple(_segments(Fold(log[:before], model.blocks).entries(log[before:after]), model.blocks))
    outside = [
        *(Counter(own) - Counter({size: count * model.blocks for size, count in Counter(block).items()})).elements()
    ]
    counts = tuple(held[kind] for kind in KINDS)
    return Recording(model.blocks, segments, counts, _total(block), layout, tuple(block), (*outside, *inputs))


def hold(ledger: Ledger, model: MetaModel, batch: Batch) -> None:
    """Tells `ledger` of the weights and the batch."""
    trained = [*model.parameters.values()]
    frozen = [parameter for parameter in model.transformer.parameters() if not parameter.requires_grad]
    ledger.hold("weights", [*frozen, *model.transformer.buffers()])
    ledger.hold(model.trained_kind, trained)
    ledger.hold("block", batch_tensors(batch))


@contextmanager
def label_gradients(ledger: Ledger, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside the context gradients of `parameters` are told to `ledger` as such."""

    def accumulated(parameter: Tensor) -> None:
        if parameter.grad is not None:
            ledger.hold("gradients", [parameter.grad])

    hooks = [parameter.register_post_accumulate_grad_hook(accumulated) for parameter in parameters]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Seams:
    """Logs the seams; to the blocks it is the ring of their weights and what keeps tensors for them."""

    def __init__(self, ledger: Ledger, log: list[Any]) -> None:
        self.ledger, self.log = ledger, log
        self.backward = False
        self.slots: dict[int, int] = {}

    def begin(self) -> None:
        self.backward = False
        self.log.append(Seam("begin", -1))

    def acquire(self, index: int) -> None:
        self.log.append(Seam("acquire", index))

    def acquire_for_backward(self, index: int) -> None:
        self.backward = True
        self.log.append(Seam("acquire_for_backward", index))

    def release(self, index: int) -> None:
        self.log.append(Seam("release", index))

    def keep_for(self, block: int) -> Keep:
        """Holds what it is given, and gives back another tensor like it, so that the ends of both are seen."""

        def keep(tensor: Tensor) -> Kept:
            slot = self.slots[block] = self.slots.get(block, -1) + 1
            self.ledger.hold("checkpoints", [tensor])
            self.log.append(Seam("keep", block, slot, storage=self.ledger.number_of(tensor)))

            def kept(held: Tensor = tensor) -> Tensor:
                self.log.append(Seam("take", block, slot))
                with _disable_current_modes():
                    again = torch.empty_strided(held.shape, held.stride(), dtype=held.dtype, device="meta")
                gone = Seam("given_back_gone", block, slot)
                weakref.finalize(again.untyped_storage(), self.log.append, gone)
                return again

            return kept

        return keep


@contextmanager
def _hooks(model: MetaModel, blocks: nn.ModuleList, seams: _Seams, ledger: Ledger) -> Iterator[None]:
    hooks = [hook for index, block in enumerate(blocks) for hook in hooked(seams, index, block)]
    hooks.append(model.transformer.register_forward_pre_hook(lambda *_: seams.begin()))
    try:
        with label_gradients(ledger, [*model.parameters.values()]):
            yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _gradients(model: MetaModel, ledger: Ledger, present: bool) -> Iterator[None]:
    """Inside the context the parameters have gradients of an earlier micro-batch, if `present`; afterwards none."""
    if present:
        for parameter in model.parameters.values():
            parameter.grad = torch.empty_like(parameter)
        ledger.hold("gradients", (p.grad for p in model.parameters.values() if p.grad is not None))
    try:
        yield
    finally:
        for parameter in model.parameters.values():
            parameter.grad = None


def _segments(entries: Iterator[Entry], blocks: int) -> Iterator[Segment]:
    """Cuts where a block begins: in the forward pass at its first `acquire`, in backward at its output's gradient."""
    part: Part = "prologue"
    own: list[Entry] = []
    block, backward = -1, False
    for entry in entries:
        begins: tuple[Part, int] | None = None
        if isinstance(entry, Seam):
            if entry.name == "acquire_for_backward":
                begins, backward = ("backward", entry.block), True
            elif entry.name == "acquire" and not backward:
                begins = ("forward", entry.block)
        if begins:
            yield Segment(part, block, tuple(own))
            (part, block), own = begins, []
        own.append(entry)
        if isinstance(entry, Seam) and entry.name == "release" and not backward and entry.block == blocks - 1:
            yield Segment(part, block, tuple(own))
            part, block, own = "turn", -1, []
    yield Segment(part, block, tuple(own))


def _frozen_sizes(module: nn.Module) -> list[int]:
    return _sizes([*(each for each in module.parameters() if not each.requires_grad), *module.buffers()])


def _sizes(tensors: Iterable[Tensor]) -> list[int]:
    return [inner.nbytes for tensor in tensors for inner in inner_tensors(tensor)]


def _total(sizes: Iterable[int]) -> int:
    """Each rounded as the allocator does it."""
    return sum(rounded(nbytes, GRANULE) for nbytes in sizes)
