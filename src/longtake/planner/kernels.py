"""Runs operators on `meta` tensors, and tells what they cost on the device they stand for."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, reduce
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from longtake.memory.flattened import inner_tensors
from longtake.planner.events import NO_WORK, Work

GRANULE = 512
"""Bytes that CUDA's caching allocator rounds an allocation up to."""
_ATEN = torch.ops.aten
FLASH_BACKWARD = _ATEN._scaled_dot_product_flash_attention_backward.default
_ATTENTION = (_ATEN._scaled_dot_product_flash_attention, _ATEN._scaled_dot_product_flash_attention_for_cpu)
_ATTENTION_BACKWARD = (
    _ATEN._scaled_dot_product_flash_attention_backward,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward,
)
_device_type: ContextVar[str] = ContextVar("the device whose kernels are meant", default="cuda")
_ALLOCATING = (_ATEN.empty, _ATEN.empty_like, _ATEN.empty_strided, _ATEN.new_empty, _ATEN.new_empty_strided)
Result: TypeAlias = Any
"""What an operator returns."""
Made: TypeAlias = tuple[Result, Sequence[Tensor]]
"""A result, and its tensors that are in new storages."""


@dataclass(frozen=True, slots=True)
class Ran:
    """What an operator returned, what it cost, and those of its tensors that are in new storages."""

    result: Result
    work: Work
    made: Sequence[Tensor]


_OF_8_BIT_STATES = {_ATEN.copy_: 41, _ATEN.lerp: 12}
"""Bytes a value for which torchao's 8-bit states, uncompiled as on the CPU, make temporaries that no mode sees.

torchao/optim/quant_utils.py: `quantize_8bit_with_qmap`, whose codes are int64 until the end, and `dequant_with_qmap`.
"""


@contextmanager
def kernels_of(device_type: str) -> Iterator[None]:
    """Inside the context `workspaces` are those of the kernels of `device_type`; else CUDA's."""
    outer = _device_type.set(device_type)
    try:
        yield
    finally:
        _device_type.reset(outer)


def workspaces(func: Any, args: Sequence[Any]) -> tuple[int, ...]:
    """Bytes that a kernel allocates for itself, unseen by any dispatch mode."""
    if _device_type.get() == "cpu":
        return _workspaces_on_cpu(func, args)
    return _of_flash_backward(args) if func is FLASH_BACKWARD else ()


def _of_flash_backward(args: Sequence[Any]) -> tuple[int, ...]:
    """FlashAttention-2's fp32 sums of dq and of each row's softmax gradient.

    They are for tokens rounded up to 128 and a head rounded up to 32 values (PyTorch,
    aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp, `mha_bwd`), and the output and its gradient must be
    contiguous as [batch, tokens, heads, head_dim], or are copied (cuda/attention_backward.cu,
    `_flash_attention_backward`).
    """
    gradient, query, _, _, out = args[:5]
    batch, heads, tokens, head_dim = query.shape
    rows = batch * heads * rounded(tokens, 128)
    sums = [4 * rows * rounded(head_dim, 32 if head_dim <= 128 else 64), 4 * rows]
    copies = [tensor.nbytes for tensor in (gradient, out) if not tensor.transpose(1, 2).is_contiguous()]
    return (*sums, *copies)


def _workspaces_on_cpu(func: Any, args: Sequence[Any]) -> tuple[int, ...]:
    """What grows with the operands, as on a CPU with AMX; in fp32 there is nothing."""
    packet = func._overloadpacket
    if packet is _ATEN._scaled_dot_product_flash_attention_for_cpu:
        return _packed(*args[:3])
    if packet in (_ATEN.mm, _ATEN.addmm):
        return _accumulator(*args[-2:])
    if packet in _OF_8_BIT_STATES and len(inner_tensors(args[0])) > 1:
        return (_OF_8_BIT_STATES[packet] * args[0].numel(),)
    return _promoted(args) if torch.Tag.pointwise in func.tags else ()


def _packed(query: Tensor, key: Tensor, value: Tensor) -> tuple[int, ...]:
    """Keys and values in half precision, in the order of the matrix unit.

    aten/src/ATen/native/cpu/FlashAttentionKernel.cpp, `cpu_flash_attention`, `key_reorder` and `value_reorder`.
    """
    packs = key.dtype != torch.float32 and min(query.shape[2], key.shape[2]) >= 64
    return (key.nbytes, value.nbytes) if packs else ()


def _accumulator(rows: Tensor, columns: Tensor) -> tuple[int, ...]:
    """oneDNN's fp32 sums of a product in half precision that it goes through in several parts of the long inner side.

    `is_buffer_c_required`, src/cpu/x64/matmul/brgemm_matmul_utils.cpp. Where it cuts depends on the cache; measured
    with 2 MiB of L2 a core: from an inner side of 2,000 on, over 256 columns, 512 of them at a time.
    """
    (outer, inner), many = rows.shape, columns.shape[1]
    cut = inner >= 2000 and many > 256 and rows.is_contiguous()
    return (4 * outer * min(many, 512),) if cut and rows.dtype != torch.float32 else ()


def _promoted(args: Sequence[Any]) -> tuple[int, ...]:
    """Operands that are cast to the common type first, which on CUDA the kernel does as it reads them.

    aten/src/ATen/TensorIterator.cpp, `compute_types`, where `common_device` is the CPU.
    """
    operands = [each for each in args if isinstance(each, Tensor) and each.ndim]
    types = {each.dtype for each in operands}
    if len(types) < 2:
        return ()
    common = reduce(torch.promote_types, types)
    return tuple(each.numel() * common.itemsize for each in operands if each.dtype != common)


