"""The operators and casts that CUDA tensors would go through, for `meta` tensors."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import handle_torch_function, has_torch_function

RMS_NORM_IN_FP32 = torch.__version__ >= "2.12"
"""Whether autocast on CUDA casts what rms_norm is given to fp32 (https://github.com/pytorch/pytorch/issues/188955)."""


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
def operators_of_cuda(rms_norm_in_fp32: bool = RMS_NORM_IN_FP32, fused_rms_norm: bool = True) -> Iterator[None]:
    """Inside the context `meta` tensors go through the operators, and the casts of autocast, that CUDA's would.

    Autocast knows no `meta` device and is disabled for CUDA where there is none, so the CPU's switch is read as
    CUDA's: linear, convolution and attention compute in its type, with `rms_norm_in_fp32` rms_norm in fp32
    (ATen/autocast_mode.h; layer_norm, in that list too, is given fp32 by the model). Autocast's cache of cast weights
    is left out: at this step's peak it holds little that the graph does not (25 MiB for the 14B without checkpointing).
    Functions are replaced, because a TorchFunctionMode is not active while backward recomputes a block; checkpointing
    restores the CPU's switch there. Without `fused_rms_norm` that norm is what `meta` makes of it.
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
        if has_torch_function((query, key, value)):  # as in torch's own: a mode may want to replace it
            return handle_torch_function(cuda_attention, (query, key, value), query, key, value, **keywords)
        assert keywords["attn_mask"] is None, "flash attention has no mask"
        options = (keywords["dropout_p"], keywords["is_causal"])
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(*lowered(query, key, value), *options, scale=keywords["scale"])[0]

    functions = [cuda_linear, cuda_conv3d, *([cuda_rms_norm] if fused_rms_norm else [])]
    with ExitStack() as replaced:
        for function in functions:
            replaced.enter_context(patch.object(functional, function.__name__.removeprefix("cuda_"), function))
        replaced.enter_context(patch.object(functional, "scaled_dot_product_attention", cuda_attention))
        yield
