# ruff: noqa: F722
"""Attention as two calls, one for each pass, so that who calls them decides what is kept in between."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Float32

_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_CPU_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_FLASH = torch.ops.aten._scaled_dot_product_flash_attention
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_backward
_EFFICIENT = torch.ops.aten._scaled_dot_product_efficient_attention
_EFFICIENT_BACKWARD = torch.ops.aten._scaled_dot_product_efficient_attention_backward

_meta_is: ContextVar[str] = ContextVar("the device that `meta` tensors stand for", default="cuda")


@contextmanager
def meta_stands_for(device_type: Literal["cuda", "cpu"]) -> Iterator[None]:
    """Inside the context attention on `meta` tensors is that device's operator; else CUDA's."""
    outer = _meta_is.set(device_type)
    try:
        yield
    finally:
        _meta_is.reset(outer)


def attend(
    query: Float[Tensor, "batch heads tokens head_dim"],
    key: Float[Tensor, "batch heads tokens head_dim"],
    value: Float[Tensor, "batch heads tokens head_dim"],
) -> tuple[Float[Tensor, "batch heads tokens head_dim"], Float32[Tensor, "batch heads _"]]:
    """Attention without mask or dropout: (output, logsumexp), the output laid out as [batch, tokens, heads, head_dim].

    softmax(query key^T / sqrt(head_dim)) value (arXiv:1706.03762, equation 1) by torch's fused kernels, which give on
    the CPU the bits of `scaled_dot_product_attention`. The logsumexp of each row is padded to the kernel's liking.
    """
    if _on_cpu(query):
        out, logsumexp = _CPU(query, key, value)
    elif _has_flash(query):
        out, logsumexp, *_ = _FLASH(query, key, value)
    else:
        out, logsumexp, *_ = _EFFICIENT(query, key, value, None, compute_log_sumexp=True)
    return out, logsumexp


def attend_backward(
    gradient: Float[Tensor, "batch heads tokens head_dim"],
    query: Float[Tensor, "batch heads tokens head_dim"],
    key: Float[Tensor, "batch heads tokens head_dim"],
    value: Float[Tensor, "batch heads tokens head_dim"],
    out: Float[Tensor, "batch heads tokens head_dim"],
    logsumexp: Float32[Tensor, "batch heads _"],
) -> tuple[
    Float[Tensor, "batch heads tokens head_dim"],
    Float[Tensor, "batch heads tokens head_dim"],
    Float[Tensor, "batch heads tokens head_dim"],
]:
    """Gradients of query, key and value, given that of `attend`'s output; nothing random is left to replay."""
    given = (gradient, query, key, value)
    if _on_cpu(query):
        found = _CPU_BACKWARD(*given, out, logsumexp, 0.0, False)
    elif _has_flash(query):
        tokens, no_state = query.shape[2], torch.empty(0, dtype=torch.int64, device=query.device)
        found = _FLASH_BACKWARD(*given, out, logsumexp, None, None, tokens, tokens, 0.0, False, no_state, no_state)
    else:
        no_state = torch.empty((), dtype=torch.int64, device=query.device)
        found = _EFFICIENT_BACKWARD(*given, None, out, logsumexp, no_state, no_state, 0.0, [True, True, True, False])
    return found[0], found[1], found[2]


def autocast_as_now(device_type: str) -> Callable[[], AbstractContextManager[None]]:
    """Makes contexts in which autocast casts what it casts now, for use in a backward pass.

    They keep no cast weights: a weight cast without gradients would be found again where gradients are wanted
    (https://github.com/pytorch/pytorch/issues/112583), and all of them would stay until the outermost context ends.
    """
    name = _autocast_name(device_type)
    enabled, dtype = torch.is_autocast_enabled(name), torch.get_autocast_dtype(name)
    return lambda: torch.autocast(name, dtype=dtype, enabled=enabled, cache_enabled=False)


def lowered(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Query, key and value in the type in which autocast has `scaled_dot_product_attention` computed, if it is on."""
    name = _autocast_name(tensors[0].device.type)
    if not torch.is_autocast_enabled(name):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(name)) for tensor in tensors)


def _autocast_name(device_type: str) -> str:
    """Autocast knows no `meta` device; what is traced there follows the CPU's switch."""
    return "cpu" if device_type == "meta" else device_type


def _on_cpu(query: Tensor) -> bool:
    return query.device.type == "cpu" or (query.is_meta and _meta_is.get() == "cpu")


def _has_flash(query: Tensor) -> bool:
    """FlashAttention-2 takes half precision on compute capability 8.0 and above."""
    if query.dtype not in (torch.bfloat16, torch.float16):
        return False
    return query.device.type == "meta" or torch.cuda.get_device_capability(query.device) >= (8, 0)
