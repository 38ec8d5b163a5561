"""Traces one whole LoRA training step on the `meta` device and prints its peak bytes: no GPU, no weights, no data.

The trainer's own pieces run: `lora.attach`, `memory.strategy.apply`, `training.precision.compute_in`,
`training.batch.summed_loss`, AdamW. Only operators are exchanged for those of a CUDA device (`operators_of_cuda`).

    python benchmarks/trace_step.py
    python benchmarks/trace_step.py --model wan2.1-t2v-1.3b --frames 81 --size 832x480
"""

import argparse
import resource
import tempfile
import time
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longtake.config.schema import LoraConfig, MemoryStrategy, TrainingConfig
from longtake.distributed.backend import SingleDevice
from longtake.lora import attach
from longtake.memory.strategy import apply
from longtake.models.spec import ModelSpec
from longtake.models.wan.conditioning import Conditioning
from longtake.models.wan.variants import KEEP_FP32, VARIANTS, WanVariant, variant
from longtake.training.batch import Batch, summed_loss
from longtake.training.optimizer import build_optimizer, trained_parameters
from longtake.training.precision import compute_in

META = torch.device("meta")
GRANULE = 512
"""Bytes that CUDA's caching allocator rounds an allocation up to."""
KINDS = ("weights", "adapters", "gradients", "optimizer", "inputs", "blocks")
"""`inputs` are those of the blocks; `blocks` is all that has no other name: activations, their gradients, the batch."""
RMS_NORM_IN_FP32 = torch.__version__ >= "2.12"
"""Whether autocast on CUDA casts what rms_norm is given to fp32 (https://github.com/pytorch/pytorch/issues/188955)."""
STRATEGIES = {
    "no checkpointing": MemoryStrategy(gradient_checkpointing="none"),
    "per block": MemoryStrategy(gradient_checkpointing="block"),
}


