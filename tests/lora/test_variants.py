"""rsLoRA, ranks of single blocks, and adapters of unlike layers: computed, written, read, and what diffusers makes."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from longtake.config.schema import LoraConfig
from longtake.errors import ConfigError
from longtake.lora import Adapter, adapter_state, attach, attach_adapter, read_adapter, save_adapter, trained_adapter
from longtake.lora.layers import adapted_layers
from longtake.models.wan.keys import to_original
from lora_pipelines import pipeline_of

FORMATS = ("comfyui", "diffusers", "kohya")
RS = LoraConfig(rank=4, alpha=8.0, targets=("attention", "ffn"), rslora=True)
UNLIKE = LoraConfig(rank=4, alpha=8.0, targets=("attention", "ffn"), block_ranks=((1, 1, 2),))
BOTH = UNLIKE.model_copy(update={"rslora": True, "dora": True})


def test_a_stabilised_rank_scales_by_its_root(trained):
    layer = trained("tiny-t2v", RS).blocks[0].ffn.net[0].proj
    down, up = (getattr(layer, half)["default"].weight for half in ("lora_A", "lora_B"))
    x = torch.randn(3, 160, generator=torch.Generator().manual_seed(1))
    expected = layer.base_layer(x) + 8 / math.sqrt(4) * (x @ down.T @ up.T)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)


def test_gradients_of_a_stabilised_rank_are_those_of_the_formula(trained):
    layer = trained("tiny-t2v", RS).blocks[0].attn1.to_q
    down, up = (getattr(layer, half)["default"].weight for half in ("lora_A", "lora_B"))
    x = torch.randn(3, 160, generator=torch.Generator().manual_seed(1))
    output = torch.randn(3, 160, generator=torch.Generator().manual_seed(2))
    found = torch.autograd.grad(layer(x), (down, up), output)
    scaled = 4.0 * output  # alpha / sqrt(rank)
    torch.testing.assert_close(found, ((scaled @ up).T @ x, scaled.T @ (x @ down.T)), rtol=1e-4, atol=1e-5)


def test_blocks_have_the_ranks_that_they_are_given_and_alpha_stays(build):
    transformer = build("tiny-t2v")
    attach(transformer, UNLIKE, seed=0)
    ranks = {
        name.split(".")[1]: (layer.r["default"], layer.scaling["default"])
        for name, layer in adapted_layers(transformer)
    }
    assert ranks == {"0": (4, 2.0), "1": (2, 4.0)}


def test_a_block_that_the_model_does_not_have_is_named(build):
    lora = LoraConfig(block_ranks=((0, 0, 4), (1, 9, 8)))
    with pytest.raises(ConfigError, match=r"lora\.block_ranks: there is no block 2; the model's are 0 to 1"):
        attach(build("tiny-t2v"), lora, seed=0)


@pytest.mark.parametrize("lora", [RS, UNLIKE, BOTH], ids=["rslora", "block_ranks", "all"])
@pytest.mark.parametrize("form", FORMATS)
def test_every_format_brings_back_tensors_and_scales(tmp_path, build, trained, velocity, form, lora):
    transformer = trained("tiny-t2v", lora)
    adapter = trained_adapter(adapter_state(transformer), lora, {"longtake.model": "tiny-t2v"})
    save_adapter(tmp_path / "a.safetensors", adapter, form)
    found = read_adapter(tmp_path / "a.safetensors")
    assert found.ranks == adapter.ranks
    assert found.scales == pytest.approx(adapter.scales, rel=1e-7)
    assert found.state.keys() == adapter.state.keys()
    assert all(torch.equal(found.state[key], value) for key, value in adapter.state.items())
    other = build("tiny-t2v")
    attach_adapter(other, found)
    torch.testing.assert_close(velocity(other), velocity(transformer), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lora", [RS, UNLIKE], ids=["rslora", "block_ranks"])
@pytest.mark.parametrize("form", FORMATS)
def test_diffusers_loads_each_format_and_gives_our_output(tmp_path, build, trained, velocity, form, lora):
    transformer = trained("tiny-t2v", lora)
    path = tmp_path / "a.safetensors"
    save_adapter(path, trained_adapter(adapter_state(transformer), lora, {}), form)
    plain = build("tiny-t2v")
    pipeline_of(plain).load_lora_weights(tmp_path, weight_name=path.name)
    # every scale is a power of two, which diffusers folds into A without rounding
    assert torch.equal(velocity(plain), velocity(transformer))


def test_diffusers_loads_a_dora_of_unlike_ranks_and_stabilised_scales(tmp_path, build, trained, velocity):
    transformer = trained("tiny-t2v", BOTH)
    path = tmp_path / "a.safetensors"
    save_adapter(path, trained_adapter(adapter_state(transformer), BOTH, {}), "diffusers")
    plain = build("tiny-t2v")
    pipeline_of(plain).load_lora_weights(tmp_path, weight_name=path.name)
    torch.testing.assert_close(velocity(plain), velocity(transformer), rtol=1e-4, atol=1e-5)


def test_what_diffusers_saves_is_read_with_its_ranks_scales_and_lengths(tmp_path, build, trained, velocity):
    transformer = trained("tiny-t2v", BOTH)
    path = tmp_path / "a.safetensors"
    save_adapter(path, trained_adapter(adapter_state(transformer), BOTH, {}), "diffusers")
    plain = build("tiny-t2v")
    pipeline_of(plain).load_lora_weights(tmp_path, weight_name=path.name, adapter_name="mine")
    plain.save_lora_adapter(tmp_path / "again", adapter_name="mine")
    (written,) = (tmp_path / "again").glob("*.safetensors")
    found, own = read_adapter(written), read_adapter(path)
    assert all(torch.equal(found.state[key], value) for key, value in own.state.items())
    assert found.state.keys() == own.state.keys()


def test_a_stabilised_rank_in_peft_s_metadata_is_followed(tmp_path, trained):
    state = adapter_state(trained("tiny-t2v", RS))
    text = '{"transformer.r": 4, "transformer.lora_alpha": 8, "transformer.use_rslora": true}'
    tensors = {f"transformer.{key}": value for key, value in state.items()}
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": text})
    assert set(read_adapter(tmp_path / "a.safetensors").scales.values()) == {4.0}


@pytest.mark.parametrize(
    "spelling",
    ["lora_magnitude_vector", "lora_magnitude_vector.weight", "lora_magnitude_vector.default.weight", "dora_scale"],
)
def test_each_spelling_of_a_dora_s_lengths_is_read(tmp_path, trained, spelling):
    state = adapter_state(trained("tiny-t2v", BOTH))
    tensors = {}
    for key, value in state.items():
        module, _, part = key.removesuffix(".weight").rpartition(".")
        name = spelling if part == "lora_magnitude_vector" else f"{part}.weight"
        tensors[f"diffusion_model.{to_original(module)}.{name}"] = value
    save_file(tensors, tmp_path / "a.safetensors")
    found = read_adapter(tmp_path / "a.safetensors").state
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], value) for key, value in state.items())


def test_a_header_of_unlike_ranks_tells_their_range(tmp_path, trained):
    from safetensors import safe_open

    path = tmp_path / "a.safetensors"
    save_adapter(path, trained_adapter(adapter_state(trained("tiny-t2v", UNLIKE)), UNLIKE, {}), "comfyui")
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    assert (header["ss_network_dim"], header["modelspec.title"]) == ("4", "LoRA of rank 2 to 4")
    alphas = {float(value) for key, value in load_file(path).items() if key.endswith(".alpha")}
    assert alphas == {8.0}


def test_an_adapter_of_some_layers_of_some_blocks_is_attached_to_these(build, trained, velocity):
    whole = trained_adapter(adapter_state(trained("tiny-t2v", RS)), RS, {})
    chosen = {
        key: value for key, value in whole.state.items() if key.startswith(("blocks.1.ffn", "blocks.0.attn1.to_q"))
    }
    names = {key.rpartition(".lora_")[0] for key in chosen}
    transformer = build("tiny-t2v")
    attach_adapter(transformer, Adapter(chosen, {name: whole.alphas[name] for name in names}, {}))
    assert {name for name, _ in adapted_layers(transformer)} == names
