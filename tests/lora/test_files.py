"""LoRA files: what other programs make of them, what comes back from them, and what is refused."""

import struct

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from longtake.config.schema import LoraConfig
from longtake.errors import ModelError, RunError
from longtake.lora import adapter_state, attach_adapter, read_adapter, save_adapter, trained_adapter
from lora_pipelines import pipeline_of

FORMATS = ("comfyui", "diffusers", "kohya")
FULL = LoraConfig(rank=4, alpha=8.0, targets=("attention", "ffn"))
IMAGE = LoraConfig(rank=4, alpha=8.0, targets=("attention", "ffn", "image"))


@pytest.fixture
def saved(tmp_path, trained):
    """A file of the full adapter of tiny-t2v, and its state."""

    def save(form):
        state = adapter_state(trained("tiny-t2v", FULL))
        path = tmp_path / f"{form}.safetensors"
        save_adapter(path, trained_adapter(state, FULL, {}), form)
        return path, state

    return save


@pytest.mark.parametrize(("model", "lora"), [("tiny-t2v", FULL), ("tiny-i2v", IMAGE), ("tiny-i2v", FULL)])
@pytest.mark.parametrize("form", FORMATS)
def test_diffusers_loads_the_file_and_gives_exactly_our_output(tmp_path, build, trained, velocity, form, model, lora):
    transformer = trained(model, lora)
    path = tmp_path / "adapter.safetensors"
    save_adapter(path, trained_adapter(adapter_state(transformer), lora, {}), form)
    plain = build(model)
    before = velocity(plain)
    if (form, model, lora) == ("diffusers", "tiny-i2v", FULL):
        # diffusers adds an image branch of zeros to a LoRA without one, of which the file's metadata cannot tell
        with pytest.warns(RuntimeWarning, match="add_k_proj"):
            pipeline_of(plain).load_lora_weights(tmp_path, weight_name=path.name)
    else:
        pipeline_of(plain).load_lora_weights(tmp_path, weight_name=path.name)
    assert not torch.equal(velocity(plain), before)
    # alpha / rank is 2, which diffusers folds into A without rounding
    assert torch.equal(velocity(plain), velocity(transformer))


