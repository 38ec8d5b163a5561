"""Tensors of many parts, taken apart and put together."""

import pytest
import torch
from torchao.optim.subclass_8bit import OptimState8bit

from longtake.memory.flattened import inner_tensors, named_inner_tensors, rebuilt
from longtake.memory.quantization import quantize


def test_a_plain_tensor_is_its_own_only_part() -> None:
    tensor, other = torch.ones(2), torch.zeros(2)
    assert inner_tensors(tensor)[0] is tensor
    assert dict(named_inner_tensors(tensor, "a/b")) == {"a/b": tensor}
    assert rebuilt(tensor, [other]) is other


def test_parts_have_names_below_the_whole() -> None:
    state = OptimState8bit.zeros((64, 64))
    assert [name for name, _ in named_inner_tensors(state, "exp_avg")] == [
        "exp_avg/codes",
        "exp_avg/scale",
        "exp_avg/qmap",
    ]


def test_a_rebuilt_tensor_lies_over_the_parts_it_is_given() -> None:
    weight = quantize(torch.randn(8, 64), "int8")
    copies = [inner.clone() for inner in inner_tensors(weight)]
    other = rebuilt(weight, copies)
    assert type(other) is type(weight)
    assert (other.shape, other.dtype, other.requires_grad) == (weight.shape, weight.dtype, False)
    assert all(one is two for one, two in zip(inner_tensors(other), copies, strict=True))


def test_parts_that_are_left_over_are_an_error_of_the_caller() -> None:
    with pytest.raises(AssertionError):
        rebuilt(torch.ones(2), [torch.ones(2), torch.ones(2)])
