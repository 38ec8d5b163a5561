"""Quantised frozen weights: kept in one byte or half of one, and made whole for each use of them, in backward again.

torchao quantises. Its own linear layers let autograd keep the weight made whole until backward (int8, fp8), which costs
more than was saved; hence a tensor class with an autograd function of its own. The values are torchao's.
"""

import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils._python_dispatch import return_and_correct_aliasing

from longtake.errors import ConfigError, Problem
from longtake.memory.flattened import inner_tensors, rebuilt
from longtake.models.spec import ModelSpec

Kind: TypeAlias = Literal["int8", "fp8", "nf4"]
_Over: TypeAlias = "Callable[[Sequence[Tensor]], QuantizedWeight]"

NF4_BLOCK = 64
"""Weights that share one of nf4's scales, which is itself quantised (QLoRA, arXiv:2305.14314, section 3)."""
NF4_SCALE_BLOCK = 256
"""Scales that share one fp32 factor, at most."""
PART = 2**22
"""Weights that pass through fp32 at a time."""


def quantizable(name: str, tensor: Tensor, spec: ModelSpec) -> bool:
    """Whether the transformer's parameter `name` is a frozen matrix of one of its blocks that need not stay fp32."""
    parts = name.split(".")
    matrix = parts[0] == spec.blocks and parts[-1] == "weight" and tensor.ndim == 2
    return matrix and not tensor.requires_grad and not any(part in spec.keep_fp32 for part in parts)


def quantize_blocks(transformer: nn.Module, spec: ModelSpec, kind: Kind) -> None:
    """Quantises, in place and for good, the frozen matrices of the blocks that are not quantised yet."""
    for name, parameter in [*transformer.named_parameters()]:
        if quantizable(name, parameter, spec) and not isinstance(parameter, QuantizedWeight):
            path, _, leaf = name.rpartition(".")
            weight = nn.Parameter(quantize(parameter.detach(), kind), requires_grad=False)
            transformer.get_submodule(path)._parameters[leaf] = weight


def quantize(weight: Tensor, kind: Kind) -> "QuantizedWeight":
    """`weight` [out, in] in int8 or fp8 (e4m3), one fp32 scale a row, or in nf4; of the same dtype to look at.

    `nn.functional.linear` computes with it, forward and to its input's gradient, and autograd keeps the quantised bytes
    alone. Raises ConfigError where torchao is missing or where nf4's blocks do not divide the weight.
    """
    quantization = require_torchao("torchao.quantization", "memory.quantization")
    if kind == "nf4":
        return QuantizedWeight(kind, _nf4(weight, quantization), weight.shape, weight.dtype)
    make = {"int8": quantization.Int8Tensor, "fp8": quantization.Float8Tensor}[kind]
    # rows are independent, and torchao holds what it quantises in fp32 several times
    rows = max(1, PART // weight.shape[1])
    parts = [make.from_hp(part.contiguous(), granularity=quantization.PerRow()) for part in weight.split(rows)]
    codes, scales = torch.cat([part.qdata for part in parts]), torch.cat([part.scale for part in parts])
    return QuantizedWeight(kind, {"codes": codes, "scales": scales}, weight.shape, weight.dtype)


def dequantized(weight: "QuantizedWeight", dtype: torch.dtype) -> Tensor:
    """The values [out, in] that `weight` stands for, each product of code and scale rounded once from fp32."""
    if weight.kind == "nf4":
        return _whole_nf4(weight, dtype)
    # every code is a number of `dtype` too; the product is computed in the scales' fp32
    return weight.codes.to(dtype).mul_(weight.scales)


def require_torchao(module: str, where: str) -> Any:
    """A module of torchao; raises ConfigError where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            Problem(
                f"torchao cannot be imported ({error})",
                where,
                'run pip install "longtake[quantization]"',
                code="torchao-not-installed",
            )
        ) from error


class QuantizedWeight(Tensor):
    """A frozen matrix that looks like one of `dtype` and holds `inner`, its codes and scales."""

    kind: Kind
    codes: Tensor
    scales: Tensor
    factors: Tensor
    scales_mean: Tensor
    levels: Tensor

    @staticmethod
    def __new__(cls: Any, kind: Kind, inner: dict[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Any:
        """Only what is seen from outside is made here."""
        return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=inner["codes"].device)

    def __init__(self, kind: Kind, inner: dict[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> None:  # noqa: ARG002
        """`inner` has `codes` and `scales`, for nf4 `factors`, `scales_mean` and `levels` too."""
        self.kind = kind
        self.names = [*inner]
        for name, tensor in inner.items():
            setattr(self, name, tensor)

    def __repr__(self) -> str:  # type: ignore[override]  # without the values that Tensor's own would print
        """Kind, shape and device."""
        return f"QuantizedWeight({self.kind}, {list(self.shape)}, {self.dtype}, {self.device})"

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Kind, torch.dtype]]:
        """PyTorch's protocol for tensors made of tensors."""
        return self.names, (self.kind, self.dtype)

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], context: tuple[Kind, torch.dtype], shape: torch.Size, _stride: Any
    ) -> "QuantizedWeight":
        """Inverse of `__tensor_flatten__`."""
        return QuantizedWeight(context[0], inner, shape, context[1])

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """`linear` is computed here."""
        if func is linear:
            return _linear(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]  # the stub lacks `func`
        """What moves or copies a weight works on its parts; what would compute with it is refused."""
        kwargs = kwargs or {}
        moved = func is torch.ops.aten._to_copy.default and kwargs.get("dtype") in (None, args[0].dtype)
        if not moved and func not in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            raise RuntimeError(f"{func} of a quantised weight")
        options = {name: value for name, value in kwargs.items() if name != "dtype"}
        parts = [func(inner, *args[1:], **options) for inner in inner_tensors(args[0])]
        return return_and_correct_aliasing(func, args, kwargs, rebuilt(args[0], parts))


