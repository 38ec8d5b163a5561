"""The operators and casts that tensors of a device would go through, for `meta` tensors."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, TypeAlias
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import handle_torch_function, has_torch_function

from longtake.memory.attention import meta_stands_for
from longtake.planner.kernels import kernels_of

DeviceType: TypeAlias = Literal["cuda", "cpu"]
_FLASH = torch.ops.aten._scaled_dot_product_flash_attention
_FLASH_ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

RMS_NORM_IN_FP32 = torch.__version__ >= "2.12"
"""Whether autocast on CUDA casts what rms_norm is given to fp32 (https://github.com/pytorch/pytorch/issues/188955)."""


class _FusedRMSNorm(torch.autograd.Function):
    """CUDA's rms_norm, as far as memory goes: it keeps its input and one fp32 number a row.

    `aten._fused_rms_norm` has a kernel and a derivative on CUDA alone; on `meta` it is decomposed.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight, rows.new_empty((*rows.shape[:-1], 1), dtype=torch.float32))
        return rows.clone()  # as many bytes read and written

    @staticmethod
    def backward(ctx: Any, *_gradients: Tensor) -> tuple[Tensor, Tensor | None]:
        rows, weight, _ = ctx.saved_tensors
        return rows.clone(), torch.empty_like(weight) if ctx.needs_input_grad[1] else None


@contextmanager
def operators_of(
    device_type: DeviceType, rms_norm_in_fp32: bool = RMS_NORM_IN_FP32, fused_rms_norm: bool = True
) -> Iterator[None]:
    """Inside the context `meta` tensors go through the operators, and the casts of autocast, that a device's would.

    Autocast knows no `meta` device and is disabled for CUDA where there is none, so the CPU's switch is read as the
    device's: linear, convolution and attention compute in its type, on CUDA with `rms_norm_in_fp32` rms_norm in fp32
    (ATen/autocast_mode.h; layer_norm, in that list too, is given fp32 by the model). Autocast's cache of cast weights
    is kept as torch keeps it: all weights that are trained in fp32, until the outermost context ends. Functions are
    replaced, because a TorchFunctionMode is not active while backward recomputes a block; checkpointing restores the
    CPU's switch there. Without `fused_rms_norm` CUDA's norm is what `meta` makes of it, as the CPU's always is.
    """
    linear, conv3d = functional.linear, functional.conv3d
    on_cuda, cast = device_type == "cuda", _Casts()

    def own_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
        return linear(*cast.lowered(input, weight, bias))

    def own_conv3d(input: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Any:
        return conv3d(*cast.lowered(input, weight, bias), *rest)

    def own_rms_norm(input: Tensor, _shape: Any, weight: Tensor, _eps: float | None = None) -> Any:
        if rms_norm_in_fp32 and torch.is_autocast_enabled("cpu"):
            input, weight = input.float(), weight.float()
        assert input.dtype == weight.dtype, "CUDA fuses no rms_norm of two types"
        return _FusedRMSNorm.apply(input, weight)

    def own_attention(query: Tensor, key: Tensor, value: Tensor, **keywords: Any) -> Any:
        if has_torch_function((query, key, value)):  # as in torch's own: a mode may want to replace it
            return handle_torch_function(own_attention, (query, key, value), query, key, value, **keywords)
        assert keywords["attn_mask"] is None, "flash attention has no mask"
        options = (keywords["dropout_p"], keywords["is_causal"])
        operator = _FLASH if on_cuda else _FLASH_ON_CPU
        return operator(*cast.lowered(query, key, value), *options, scale=keywords["scale"])[0]

    functions = [own_linear, own_conv3d, *([own_rms_norm] if on_cuda and fused_rms_norm else [])]
    with ExitStack() as replaced:
        for function in functions:
            replaced.enter_context(patch.object(functional, function.__name__.removeprefix("own_"), function))
        replaced.enter_context(patch.object(functional, "scaled_dot_product_attention", own_attention))
        replaced.enter_context(patch.object(torch, "clear_autocast_cache", cast.forget))
        replaced.enter_context(meta_stands_for(device_type))
        replaced.enter_context(kernels_of(device_type))
        yield


class _Casts:
    """Autocast's casts to the lower type, and its cache (`cached_cast`, aten/src/ATen/autocast_mode.cpp)."""

    def __init__(self) -> None:
        self.cached: dict[int, tuple[Tensor, Tensor]] = {}
        self.clear = torch.clear_autocast_cache

    def lowered(self, *tensors: Tensor | None) -> Iterator[Any]:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        return (tensor if dtype is None or tensor is None else self._cast(tensor, dtype) for tensor in tensors)

    def forget(self) -> None:
        """Called by torch when the outermost context ends."""
        self.cached.clear()
        self.clear()

    def _cast(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        trained = tensor.requires_grad and tensor.is_leaf and tensor.dtype == torch.float32 and not tensor._is_view()
        if not trained or dtype == torch.float32 or not torch.is_autocast_cache_enabled():
            return tensor.to(dtype)
        if id(tensor) not in self.cached:
            self.cached[id(tensor)] = tensor, tensor.to(dtype)
        return self.cached[id(tensor)][1]