def test_diffusers_rounds_once_where_alpha_over_rank_is_no_power_of_two(tmp_path, build, trained, velocity):
    lora = LoraConfig(rank=4, alpha=3.3, targets=("attention",))
    transformer = trained("tiny-t2v", lora)
    path = tmp_path / "adapter.safetensors"
    save_adapter(path, trained_adapter(adapter_state(transformer), lora, {}), "comfyui")
    plain = build("tiny-t2v")
    pipeline_of(plain).load_lora_weights(tmp_path, weight_name=path.name)
    torch.testing.assert_close(velocity(plain), velocity(transformer), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_comes_back_bit_for_bit(tmp_path, trained, form):
    state = adapter_state(trained("tiny-i2v", IMAGE))
    save_adapter(tmp_path / "a.safetensors", trained_adapter(state, IMAGE, {"longtake.model": "tiny-i2v"}), form)
    adapter = read_adapter(tmp_path / "a.safetensors")
    assert adapter.state.keys() == state.keys()
    assert all(torch.equal(adapter.state[key], value) for key, value in state.items())
    assert (set(adapter.alphas.values()), adapter.rank, len(adapter.modules)) == ({8.0}, 4, 24)
    assert adapter.metadata["longtake.model"] == "tiny-i2v"


@pytest.mark.parametrize(
    ("form", "keys"),
    [
        (
            "comfyui",
            {
                "diffusion_model.blocks.0.self_attn.q.lora_A.weight",
                "diffusion_model.blocks.0.self_attn.q.lora_B.weight",
                "diffusion_model.blocks.0.self_attn.q.alpha",
                "diffusion_model.blocks.1.cross_attn.k_img.lora_A.weight",
                "diffusion_model.blocks.1.ffn.0.lora_B.weight",
            },
        ),
        (
            "diffusers",
            {"transformer.blocks.0.attn1.to_q.lora_A.weight", "transformer.blocks.1.ffn.net.2.lora_B.weight"},
        ),
        (
            "kohya",
            {
                "lora_unet_blocks_0_self_attn_q.lora_down.weight",
                "lora_unet_blocks_0_self_attn_q.lora_up.weight",
                "lora_unet_blocks_0_self_attn_q.alpha",
                "lora_unet_blocks_1_cross_attn_v_img.lora_up.weight",
                "lora_unet_blocks_1_ffn_2.lora_down.weight",
            },
        ),
    ],
)
def test_the_keys_are_those_that_the_programs_look_for(tmp_path, trained, form, keys):
    path = tmp_path / "a.safetensors"
    save_adapter(path, trained_adapter(adapter_state(trained("tiny-i2v", IMAGE)), IMAGE, {}), form)
    tensors = load_file(path)
    assert keys <= tensors.keys()
    assert len(tensors) == 24 * (2 if form == "diffusers" else 3)
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    assert all(tensor.shape == () and tensor == 8 for key, tensor in tensors.items() if key.endswith(".alpha"))


def test_the_header_tells_rank_alpha_and_what_the_caller_adds(tmp_path, trained):
    path = tmp_path / "a.safetensors"
    metadata = {"ss_base_model_version": "wan2.2", "longtake.model": "tiny-t2v"}
    save_adapter(path, trained_adapter(adapter_state(trained("tiny-t2v", FULL)), FULL, metadata), "comfyui")
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    assert header.items() >= metadata.items()
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("4", "8")
    assert header["modelspec.title"] == "LoRA of rank 4"


@pytest.mark.parametrize("form", FORMATS)
def test_equal_adapters_give_equal_bytes_whatever_their_names_and_the_order_of_the_metadata(tmp_path, trained, form):
    state = adapter_state(trained("tiny-t2v", FULL))
    metadata = {f"longtake.{letter}": letter for letter in "abcdefgh"}
    paths = [tmp_path / "one" / "a.safetensors", tmp_path / "two" / "b.safetensors"]
    for path in paths:
        save_adapter(path, trained_adapter(state, FULL, metadata), form)
        metadata = dict(reversed(metadata.items()))
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_an_adapter_that_is_not_finite_leaves_the_old_file_as_it_was(saved):
    path, state = saved("comfyui")
    before = path.read_bytes()
    state["blocks.1.ffn.net.2.lora_B.weight"][3, 1] = float("nan")
    with pytest.raises(RunError, match=r"blocks\.1\.ffn\.2\.lora_B"):
        save_adapter(path, trained_adapter(state, FULL, {}), "comfyui")
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_name_that_cannot_be_written_is_an_error_of_one_line(tmp_path, trained):
    (tmp_path / "a.safetensors").mkdir()
    adapter = trained_adapter(adapter_state(trained("tiny-t2v", FULL)), FULL, {})
    with pytest.raises(RunError) as caught:
        save_adapter(tmp_path / "a.safetensors", adapter, "kohya")
    assert len(str(caught.value).splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize(
    "spelling",
    [
        "{original}.{half}.default.weight",
        "{original}.{half}.weight",
        "diffusion_model.{original}.{half}.default.weight",
        "base_model.model.{module}.{half}.weight",
        "transformer.{module}.{half}.default.weight",
    ],
)
def test_other_trainers_spellings_are_read_with_alpha_as_the_rank(tmp_path, trained, spelling):
    from longtake.models.wan.keys import to_original

    state = adapter_state(trained("tiny-t2v", FULL))
    tensors = {}
    for key, value in state.items():
        module, half = key.removesuffix(".weight").rsplit(".", 1)
        tensors[spelling.format(module=module, original=to_original(module), half=half)] = value
    save_file(tensors, tmp_path / "a.safetensors")
    adapter = read_adapter(tmp_path / "a.safetensors")
    assert set(adapter.scales.values()) == {1.0}
    assert all(torch.equal(adapter.state[key], value) for key, value in state.items())


def test_layers_of_other_ranks_and_alphas_keep_their_own_scale(tmp_path, build, trained, velocity):
    transformer = trained("tiny-t2v", FULL)
    tensors, scales = {}, {}
    for name, layer in transformer.named_modules():
        if isinstance(layer, LoraLayer):
            rank, alpha = (3, 6.0) if name.endswith("to_q") else (4, 1.0)
            layer.lora_A["default"].weight.data[rank:] = 0
            layer.scaling["default"] = scales[name] = alpha / rank
            down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            tensors[f"transformer.{name}.lora_A.weight"] = down.detach()[:rank].clone()
            tensors[f"transformer.{name}.lora_B.weight"] = up.detach()[:, :rank].clone()
            tensors[f"transformer.{name}.alpha"] = torch.tensor(alpha)
    save_file(tensors, tmp_path / "a.safetensors")
    adapter = read_adapter(tmp_path / "a.safetensors")
    assert (set(adapter.ranks.values()), adapter.scales, set(scales.values())) == ({3, 4}, scales, {2.0, 0.25})
    other = build("tiny-t2v")
    attach_adapter(other, adapter)
    # the scales are powers of two: only the longer sums over zeros may round otherwise
    torch.testing.assert_close(velocity(other), velocity(transformer), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "module",
    [
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q.lora_down",
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down",
        "transformer.transformer_blocks.0.attn.to_q.lora_A",
        "transformer.single_transformer_blocks.0.proj_mlp.lora_A",
        "diffusion_model.double_blocks.0.img_attn.qkv.lora_A",
        "diffusion_model.blocks.0.self_attn.q_proj.lora_A",
        "unet.down_blocks.0.attentions.0.proj_in.lora.down",
        "transformer.proj_out.lora_A",
    ],
)
def test_a_lora_of_another_model_is_refused_in_one_line(tmp_path, module):
    up = module.replace("lora_A", "lora_B").replace("down", "up") if "lora" in module else module
    save_file({f"{module}.weight": torch.ones(2, 8), f"{up}.weight": torch.ones(8, 2)}, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match="LoRA of another model") as caught:
        read_adapter(tmp_path / "a.safetensors")
    assert len(str(caught.value).splitlines()) == 1


def test_a_truncated_file_is_refused_in_one_line(saved):
    path, _ = saved("comfyui")
    content = path.read_bytes()
    for length in (0, 5, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ModelError, match="damaged") as caught:
            read_adapter(path)
        assert len(str(caught.value).splitlines()) == 1


def test_other_files_are_refused_in_one_line(tmp_path):
    path = tmp_path / "a.safetensors"
    weights = {"blocks.0.attn1.to_q.weight": torch.ones(4, 4)}
    for make, message in (
        (lambda: None, "no such file"),
        (path.mkdir, "no such file"),
        (lambda: (path.rmdir(), path.write_bytes(struct.pack("<Q", 2**40) + b"{}")), "damaged"),
        (lambda: path.write_text("not a safetensors file at all"), "not a safetensors file"),
        (lambda: save_file(weights, path), "no LoRA"),
    ):
        make()
        with pytest.raises(ModelError, match=message) as caught:
            read_adapter(path)
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, key: t.pop(f"{key}.lora_B.weight"), "one half"),
        (lambda t, key: t.update({f"{key}.lora_B.weight": torch.ones(160, 3)}), "do not go together"),
        (lambda t, key: t.update({f"{key}.lora_A.weight": torch.ones(0, 160)}), "do not go together"),
        (lambda t, key: t[f"{key}.lora_A.weight"].fill_(float("inf")), "not finite"),
        (lambda t, key: t.update({f"{key}.dora_scale": torch.ones(1, 160)}), "not those of the layer's 160 rows"),
        (lambda t, key: t.update({f"{key}.dora_scale": torch.full((160, 1), float("nan"))}), "lengths are not finite"),
        (lambda t, key: t.update({f"{key}.lokr_w1": torch.ones(4, 4)}), "no plain LoRA"),
        (lambda t, key: t.update({f"{key}.diff_b": torch.ones(160)}), "no plain LoRA"),
        (lambda t, key: t.update({f"{key}.alpha": torch.ones(2)}), "alpha"),
        (lambda t, key: t.update({f"{key}.lora_A.other.weight": torch.ones(4, 160)}), "more than one LoRA"),
    ],
)
def test_a_damaged_or_extended_lora_is_refused_in_one_line(saved, change, message):
    path, _ = saved("comfyui")
    tensors = load_file(path)
    change(tensors, "diffusion_model.blocks.0.self_attn.q")
    save_file(tensors, path)
    with pytest.raises(ModelError, match=message) as caught:
        read_adapter(path)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"transformer.use_dora": true}', '{"transformer.lora_alpha": "x"}', '{"lora_alpha": NaN}']
)
def test_unreadable_alpha_metadata_is_refused_in_one_line(saved, text):
    path, _ = saved("diffusers")
    save_file(load_file(path), path, {"lora_adapter_metadata": text})
    with pytest.raises(ModelError, match="alpha") as caught:
        read_adapter(path)
    assert len(str(caught.value).splitlines()) == 1


def test_alpha_patterns_of_diffusers_metadata_are_followed(saved):
    path, state = saved("diffusers")
    text = '{"transformer.r": 4, "transformer.lora_alpha": 4, "transformer.alpha_pattern": {"^blocks.0.attn1.to_q": 8}}'
    save_file(load_file(path), path, {"lora_adapter_metadata": text})
    adapter = read_adapter(path)
    key = "blocks.{}.attn1.to_q.lora_B.weight"
    assert all(torch.equal(adapter.state[key.format(block)], state[key.format(block)]) for block in (0, 1))
    assert [adapter.scales[f"blocks.{block}.attn1.to_q"] for block in (0, 1)] == [2.0, 1.0]
