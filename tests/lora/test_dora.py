"""DoRA: the trained lengths of rows, against peft's own layer and against the paper's equation."""

import pytest
import torch
from peft import LoraConfig as PeftConfig
from safetensors.torch import load_file

from longtake.config.schema import LoraConfig
from longtake.lora import (
    adapter_state,
    attach,
    load_adapter_state,
    merge,
    read_adapter,
    save_adapter,
    trained_adapter,
)
from longtake.lora.dora import row_squares
from longtake.lora.layers import adapted_layers
from longtake.memory.quantization import dequantized, quantize_blocks
from longtake.models.wan.detection import inspect
from longtake.models.wan.variants import variant
from longtake.models.wan.weights import ModelFiles, weight_files
from lora_pipelines import pipeline_of

DORA = LoraConfig(rank=4, alpha=6.0, targets=("attention", "ffn"), dora=True)


def gradients(transformer, velocity):
    """Of a loss of the output, by the trained parameters' names."""
    torch.set_grad_enabled(True)
    velocity(transformer, grad=True).square().mean().backward()
    return {name: weight.grad for name, weight in transformer.named_parameters() if weight.requires_grad}


def peft_s_own(build, name, state):
    """The transformer with peft's DoRA layers."""
    transformer = build(name)
    modules = sorted({key.rpartition(".lora_")[0] for key in state})
    transformer.add_adapter(
        PeftConfig(r=DORA.rank, lora_alpha=DORA.alpha, target_modules=modules, use_dora=True, bias="none"), "default"
    )
    load_adapter_state(transformer, state)
    return transformer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_dora_changes_nothing(build, velocity, dtype):
    before = velocity(build("tiny-i2v", dtype), dtype)
    transformer = build("tiny-i2v", dtype)
    attach(transformer, DORA, seed=0)
    assert torch.equal(velocity(transformer, dtype), before)


def test_output_and_gradients_are_those_of_peft_s_layers(build, trained, velocity):
    ours = trained("tiny-t2v", DORA)
    theirs = peft_s_own(build, "tiny-t2v", adapter_state(ours))
    found, expected = gradients(ours, velocity), gradients(theirs, velocity)
    assert found.keys() == expected.keys()
    assert sum("lora_magnitude_vector.default.weight" in name for name in found) == 20
    # the norms are taken from other sums: fp32 rounding, through two blocks
    torch.testing.assert_close(velocity(ours), velocity(theirs), rtol=1e-4, atol=1e-5)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-3, atol=1e-5 * float(value.abs().max()) + 1e-9, msg=name)


def test_a_layer_computes_the_paper_s_equation(trained):
    transformer = trained("tiny-t2v", DORA)
    layer = transformer.blocks[0].ffn.net[0].proj
    down, up, lengths = (
        getattr(layer, part)["default"].weight.detach().double()
        for part in ("lora_A", "lora_B", "lora_magnitude_vector")
    )
    x = torch.randn(3, 160, generator=torch.Generator().manual_seed(1))
    direction = layer.base_layer.weight.double() + 6 / 4 * up @ down
    weight = lengths[:, None] * direction / direction.norm(dim=1, keepdim=True)
    expected = x.double() @ weight.T + layer.base_layer.bias.double()
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)


def test_a_dropout_of_the_input_reaches_the_frozen_part_too_as_in_peft(build):
    transformer = build("tiny-t2v").train()
    attach(transformer, DORA.model_copy(update={"dropout": 0.5}), seed=0)
    layer = transformer.blocks[0].ffn.net[0].proj
    layer.lora_magnitude_vector["default"].weight.data *= 2
    x = torch.ones(2, 160)
    torch.manual_seed(3)
    found = layer(x)
    torch.manual_seed(3)
    dropped = torch.nn.functional.dropout(x, 0.5)
    weight = layer.base_layer.weight
    torch.testing.assert_close(found, layer.base_layer(x) + dropped @ weight.T, rtol=1e-5, atol=1e-5)


def test_merged_weights_give_the_dora_s_output(build, trained, velocity):
    transformer = trained("tiny-i2v", DORA)
    merged = build("tiny-i2v")
    merge(merged, trained_adapter(adapter_state(transformer), DORA, {}))
    torch.testing.assert_close(velocity(merged), velocity(transformer), rtol=1e-3, atol=1e-4)


