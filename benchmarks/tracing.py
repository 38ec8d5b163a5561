"""Counts the bytes that a computation on `meta` tensors would hold on a device, operator by operator."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from longtake.memory.copies import Event, MetaCopies, Place, Queue
from longtake.memory.flattened import inner_tensors

GRANULE = 512
"""Bytes that CUDA's caching allocator rounds an allocation up to."""
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_backward.default
Result: TypeAlias = Any
"""What an operator returns."""
Made: TypeAlias = tuple[Result, Sequence[Tensor]]
"""A result, and its tensors that are in new storages."""


@dataclass(frozen=True)
class Storage:
    """A storage that was alive at the peak: its rounded size, its kind, the operator that made it."""

    nbytes: int
    kind: str
    operator: str


class Ledger(TorchDispatchMode):
    """Counts the storages of one device type that are alive, by kind, and keeps the counts at the peak.

    What operators make under it counts as `blocks`; what was there before, or has another name, is told to `hold`. A
    view counts nothing, even of a storage that was never counted. `flops` are those of the operators so far, as torch's
    flop counter has them. `timeline` has (flops, bytes) after each operator, workspaces included.
    """

    def __init__(self, device_type: str = "meta", workspaces: bool = True, explain_at: int | None = None) -> None:
        """`explain_at`: the bytes at which `largest` is filled, the largest storage first; a former trace's peak."""
        super().__init__()
        self.device_type = device_type
        self.workspaces = workspaces
        self.explain_at = explain_at
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.largest: list[Storage] = []
        self.flops = 0
        self.timeline: list[tuple[int, int]] = []
        self._alive: dict[int, tuple[weakref.ref[torch.UntypedStorage], Storage]] = {}
        self._total = 0
        self._peak_total = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Asked by torch: whether to wrap the function below, which takes a tenth of the time; nothing is compiled."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Result:
        if _is_view(func):
            return func(*args, **(kwargs or {}))
        result, flops, made = KERNELS.run(func, args, kwargs or {})
        self.flops += flops
        for tensor in made:
            if tensor.device.type == self.device_type and not self._counted(tensor):
                self._count("blocks", tensor, func.__name__)
        workspace = workspace_bytes(func, args) if self.workspaces else 0
        self._look(workspace)
        self.timeline.append((self.flops, self._total + workspace))
        return result

    def hold(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Counts the storages of `tensors`, and of those that they are made of, as `kind`."""
        for tensor in (inner for each in tensors for inner in inner_tensors(each)):
            if tensor.device.type != self.device_type:
                continue
            if not self._counted(tensor):
                self._count(kind, tensor, "held")
                continue
            key = tensor.untyped_storage()._cdata
            reference, old = self._alive[key]
            self._alive[key] = (reference, Storage(old.nbytes, kind, old.operator))
            self.now[old.kind] -= old.nbytes
            self.now[kind] += old.nbytes
        self._look(0)

    def _counted(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._alive

    def _count(self, kind: str, tensor: Tensor, operator: str) -> None:
        storage = tensor.untyped_storage()
        size = rounded(storage.nbytes(), GRANULE)
        key = storage._cdata
        self._alive[key] = (weakref.ref(storage, partial(self._freed, key)), Storage(size, kind, operator))
        self.now[kind] += size
        self._total += size

    def _freed(self, key: int, _reference: weakref.ref[torch.UntypedStorage]) -> None:
        _, storage = self._alive.pop(key)
        self.now[storage.kind] -= storage.nbytes
        self._total -= storage.nbytes

    def _look(self, workspace: int) -> None:
        """Remembers the moment if it is the highest; `workspace` is there for this moment alone."""
        total = self._total + workspace
        if total > self._peak_total:
            self._peak_total = total
            self.peak = self.now.copy()
            self.peak["workspace"] = workspace
        if self.explain_at is not None and total >= self.explain_at and not self.largest:
            found = [storage for _, storage in self._alive.values()]
            self.largest = sorted(found, key=lambda storage: -storage.nbytes)


class CountedCopies(MetaCopies):
    """Tells a ledger of the buffers that are filled on the device, and counts the bytes that cross each way."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger
        self.moved: Counter[Queue] = Counter()
        self.of_host: set[int] = set()

    def start(self, queue: Queue, target: Place, source: Place, after: Sequence[Event]) -> Event:
        """Done at once."""
        assert isinstance(target, Tensor), "on meta there are no files"
        self.moved[queue] += target.nbytes
        if queue == "inward":
            self.ledger.hold("buffers", [target])
        return super().start(queue, target, source, after)

    def host(self, nbytes: int) -> Tensor:
        """A tensor that is not the device's."""
        memory = super().host(nbytes)
        self.of_host.add(memory.untyped_storage()._cdata)
        return memory

    def on_device(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Those tensors, or parts of tensors, that are not views of `host`'s."""
        inner = [inner for tensor in tensors for inner in inner_tensors(tensor)]
        return [tensor for tensor in inner if tensor.untyped_storage()._cdata not in self.of_host]


def workspace_bytes(func: Any, args: Sequence[Any]) -> int:
    """Bytes that a kernel allocates for itself, unseen by any dispatch mode: those of attention's backward pass.

    FlashAttention-2's has fp32 sums of dq and of each row's softmax gradient, for tokens rounded up to 128 and a head
    rounded up to 32 values (PyTorch, aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp, `mha_bwd`), and
    the output and its gradient must be contiguous as [batch, tokens, heads, head_dim], or are copied
    (cuda/attention_backward.cu, `_flash_attention_backward`).
    """
    if func is not FLASH_BACKWARD:
        return 0
    gradient, query, _, _, out = args[:5]
    batch, heads, tokens, head_dim = query.shape
    rows = batch * heads * rounded(tokens, 128)
    sums = [4 * rows * rounded(head_dim, 32 if head_dim <= 128 else 64), 4 * rows]
    copies = [tensor.nbytes for tensor in (gradient, out) if not tensor.transpose(1, 2).is_contiguous()]
    return sum(rounded(nbytes, GRANULE) for nbytes in (*sums, *copies))


def rounded(value: int, unit: int) -> int:
    """`value` up to the next multiple of `unit`."""
    return -(-value // unit) * unit


class _Kernels:
    """Runs operators, and remembers what they gave on `meta`: their own kernels there are slow Python.

    What an operator returns for plain `meta` tensors depends on types, shapes and strides alone.
    """

    def __init__(self) -> None:
        self.found: dict[Any, tuple[Callable[[Any], Made], int] | None] = {}

    def run(self, func: Any, args: Any, kwargs: Any) -> tuple[Result, int, Sequence[Tensor]]:
        """(what `func` returns, its floating-point operations, the tensors of the result that are in new storages)."""
        try:
            key = (func, _described(args), _described(tuple(kwargs.items())))
            known = self.found.get(key)
        except _Other:
            key, known = None, None
        if known is not None:
            again, flops = known
            result, made = again(args)
            return result, flops, made
        result, flops = _run(func, args, kwargs)
        made = _new(result, args, kwargs)
        if key is not None and key not in self.found:
            make = _maker(result, made, args)
            self.found[key] = None if make is None else (make, flops)
        return result, flops, made


KERNELS = _Kernels()
_PLAIN = (Tensor, nn.Parameter)
_SIMPLE = (int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format)


class _Other(Exception):
    """Something that is neither a plain `meta` tensor nor a number, a name or the like."""


@cache
def _is_view(func: Any) -> bool:
    return any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns)


def _run(func: Any, args: Any, kwargs: Any) -> tuple[Result, int]:
    result = func(*args, **kwargs)
    count = flop_registry.get(func._overloadpacket)
    return result, count(*args, **kwargs, out_val=result) if count else 0


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
