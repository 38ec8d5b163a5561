"""The plain tensors that a tensor of many parts (quantised weights, 8-bit optimiser states) is made of."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def inner_tensors(tensor: Tensor) -> list[Tensor]:
    """The tensors that hold the bytes of `tensor`, always in the same order; a plain one gives itself."""
    return [inner for _, inner in named_inner_tensors(tensor)]


def named_inner_tensors(tensor: Tensor, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """`inner_tensors` with names below `prefix` (`exp_avg/codes`); a plain tensor is called `prefix`."""
    if not is_traceable_wrapper_subclass(tensor):
        yield prefix, tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from named_inner_tensors(getattr(tensor, name), f"{prefix}/{name}")


def rebuilt(tensor: Tensor, inners: Sequence[Tensor]) -> Tensor:
    """A tensor like `tensor` over other `inners`, of the same types and shapes, wherever they lie.

    It shares their memory, is no parameter and needs no gradient.
    """
    left = iter(inners)
    whole = _rebuilt(tensor, left)
    assert next(left, None) is None, "more tensors than it is made of"
    return whole


def _rebuilt(tensor: Any, inners: Iterator[Tensor]) -> Tensor:
    if not is_traceable_wrapper_subclass(tensor):
        return next(inners)
    names, context = tensor.__tensor_flatten__()
    parts = {name: _rebuilt(getattr(tensor, name), inners) for name in names}
    return type(tensor).__tensor_unflatten__(parts, context, tensor.shape, tensor.stride())
