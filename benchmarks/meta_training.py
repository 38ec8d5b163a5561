"""The trainer's own step on `meta` tensors: what one LoRA training step holds, moves and computes under a strategy.

`lora.attach`, `memory.strategy.apply`, `training.precision.compute_in`, `training.batch.summed_loss` and AdamW are
those of a run. Only operators are exchanged for those of a CUDA device (`cuda_operators`).
"""

import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longtake.config.schema import LoraConfig, MemoryStrategy, TrainingConfig
from longtake.distributed.backend import SingleDevice
from longtake.memory.optimizer_offload import OffloadedAdamW
from longtake.memory.strategy import apply
from longtake.models.spec import ModelSpec
from longtake.models.wan.variants import WanVariant
from longtake.planner.ledger import Ledger, Storage
from longtake.planner.meta_model import Subject, as_it_was, batch_tensors
from longtake.planner.meta_model import build as build_model
from longtake.planner.meta_model import meta_batch as batch_of
from longtake.planner.operators import RMS_NORM_IN_FP32, operators_of
from longtake.planner.planned_copies import PlannedCopies
from longtake.planner.step import optimizer_for
from longtake.training.batch import Batch, summed_loss
from longtake.training.precision import compute_in


@dataclass(frozen=True)
class Details:
    """What a trace may leave out or do otherwise than the trainer does on CUDA, to compare with other traces."""

    adapters: torch.dtype = torch.float32
    adam: bool = True
    fused_rms_norm: bool = True
    rms_norm_in_fp32: bool = RMS_NORM_IN_FP32
    peft_casts: bool = False
    workspaces: bool = True


AS_TRAINED = Details()


@dataclass(frozen=True)
class Traced:
    """What a step is traced with."""

    spec: ModelSpec
    transformer: Any
    parameters: dict[str, nn.Parameter]
    training: TrainingConfig


@dataclass(frozen=True)
class Step:
    """A traced step: bytes by kind at its peak, and what it needed otherwise.

    Kinds: `checkpoints` are what blocks keep, `buffers` what copies from the host fill (swapped weights, what comes
    back), `workspace` is inside kernels; `block` is all that has no other name: activations, their gradients, the
    batch. `moved` are bytes copied `inward`, to the device, and `outward`. `timeline` has (flops, bytes) after each
    operator; backward begins at `forward_flops`.
    """

    peak: Counter[str]
    host_bytes: int
    moved: Counter[Any]
    flops: int
    forward_flops: int
    timeline: list[tuple[int, int]]
    largest: list[Storage]


def build(model: WanVariant, lora: LoraConfig, training: TrainingConfig) -> Traced:
    """The model on `meta` as `training.model.build_model` would have it on a device, weights in bf16."""
    built = build_model(Subject(model, lora, training))
    return Traced(model.spec, built.transformer, built.parameters, training)


def meta_batch(spec: ModelSpec, num_frames: int, size: tuple[int, int]) -> Batch:
    """One sample without values; `size` is (width, height) in pixels."""
    return batch_of(spec, (num_frames, size[1], size[0]))


def trace(
    traced: Traced,
    strategy: MemoryStrategy,
    batch: Batch,
    details: Details = AS_TRAINED,
    explain_at: int | None = None,
) -> Step:
    """One training step of one micro-batch, with the optimiser's states there and no gradients at its start.

    With `explain_at`, the peak of an earlier trace, `largest` has the storages alive then.
    """
    ledger = Ledger(workspaces=details.workspaces, explain_at=explain_at)
    copies = PlannedCopies(ledger, [])
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        stack.enter_context(as_it_was(traced.transformer))
        stack.enter_context(_adapters_in(details.adapters, traced))
        optimizer = (
            optimizer_for(traced.parameters, traced.training, strategy, copies, "cuda") if details.adam else None
        )
        stack.enter_context(_labelled(traced, ledger))
        stack.enter_context(operators_of("cuda", details.rms_norm_in_fp32, details.fused_rms_norm))
        stack.enter_context(apply(traced.transformer, traced.spec, strategy, Path(scratch), copies=copies))
        _hold(ledger, copies, traced, optimizer, batch)
        with ledger:
            forward_flops = _step(traced, optimizer, batch, ledger, details)
    host_bytes = copies.host_bytes
    return Step(ledger.peak, host_bytes, copies.moved, ledger.flops, forward_flops, ledger.timeline, ledger.largest)


def _step(
    traced: Traced, optimizer: torch.optim.Optimizer | None, batch: Batch, ledger: Ledger, details: Details
) -> int:
    """`training.trainer.Trainer._step` for one micro-batch, without its reading of values, which `meta` has not."""
    parameters = [*traced.parameters.values()]
    with compute_in(traced.transformer, traced.spec, "bf16", torch.device("cpu")):
        for module in traced.transformer.modules():
            if details.peft_casts and hasattr(module, "cast_input_dtype_enabled"):
                module.cast_input_dtype_enabled = True
        loss = summed_loss(traced.transformer, traced.spec, batch)
        forward_flops = ledger.flops
        if optimizer is None:
            loss.backward()
        else:
            backend = SingleDevice(traced.transformer, traced.parameters, optimizer, fp16=False)
            backend.backward(loss)
    if optimizer is not None:
        nn.utils.clip_grad_norm_(parameters, traced.training.clip_norm)
        backend.step(skip=False)
    for parameter in parameters:
        parameter.grad = None
    return forward_flops


def _hold(
    ledger: Ledger, copies: PlannedCopies, traced: Traced, optimizer: torch.optim.Optimizer | None, batch: Batch
) -> None:
    """Tells `ledger` what is on the device before the step."""
    frozen = [parameter for parameter in traced.transformer.parameters() if not parameter.requires_grad]
    ledger.hold("weights", copies.on_device([*frozen, *traced.transformer.buffers()]))
    ledger.hold("adapters", traced.parameters.values())
    if optimizer is not None and not isinstance(optimizer, OffloadedAdamW):
        ledger.hold("optimizer", (value for state in optimizer.state.values() for value in state.values()))
    ledger.hold("block", batch_tensors(batch))


@contextmanager
def _labelled(traced: Traced, ledger: Ledger) -> Iterator[None]:
    """Tells `ledger` which storages are inputs of blocks and which are gradients of parameters."""

    def entered(_block: nn.Module, arguments: tuple[Any, ...]) -> None:
        ledger.hold("checkpoints", arguments[:1])

    def accumulated(parameter: Tensor) -> None:
        if parameter.grad is not None:
            ledger.hold("gradients", [parameter.grad])

    blocks = getattr(traced.transformer, traced.spec.blocks)
    hooks = [block.register_forward_pre_hook(entered) for block in blocks]
    hooks += [p.register_post_accumulate_grad_hook(accumulated) for p in traced.parameters.values()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _adapters_in(dtype: torch.dtype, traced: Traced) -> Iterator[None]:
    kept = {parameter: parameter.data for parameter in traced.parameters.values()}
    for parameter, values in kept.items():
        parameter.data = values.to(dtype)
    try:
        yield
    finally:
        for parameter, values in kept.items():
            parameter.data = values