def test_a_state_has_the_lengths_and_goes_back_exactly(build, trained):
    state = adapter_state(trained("tiny-t2v", DORA))
    assert state["blocks.1.ffn.net.0.proj.lora_magnitude_vector.weight"].shape == (640,)
    assert len(state) == 3 * 20
    other = build("tiny-t2v")
    attach(other, DORA, seed=8)
    load_adapter_state(other, state)
    assert all(torch.equal(value, state[key]) for key, value in adapter_state(other).items())


@pytest.mark.parametrize("kind", ["int8", "fp8", "nf4"])
def test_lengths_of_quantised_rows_are_those_of_what_is_computed_with(build, kind):
    transformer = build("tiny-t2v", torch.bfloat16).requires_grad_(False)
    quantize_blocks(transformer, variant("tiny-t2v").spec, kind)
    attach(transformer, DORA, 0, torch.device("cpu"))
    layers = dict(adapted_layers(transformer))
    layer = layers["blocks.0.ffn.net.2"]
    whole = dequantized(layer.base_layer.weight, torch.bfloat16).float()
    torch.testing.assert_close(layer.lora_magnitude_vector["default"].weight.detach(), whole.norm(dim=1))
    x = torch.randn(3, 640, dtype=torch.bfloat16)
    assert torch.equal(layer(x), layer.base_layer(x))


def test_lengths_of_rows_without_values_are_read_from_their_file(build, tmp_path):
    plain, transformer = build("tiny-t2v"), build("tiny-t2v")
    folder = tmp_path / "transformer"
    variant_config = variant("tiny-t2v")
    whole = plain.__class__(**variant_config.transformer_config)
    whole.save_pretrained(folder)
    plain, transformer = (plain.__class__.from_pretrained(folder) for _ in range(2))
    attach(plain, DORA, seed=5)
    transformer.blocks.to("meta")
    files = weight_files(ModelFiles(variant_config, {"transformer": folder}, None), "transformer")
    attach(transformer, DORA, 5, torch.device("cpu"), files)
    expected = adapter_state(plain)
    found = adapter_state(transformer)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_a_dora_attaches_to_meta_tensors(build):
    transformer = build("tiny-t2v").to("meta")
    attach(transformer, DORA, seed=0)
    assert {weight.device.type for weight in transformer.parameters()} == {"meta"}
    assert all(buffer.is_meta for name, buffer in transformer.named_buffers() if "magnitude" in name)


def test_squares_do_not_depend_on_how_many_rows_pass_at_a_time():
    weight = torch.randn(1030, 7)
    assert torch.equal(row_squares(weight), weight.square().sum(1))


@pytest.mark.parametrize("form", ["comfyui", "diffusers", "kohya"])
def test_the_lengths_are_named_as_the_programs_name_them(tmp_path, trained, form):
    adapter = trained_adapter(adapter_state(trained("tiny-t2v", DORA)), DORA, {})
    path = tmp_path / "a.safetensors"
    save_adapter(path, adapter, form)
    tensors = load_file(path)
    key, shape = {
        "comfyui": ("diffusion_model.blocks.0.ffn.2.dora_scale", (160, 1)),
        "kohya": ("lora_unet_blocks_0_ffn_2.dora_scale", (160, 1)),
        "diffusers": ("transformer.blocks.0.ffn.net.2.lora_magnitude_vector", (160,)),
    }[form]
    assert tensors[key].shape == shape
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    assert inspect(path)["dora"] is True
    found = read_adapter(path)
    assert found.is_dora
    assert found.state.keys() == adapter.state.keys()
    assert all(torch.equal(found.state[key], value) for key, value in adapter.state.items())


def test_diffusers_loads_its_format_of_a_dora_and_gives_our_output(tmp_path, build, trained, velocity):
    transformer = trained("tiny-t2v", DORA)
    path = tmp_path / "a.safetensors"
    save_adapter(path, trained_adapter(adapter_state(transformer), DORA, {}), "diffusers")
    plain = build("tiny-t2v")
    before = velocity(plain)
    pipeline_of(plain).load_lora_weights(tmp_path, weight_name=path.name)
    assert (velocity(plain) - before).abs().max() > 0.01
    # peft's norms and ours are sums in another order
    torch.testing.assert_close(velocity(plain), velocity(transformer), rtol=1e-4, atol=1e-5)
