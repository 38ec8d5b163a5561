"""Quantised weights: torchao's values, a linear layer's gradients to the bit, and nothing whole kept for backward."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torchao.quantization import Float8Tensor, Int8Tensor, PerRow, to_nf4

from longtake.config.schema import LoraConfig, ModelConfig
from longtake.errors import ConfigError
from longtake.lora import attach
from longtake.memory.flattened import inner_tensors, rebuilt
from longtake.memory.quantization import QuantizedWeight, dequantized, quantizable, quantize, quantize_blocks
from longtake.models.wan.conditioning import Conditioning, dit_inputs
from longtake.models.wan.tiny import bundled
from longtake.models.wan.variants import variant
from longtake.models.wan.weights import load_transformer, locate

CPU = torch.device("cpu")
KINDS = ("int8", "fp8", "nf4")
every_kind = pytest.mark.parametrize("kind", KINDS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
ALIGNMENT = 256


def matrix(dtype: torch.dtype = torch.float32, rows: int = 96, columns: int = 640) -> Tensor:
    """As a trained weight is distributed, nearly."""
    return (torch.randn(rows, columns) * 0.02).to(dtype)


def parameter(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)


@pytest.fixture
def transformer(tiny_root: Callable[[str], Path]) -> Any:
    """A tiny transformer with random weights, frozen."""
    files = locate(ModelConfig(path=str(tiny_root("tiny-i2v")), name="tiny-i2v"), bundled, print)
    return load_transformer(files, "transformer", torch.float32, CPU)


@every_dtype
def test_the_values_are_torchaos(dtype: torch.dtype) -> None:
    weight = matrix(dtype)
    theirs = {
        "int8": Int8Tensor.from_hp(weight, PerRow()).dequantize(),
        "fp8": Float8Tensor.from_hp(weight, granularity=PerRow()).dequantize(),
        "nf4": to_nf4(weight.float(), 64, 64).get_original_weight().to(dtype),
    }
    for kind, values in theirs.items():
        assert torch.equal(dequantized(quantize(weight, kind), dtype), values), kind  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "bits", "error"),
    [("int8", 8.1, 0.01), ("fp8", 8.1, 0.03), ("nf4", 4.2, 0.1)],
)
def test_bits_a_weight_and_relative_error(kind: Any, bits: float, error: float) -> None:
    weight = matrix(rows=512, columns=1024)
    quantised = quantize(weight, kind)
    assert sum(inner.nbytes for inner in inner_tensors(quantised)) * 8 / weight.numel() < bits
    assert (dequantized(quantised, torch.float32) - weight).norm() < error * weight.norm()


@every_kind
def test_the_parts_that_a_large_weight_is_worked_on_in_are_not_seen(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = matrix()
    at_once = quantize(weight, kind)
    values = dequantized(at_once, torch.bfloat16)
    monkeypatch.setattr("longtake.memory.quantization.PART", 64 * 70)
    in_parts = quantize(weight, kind)
    assert all(torch.equal(one, two) for one, two in zip(inner_tensors(at_once), inner_tensors(in_parts), strict=True))
    assert torch.equal(dequantized(in_parts, torch.bfloat16), values)


@every_dtype
@every_kind
def test_a_linear_layer_is_to_the_bit_one_of_the_values_it_stands_for(kind: Any, dtype: torch.dtype) -> None:
    quantised = parameter(quantize(matrix(dtype), kind))
    plain = parameter(dequantized(quantised, dtype))  # type: ignore[arg-type]
    for lowered in (False, True):
        rows = torch.randn(2, 5, 640, dtype=torch.float32 if lowered else dtype, requires_grad=True)
        bias = torch.randn(96, dtype=dtype, requires_grad=True)
        results = []
        for weight in (quantised, plain):
            with torch.autocast("cpu", torch.bfloat16, enabled=lowered):
                output = nn.functional.linear(rows, weight, bias)
            results.append((output, *torch.autograd.grad(output.float().square().sum(), (rows, bias))))
        assert results[0][0].dtype == (torch.bfloat16 if lowered else dtype)
        if lowered and dtype == torch.float32:  # autocast rounds the values once more than they need to be
            torch.testing.assert_close(results[0], results[1], rtol=0.02, atol=0.02)
        else:
            assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@every_kind
def test_autograd_keeps_the_quantised_bytes_alone(kind: Any) -> None:
    weight = parameter(quantize(matrix(torch.bfloat16), kind))
    rows = torch.randn(4, 640, dtype=torch.bfloat16, requires_grad=True)
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        nn.functional.linear(rows, weight)
    parts = {inner.data_ptr() for inner in inner_tensors(weight)}
    assert {tensor.data_ptr() for tensor in kept} == parts


@every_kind
def test_a_weight_works_over_a_flat_buffer(kind: Any) -> None:
    weight = quantize(matrix(torch.bfloat16), kind)
    inners = inner_tensors(weight)
    offsets = [0]
    for inner in inners:
        offsets.append(-(-(offsets[-1] + inner.nbytes) // ALIGNMENT) * ALIGNMENT)
    buffer = torch.zeros(offsets[-1], dtype=torch.uint8)
    views = []
    for inner, first in zip(inners, offsets, strict=False):
        buffer[first : first + inner.nbytes] = inner.reshape(-1).view(torch.uint8)
        views.append(buffer[first : first + inner.nbytes].view(inner.dtype).view(inner.shape))
    layer = nn.Linear(640, 96, bias=False)
    layer.weight = parameter(rebuilt(weight, views))
    rows = torch.randn(3, 640, dtype=torch.bfloat16, requires_grad=True)
    expected = nn.functional.linear(rows, parameter(weight))
    (gradient,) = torch.autograd.grad(expected.sum(), rows)
    output = layer(rows)
    assert torch.equal(output, expected)
    assert torch.equal(torch.autograd.grad(output.sum(), rows)[0], gradient)
    buffer.zero_()
    assert not torch.equal(layer(rows), expected), "it was a copy"


@every_kind
def test_on_meta_it_has_the_same_parts(kind: Any) -> None:
    weight = matrix(torch.bfloat16)
    real = inner_tensors(quantize(weight, kind))
    quantised = quantize(weight.to("meta"), kind)
    meta = inner_tensors(quantised)
    assert [(inner.shape, inner.dtype) for inner in meta] == [(inner.shape, inner.dtype) for inner in real]
    rows = torch.empty(3, 640, dtype=torch.bfloat16, device="meta", requires_grad=True)
    nn.functional.linear(rows, parameter(quantised)).sum().backward()
    assert rows.grad is not None
    assert rows.grad.shape == rows.shape


@every_kind
def test_a_weight_moves_with_its_module(kind: Any) -> None:
    layer = nn.Linear(640, 96)
    layer.weight = parameter(quantize(matrix(), kind))
    moved = layer.to("meta")
    assert isinstance(moved.weight, QuantizedWeight)
    assert {inner.device.type for inner in inner_tensors(moved.weight)} == {"meta"}
    assert type(moved.weight.data) is QuantizedWeight


def test_what_would_compute_with_it_is_refused() -> None:
    with pytest.raises(RuntimeError, match="quantised weight"):
        quantize(matrix(), "int8") + 1


def test_only_frozen_matrices_of_blocks_are_quantised(transformer: Any) -> None:
    spec = variant("tiny-i2v").spec
    chosen = {name for name, tensor in transformer.named_parameters() if not tensor.requires_grad}
    chosen = {name for name in chosen if quantizable(name, transformer.get_parameter(name), spec)}
    layers = [module for module in transformer.blocks.modules() if isinstance(module, nn.Linear)]
    assert len(chosen) == len(layers) == 4 * 12
    assert all(name.startswith("blocks.") for name in chosen)
    name = min(chosen)
    assert not quantizable(name, transformer.get_parameter(name).requires_grad_(True), spec)


def test_a_lora_on_quantised_weights_has_the_gradients_of_one_on_their_values(transformer: Any) -> None:
    spec = variant("tiny-i2v").spec
    gradients = []
    for whole in (False, True):
        if whole:  # of the second round
            for layer in (module for module in transformer.modules() if isinstance(module, nn.Linear)):
                if isinstance(layer.weight, QuantizedWeight):
                    layer.weight = parameter(dequantized(layer.weight, torch.float32))
        else:
            quantize_blocks(transformer, spec, "nf4")
            attach(transformer, LoraConfig(rank=2), 0)
            before = [*transformer.parameters()]
            quantize_blocks(transformer, spec, "nf4")
            assert all(one is two for one, two in zip(before, transformer.parameters(), strict=True))
            for name, tensor in transformer.named_parameters():
                if "lora_B" in name:
                    nn.init.normal_(tensor, std=0.05)
        gradients.append(lora_gradients(transformer))
    assert gradients[0].keys() == gradients[1].keys()
    assert all(gradient.any() for gradient in gradients[0].values())
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())


def lora_gradients(model: Any) -> dict[str, Tensor]:
    """Of one step, per-block checkpointing on."""
    spec = variant("tiny-i2v").spec
    draw = torch.Generator().manual_seed(3)
    conditioning = Conditioning(
        prompt_embeds=torch.randn(1, 512, spec.text_dim, generator=draw),
        image_embeds=torch.randn(1, spec.image_tokens, spec.image_dim, generator=draw),
        condition=torch.randn(1, 20, 2, 4, 4, generator=draw),
        first_latents=None,
    )
    noisy = torch.randn(1, spec.latent_channels, 2, 4, 4, generator=draw)
    model.zero_grad()
    model.train().enable_gradient_checkpointing()
    model(**dit_inputs(spec, noisy, torch.tensor([0.7]), conditioning), return_dict=False)[0].square().mean().backward()
    return {name: tensor.grad for name, tensor in model.named_parameters() if tensor.grad is not None}


def test_nf4_says_which_matrices_it_cannot_take() -> None:
    with pytest.raises(ConfigError, match=r"\[3, 5\]"):
        quantize(torch.randn(3, 5), "nf4")


def test_without_torchao_the_way_to_get_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ConfigError, match=r"pip install \"longtake\[quantization\]\""):
        quantize(matrix(), "int8")