class Ledger(TorchDispatchMode):
    """Counts the bytes of the storages of one device type that are alive, by kind, and keeps the counts at the peak."""

    def __init__(self, device_type: str = "meta") -> None:
        super().__init__()
        self.device_type = device_type
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._alive: dict[int, tuple[weakref.ref[torch.UntypedStorage], str, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.hold("blocks", (leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)), rename=False)
        return result

    def hold(self, kind: str, tensors: Iterable[Tensor], rename: bool = True) -> None:
        """Counts the storages of `tensors` as `kind`; those that are counted already only with `rename`."""
        for tensor in tensors:
            if tensor.device.type != self.device_type:
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._alive:
                size = -(-storage.nbytes() // GRANULE) * GRANULE
                self._alive[key] = (weakref.ref(storage, partial(self._freed, key)), kind, size)
                self.now[kind] += size
            elif rename:
                reference, old, size = self._alive[key]
                self._alive[key] = (reference, kind, size)
                self.now[old] -= size
                self.now[kind] += size
        if self.now.total() > self.peak.total():
            self.peak = self.now.copy()

    def _freed(self, key: int, _reference: weakref.ref[torch.UntypedStorage]) -> None:
        _, kind, size = self._alive.pop(key)
        self.now[kind] -= size


class _FusedRMSNorm(torch.autograd.Function):
    """CUDA's rms_norm, as far as memory goes: it keeps its input and one fp32 number a row.

    `aten._fused_rms_norm` has a kernel and a derivative on CUDA alone; on `meta` it is decomposed.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight, rows.new_empty((*rows.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(rows)

    @staticmethod
    def backward(ctx: Any, *_gradients: Tensor) -> tuple[Tensor, Tensor | None]:
        rows, weight, _ = ctx.saved_tensors
        return torch.empty_like(rows), torch.empty_like(weight) if ctx.needs_input_grad[1] else None


@contextmanager
def operators_of_cuda(rms_norm_in_fp32: bool) -> Iterator[None]:
    """Inside the context `meta` tensors go through the operators, and the casts of autocast, that CUDA's would.

    Autocast knows no `meta` device and is disabled for CUDA where there is none, so the CPU's switch is read as
    CUDA's: linear, convolution and attention compute in its type, with `rms_norm_in_fp32` rms_norm in fp32
    (ATen/autocast_mode.h; layer_norm, in that list too, is given fp32 by the model). Autocast's cache of cast weights
    is left out: at this step's peak it holds little that the graph does not (25 MiB for the 14B without checkpointing).
    Functions are replaced, because a TorchFunctionMode is not active while backward recomputes a block; checkpointing
    restores the CPU's switch there.
    """
    linear, conv3d = functional.linear, functional.conv3d

    def lowered(*tensors: Tensor | None) -> Iterator[Any]:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        return (tensor if dtype is None or tensor is None else tensor.to(dtype) for tensor in tensors)

    def cuda_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
        return linear(*lowered(input, weight, bias))

    def cuda_conv3d(input: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Any:
        return conv3d(*lowered(input, weight, bias), *rest)

    def cuda_rms_norm(input: Tensor, _shape: Any, weight: Tensor, _eps: float | None = None) -> Any:
        if rms_norm_in_fp32 and torch.is_autocast_enabled("cpu"):
            input, weight = input.float(), weight.float()
        assert input.dtype == weight.dtype, "CUDA fuses no rms_norm of two types"
        return _FusedRMSNorm.apply(input, weight)

    def cuda_attention(query: Tensor, key: Tensor, value: Tensor, **keywords: Any) -> Any:
        assert keywords["attn_mask"] is None, "flash attention has no mask"
        options = (keywords["dropout_p"], keywords["is_causal"])
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(*lowered(query, key, value), *options, scale=keywords["scale"])[0]

    with ExitStack() as replaced:
        for function in (cuda_linear, cuda_conv3d, cuda_rms_norm):
            replaced.enter_context(patch.object(functional, function.__name__.removeprefix("cuda_"), function))
        replaced.enter_context(patch.object(functional, "scaled_dot_product_attention", cuda_attention))
        yield


@dataclass(frozen=True)
class Traced:
    """What a step is traced with; the optimiser has its states, as after a first step."""

    spec: ModelSpec
    transformer: Any
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    training: TrainingConfig


def build(model: WanVariant, lora: LoraConfig, training: TrainingConfig) -> Traced:
    """The model on `meta` as `training.model.build_model` would have it on a device, weights in bf16."""
    with META:
        transformer = WanTransformer3DModel(**model.transformer_config)
    for name, parameter in transformer.named_parameters():
        kept = any(part in KEEP_FP32 for part in name.split("."))
        parameter.data = parameter.data.to(torch.float32 if kept else torch.bfloat16)
    attach(transformer, lora, training.seed)
    transformer.train()
    parameters = trained_parameters(transformer)
    optimizer = build_optimizer(parameters, training)
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return Traced(model.spec, transformer, parameters, optimizer, training)


def meta_batch(spec: ModelSpec, num_frames: int, size: tuple[int, int]) -> Batch:
    """One sample without values, in the types of `training.batch.collate`; `size` is (width, height) in pixels."""
    width, height = size
    shape = spec.latent_shape(num_frames, height, width)

    def empty(*sides: int) -> Tensor:
        return torch.empty(1, *sides, device=META)

    conditioning = Conditioning(
        prompt_embeds=empty(spec.text_tokens, spec.text_dim),
        image_embeds=empty(spec.image_tokens, spec.image_dim) if spec.image_tokens else None,
        condition=empty(shape[0] + 4, *shape[1:]) if spec.task in ("i2v", "flf2v") else None,
        first_latents=empty(shape[0], 1, *shape[2:]) if spec.task == "ti2v" and shape[1] > 1 else None,
    )
    return Batch(empty(*shape), empty(*shape), empty(), empty(), conditioning)


def trace(
    traced: Traced, strategy: MemoryStrategy, batch: Batch, rms_norm_in_fp32: bool = RMS_NORM_IN_FP32
) -> Counter[str]:
    """Bytes of each of `KINDS` at the peak of one training step: one micro-batch, no gradients at its start."""
    ledger = Ledger()
    frozen = [parameter for parameter in traced.transformer.parameters() if not parameter.requires_grad]
    ledger.hold("weights", [*frozen, *traced.transformer.buffers()])
    ledger.hold("adapters", traced.parameters.values())
    states = [value for state in traced.optimizer.state.values() for value in state.values()]
    ledger.hold("optimizer", states)
    ledger.hold("blocks", (value for value in _tensors(batch) if isinstance(value, Tensor)))
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        stack.enter_context(_labelled(traced, ledger))
        stack.enter_context(operators_of_cuda(rms_norm_in_fp32))
        stack.enter_context(apply(traced.transformer, traced.spec, strategy, Path(scratch)))
        with ledger:
            _step(traced, batch)
    return ledger.peak


def _step(traced: Traced, batch: Batch) -> None:
    """`training.trainer.Trainer._step` for one micro-batch, without its reading of values, which `meta` has not."""
    parameters = [*traced.parameters.values()]
    backend = SingleDevice(parameters, traced.optimizer, META, fp16=False)
    with compute_in(traced.transformer, traced.spec, "bf16", torch.device("cpu")):
        backend.backward(summed_loss(traced.transformer, traced.spec, batch))
    nn.utils.clip_grad_norm_(parameters, traced.training.clip_norm)
    backend.step(skip=False)


@contextmanager
def _labelled(traced: Traced, ledger: Ledger) -> Iterator[None]:
    """Tells `ledger` which storages are inputs of blocks and which are gradients of parameters."""

    def entered(_block: nn.Module, arguments: tuple[Any, ...]) -> None:
        ledger.hold("inputs", arguments[:1])

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


def _tensors(batch: Batch) -> list[Any]:
    return [batch.latents, batch.noise, batch.sigma, batch.weights, *vars(batch.conditioning).values()]


def row(strategy: str, num_frames: int, tokens: int, peak: Counter[str]) -> str:
    """A line of the table, in GiB."""
    trained = peak["adapters"] + peak["gradients"] + peak["optimizer"]
    shown = (peak.total(), peak["weights"], trained, peak["inputs"], peak["blocks"])
    return f"| {strategy} | {num_frames} | {tokens} | " + " | ".join(f"{count / 2**30:.2f}" for count in shown) + " |"


def main() -> None:
    """Reads the command line and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", default="wan2.1-i2v-14b-480p", choices=[*VARIANTS])
    parser.add_argument("--frames", type=int, nargs="+", default=[49, 81, 129])
    parser.add_argument("--size", default="832x480", help="width x height in pixels")
    parser.add_argument("--rank", type=int, default=32)
    options = parser.parse_args()
    width, height = (int(side) for side in options.size.split("x"))
    started = time.perf_counter()
    model = variant(options.model)
    traced = build(model, LoraConfig(rank=options.rank, alpha=options.rank), TrainingConfig(micro_batch_size=1))
    print(f"{model.name}, LoRA r{options.rank} (attention, ffn), {width}x{height}, one clip, bf16; peak GiB\n")
    print("| strategy | frames | tokens | peak | weights | adapters, gradients, AdamW | block inputs | blocks |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for name, strategy in STRATEGIES.items():
        for frames in options.frames:
            peak = trace(traced, strategy, meta_batch(model.spec, frames, (width, height)))
            print(row(name, frames, model.spec.tokens(frames, height, width), peak), flush=True)
    seconds, resident = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"\ntraced in {seconds:.0f} s, {resident / 2**20:.2f} GiB resident; torch {torch.__version__}")


if __name__ == "__main__":
    main()