class _Linear(torch.autograd.Function):
    """x W^T + b for a quantised W: backward makes W whole again rather than keep it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, bias: Tensor | None, over: _Over, *inner: Tensor) -> Tensor:
        ctx.over = over
        ctx.save_for_backward(*inner)
        return linear(rows, dequantized(over(inner), rows.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        needed = ctx.needs_input_grad
        of_rows = gradient @ dequantized(ctx.over(ctx.saved_tensors), gradient.dtype) if needed[0] else None
        of_bias = gradient.flatten(0, -2).sum(0) if needed[1] else None
        return (of_rows, of_bias, *(None for _ in needed[2:]))


def _linear(rows: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    device = rows.device.type
    lowered = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if lowered else rows.dtype
    kind, names, shape, of = weight.kind, weight.names, weight.shape, weight.dtype

    def over(inner: Sequence[Tensor]) -> QuantizedWeight:
        return QuantizedWeight(kind, dict(zip(names, inner, strict=True)), shape, of)

    # the parts and not the weight: whoever watches what autograd saves sees plain tensors
    return _Linear.apply(rows.to(dtype), None if bias is None else bias.to(dtype), over, *inner_tensors(weight))


def _nf4(weight: Tensor, quantization: Any) -> dict[str, Tensor]:
    blocks = weight.numel() // NF4_BLOCK
    if weight.numel() % NF4_BLOCK:
        what = f"nf4 has blocks of {NF4_BLOCK} weights, which do not divide a matrix of {list(weight.shape)}"
        raise ConfigError(Problem(what, "memory.quantization", 'use "int8" or "fp8"', code="memory-nf4-shape"))
    # from fp32, or else scales and their means are rounded to bf16 on the way
    made = quantization.to_nf4(weight.float().contiguous(), NF4_BLOCK, math.gcd(blocks, NF4_SCALE_BLOCK))
    pairs = [made.nf4.repeat_interleave(16), made.nf4.repeat(16)]  # the two weights that a byte holds
    return {
        "codes": made.quantized_data,
        "scales": made.quantized_scalers,
        "factors": made.quantization_factor,
        "scales_mean": made.scaler_mean,
        "levels": torch.stack(pairs, dim=-1),
    }


def _whole_nf4(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    scales = weight.scales.view(len(weight.factors), -1) / weight.factors[:, None]
    scales = scales.view(-1, 1) + weight.scales_mean
    whole = torch.empty(weight.shape, dtype=dtype, device=weight.codes.device)
    blocks = whole.view(-1, NF4_BLOCK)
    codes = weight.codes.view(-1, NF4_BLOCK // 2)
    size = PART // NF4_BLOCK
    for first in range(0, len(blocks), size):
        part = slice(first, first + size)
        values = weight.levels.index_select(0, codes[part].flatten().int()).view(-1, NF4_BLOCK)
        torch.mul(values, scales[part], out=blocks[part])
    return whole