def rounded(value: int, unit: int) -> int:
    """`value` up to the next multiple of `unit`."""
    return -(-value // unit) * unit


class _Kernels:
    """Runs operators, and remembers what they gave on `meta`: their own kernels there are slow Python.

    What an operator returns for plain `meta` tensors depends on types, shapes and strides alone.
    """

    def __init__(self) -> None:
        self.found: dict[Any, tuple[Callable[[Any], Made], Work] | None] = {}

    def run(self, func: Any, args: Any, kwargs: Any) -> Ran:
        """Runs `func`, or gives what it gave before."""
        try:
            key = (func, _described(args), _described(tuple(kwargs.items())))
            known = self.found.get(key)
        except _Other:
            key, known = None, None
        if known is not None:
            again, work = known
            result, made = again(args)
            return Ran(result, work, made)
        result = func(*args, **kwargs)
        work = _work(func, args, kwargs, result)
        made = _new(result, args, kwargs)
        if key is not None and key not in self.found:
            make = _maker(result, made, args)
            self.found[key] = None if make is None else (make, work)
        return Ran(result, work, made)


KERNELS = _Kernels()
_PLAIN = (Tensor, nn.Parameter)
_SIMPLE = (int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format)


class _Other(Exception):
    """Something that is neither a plain `meta` tensor nor a number, a name or the like."""


@cache
def is_view(func: Any) -> bool:
    return any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns)


def _work(func: Any, args: Any, kwargs: Any, result: Result) -> Work:
    """Its cost, with torch's own count of floating-point operations where it has one."""
    packet = func._overloadpacket
    if packet in _ALLOCATING:
        return NO_WORK
    if packet is _ATEN._scaled_dot_product_flash_attention_for_cpu:  # which torch does not count
        return Work(attention_flops=_attention_flops(2, *args[:3]), calls=1)
    if packet is _ATEN._scaled_dot_product_flash_attention_for_cpu_backward:
        return Work(attention_backward_flops=_attention_flops(5, *args[1:4]), calls=1)
    count = flop_registry.get(packet)
    flops = count(*args, **kwargs, out_val=result) if count else 0
    if packet in _ATTENTION:
        return Work(attention_flops=flops, calls=1)
    if packet in _ATTENTION_BACKWARD:
        return Work(attention_backward_flops=flops, calls=1)
    if flops:
        single = _tensors(result)[0].dtype == torch.float32
        return Work(fp32_matmul_flops=flops, calls=1) if single else Work(matmul_flops=flops, calls=1)
    return Work(moved_bytes=sum(tensor.nbytes for tensor in _tensors((args, kwargs, result))), calls=1)


def _attention_flops(products: int, query: Tensor, key: Tensor, value: Tensor) -> int:
    """Of `products` matrix products of rows x keys x head_dim, as torch counts those of its other kernels.

    Two in the forward pass; five in the backward pass, which computes the scores again (arXiv:2205.14135).
    """
    batch, heads, rows, head_dim = query.shape
    return 2 * products * batch * heads * rows * key.shape[2] * max(head_dim, value.shape[3])


def _new(result: Result, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors of a result whose storages are not an argument's; not every view says that it is one."""
    given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
    return [tensor for tensor in _tensors(result) if tensor.untyped_storage()._cdata not in given]


def _described(value: Any) -> Any:
    """A key for what matters of an argument; numbers with their type, since 1 == 1.0."""
    kind = type(value)
    if kind in _PLAIN:
        if not value.is_meta:
            raise _Other
        return value.shape, value.stride(), value.dtype
    if kind in (tuple, list):
        return tuple(map(_described, value))
    if value is not None and not isinstance(value, _SIMPLE):
        raise _Other
    return kind, value


def _maker(result: Result, made: Sequence[Tensor], args: Any) -> Callable[[Any], Made] | None:
    """What gives the result again for arguments like these, and its new tensors; None where that is not so simple."""
    if args and result is args[0] and isinstance(result, Tensor):
        return lambda args: (args[0], ())
    single, kind = not isinstance(result, (tuple, list)), type(result)  # a tensor in the closure would stay alive
    parts = [result] if single else result
    tensors = [part for part in parts if isinstance(part, Tensor)]
    separate = len({tensor.untyped_storage()._cdata for tensor in tensors}) == len(tensors)
    if not separate or len(made) != len(tensors) or not all(_dense(tensor) for tensor in tensors):
        return None
    templates = [(part.shape, part.stride(), part.dtype) if isinstance(part, Tensor) else part for part in parts]

    def make(_args: Any) -> Made:
        again = [_empty(*template) if isinstance(template, tuple) else template for template in templates]
        return again[0] if single else kind(again), [part for part in again if isinstance(part, Tensor)]

    return make


def _empty(shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(shape, stride, dtype=dtype, device="meta")


def _dense(tensor: Tensor) -> bool:
    """Whether an empty tensor of its shape and strides has its storage."""
    if type(tensor) is not Tensor or not tensor.is_meta or tensor.storage_offset():
        return False
    like = _empty(tensor.shape, tensor.stride(), tensor.dtype)
    return like.untyped_storage().nbytes() == tensor.untyped_storage().nbytes()


def _tensors(value: Any) -> list[Tensor]:
    """All tensors in an argument or result, and instead of a tensor made of tensors those."""
    return [inner for leaf in tree_leaves(value) if isinstance(leaf, Tensor) for inner in inner_tensors(leaf)]
