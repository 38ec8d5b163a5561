"""Attention in two calls: the bits of torch's, forward and backward, and the types that autocast would give it."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from longtake.memory.attention import attend, attend_backward, autocast_as_now, lowered

DTYPES = [torch.float32, torch.bfloat16]


def operands(dtype: torch.dtype, count: int = 3) -> list[Tensor]:
    """Tensors [2, 3, 65, 32], laid out as a projection leaves them."""
    torch.manual_seed(1)
    return [torch.randn(2, 65, 3, 32, dtype=dtype).transpose(1, 2) for _ in range(count)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_and_gradients_are_those_of_scaled_dot_product_attention_to_the_bit(dtype: torch.dtype) -> None:
    given = [tensor.requires_grad_() for tensor in operands(dtype)]
    expected = functional.scaled_dot_product_attention(*given)
    gradient = operands(dtype, 4)[3]
    expected_gradients = torch.autograd.grad(expected, given, gradient)
    with torch.no_grad():
        query, key, value = given
        out, logsumexp = attend(query, key, value)
        gradients = attend_backward(gradient, query, key, value, out, logsumexp)
    assert torch.equal(out, expected)
    assert all(torch.equal(one, other) for one, other in zip(gradients, expected_gradients, strict=True))
    assert logsumexp.dtype == torch.float32


def test_groups_of_heads_are_computed_as_all_heads_are() -> None:
    query, key, value, gradient = operands(torch.float32, 4)
    out, logsumexp = attend(query, key, value)
    whole = attend_backward(gradient, query, key, value, out, logsumexp)
    for heads in (slice(0, 1), slice(1, 3)):
        group = [tensor[:, heads] for tensor in (gradient, query, key, value)]
        out_of_group, logsumexp_of_group = attend(*group[1:])
        assert torch.equal(out_of_group, out[:, heads])
        found = attend_backward(*group, out[:, heads], logsumexp[:, heads])
        assert torch.equal(logsumexp_of_group, logsumexp[:, heads])
        assert all(torch.equal(part, of_all[:, heads]) for part, of_all in zip(found, whole, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes_on_meta_are_those_on_the_cpu(dtype: torch.dtype) -> None:
    query, key, value, gradient = (tensor.to("meta") for tensor in operands(dtype, 4))
    out, logsumexp = attend(query, key, value)
    gradients = attend_backward(gradient, query, key, value, out, logsumexp)
    assert {tensor.shape for tensor in (out, *gradients)} == {query.shape}
    assert {tensor.dtype for tensor in (out, *gradients)} == {dtype}
    assert out.transpose(1, 2).is_contiguous()
    assert logsumexp.shape[:2] == (2, 3)


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("device_type", ["cpu", "meta"])
def test_a_context_made_under_autocast_casts_the_same_later(enabled: bool, device_type: str) -> None:
    with torch.autocast("cpu", torch.float16, enabled=enabled):
        again = autocast_as_now(device_type)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=not enabled), again():
            assert torch.is_autocast_enabled("cpu") == enabled
            assert not enabled or torch.get_autocast_dtype("cpu") == torch.float16
        assert not torch.is_autocast_enabled("cpu")


def test_a_weight_cast_without_gradients_has_them_again_afterwards() -> None:
    weight = torch.ones(2, 2, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad(), autocast_as_now("cpu")():
            functional.linear(torch.ones(1, 2), weight)
        assert functional.linear(torch.ones(1, 2), weight).requires_grad


def test_operands_are_lowered_as_autocast_lowers_them() -> None:
    given = operands(torch.float32)
    assert all(one is other for one, other in zip(lowered(*given), given, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        assert {tensor.dtype for tensor in lowered(*given)} == {torch.bfloat16}
        assert {tensor.dtype for tensor in lowered(*(tensor.to("meta") for tensor in given))} == {torch.bfloat16}
        query, key, value = lowered(*given)
        assert torch.equal(functional.scaled_dot_product_attention(*given), attend(query, key, value)[0])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_cuda_it_is_torchs_to_the_bit(dtype: torch.dtype) -> None:
    given = [tensor.cuda().requires_grad_() for tensor in operands(dtype)]
    gradient = operands(dtype, 4)[3].cuda()
    kernel = "FLASH_ATTENTION" if dtype is torch.bfloat16 else "EFFICIENT_ATTENTION"
    with torch.nn.attention.sdpa_kernel(getattr(torch.nn.attention.SDPBackend, kernel)):
        expected = functional.scaled_dot_product_attention(*given)
    with torch.no_grad():
        query, key, value = given
        out, logsumexp = attend(query, key, value)
        gradients = attend_backward(gradient, query, key, value, out, logsumexp)
    assert torch.equal(out, expected)
    for one, other in zip(gradients, torch.autograd.grad(expected, given, gradient), strict=True):
        torch.testing.assert_close(one, other)
