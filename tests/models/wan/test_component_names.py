"""Names of the original VAEs, UMT5 and CLIP, against diffusers' converter and against the modules of the releases."""

import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from longtake.models.wan import tiny
from longtake.models.wan.component_configs import CLIP_VIT_H, VAE_2_1, VAE_2_2
from longtake.models.wan.component_names import (
    Place,
    clip_in_open_clip,
    clip_in_original,
    umt5_in_original,
    vae_in_original,
)

META = torch.device("meta")
RESIDUAL = ("0.gamma", "2.weight", "2.bias", "3.gamma", "6.weight", "6.bias")


def parameters(*modules: str) -> set[str]:
    return {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")}


def test_the_first_vaes_names_are_those_that_diffusers_own_converter_knows() -> None:
    with META:
        names = list(AutoencoderKLWan(**VAE_2_1).state_dict())
    original = {vae_in_original(name, False, 2).name: name for name in names}
    assert len(original) == len(names) == 194
    assert all(name == told for told, name in convert_wan_vae_to_diffusers(original).items())


def test_the_second_vaes_names_are_those_of_its_modules() -> None:
    """Four stages each way: residual blocks, then a resampling but in the last; shortcuts where widths change."""
    with META:
        names = list(AutoencoderKLWan(**VAE_2_2).state_dict())
    expected = parameters("conv1", "conv2")
    for half, way, blocks, narrow in (("encoder", "down", 2, (1, 2)), ("decoder", "up", 3, (2, 3))):
        top = f"{half}.conv1", f"{half}.head.2", f"{half}.middle.1.to_qkv", f"{half}.middle.1.proj"
        expected |= parameters(*top) | {f"{half}.head.0.gamma", f"{half}.middle.1.norm.gamma"}
        expected |= {f"{half}.middle.{index}.residual.{part}" for index in (0, 2) for part in RESIDUAL}
        for stage in range(4):
            inside = f"{half}.{way}samples.{stage}.{way}samples"
            expected |= {f"{inside}.{block}.residual.{part}" for block in range(blocks) for part in RESIDUAL}
            if stage in narrow:
                expected |= parameters(f"{inside}.0.shortcut")
            if stage < 3:
                expected |= parameters(f"{inside}.{blocks}.resample.1")
            if stage in ((1, 2) if half == "encoder" else (0, 1)):
                expected |= parameters(f"{inside}.{blocks}.time_conv")
    assert {vae_in_original(name, True, 2).name for name in names} == expected
    assert len(expected) == len(names)


def test_umt5s_names_are_those_of_its_modules() -> None:
    with META:
        names = list(UMT5EncoderModel(UMT5Config(vocab_size=9, **tiny.TEXT_ENCODER)).state_dict())
    expected = {"token_embedding.weight", "norm.weight"}
    for block in range(2):
        layers = ("norm1", "attn.q", "attn.k", "attn.v", "attn.o", "norm2", "ffn.gate.0", "ffn.fc1", "ffn.fc2")
        expected |= {f"blocks.{block}.{layer}.weight" for layer in (*layers, "pos_embedding.embedding")}
    places = {name: umt5_in_original(name).name for name in names if "embed_tokens" not in name}
    assert set(places.values()) == expected
    assert len(expected) == len(places)
    gate = places["encoder.block.1.layer.1.DenseReluDense.wi_0.weight"]  # the one that is activated
    assert gate == "blocks.1.ffn.gate.0.weight"


def test_clips_queries_keys_and_values_are_thirds_of_one_matrix() -> None:
    with META:
        names = list(CLIPVisionModel(CLIPVisionConfig(**CLIP_VIT_H | {"num_hidden_layers": 2})).state_dict())
    first = "encoder.layers.1.self_attn"
    for place, whole in (
        (clip_in_original, "visual.transformer.1.attn.to_qkv.weight"),
        (clip_in_open_clip, "visual.transformer.resblocks.1.attn.in_proj_weight"),
    ):
        assert [place(f"{first}.{letter}_proj.weight") for letter in "qkv"] == [Place(whole, n, 3) for n in range(3)]
        assert len({place(name) for name in names}) == len(names)
    expected = {"visual.cls_embedding", "visual.pos_embedding", "visual.patch_embedding.weight"}
    expected |= parameters("visual.pre_norm", "visual.post_norm")
    for block in range(2):
        layers = ("norm1", "norm2", "attn.to_qkv", "attn.proj", "mlp.0", "mlp.2")
        expected |= parameters(*(f"visual.transformer.{block}.{layer}" for layer in layers))
    assert {clip_in_original(name).name for name in names} == expected


def test_open_clips_names() -> None:
    names = ("embeddings.class_embedding", "embeddings.position_embedding.weight", "embeddings.patch_embedding.weight")
    expected = ["visual.class_embedding", "visual.positional_embedding", "visual.conv1.weight"]
    assert [clip_in_open_clip(name).name for name in names] == expected
    told = {"pre_layrnorm.bias": "ln_pre.bias", "post_layernorm.weight": "ln_post.weight"}
    block = {
        "layer_norm1.weight": "ln_1.weight",
        "self_attn.out_proj.bias": "attn.out_proj.bias",
        "layer_norm2.bias": "ln_2.bias",
        "mlp.fc1.weight": "mlp.c_fc.weight",
        "mlp.fc2.bias": "mlp.c_proj.bias",
    }
    told |= {f"encoder.layers.3.{name}": f"transformer.resblocks.3.{theirs}" for name, theirs in block.items()}
    assert {name: clip_in_open_clip(name).name for name in told} == {
        name: f"visual.{theirs}" for name, theirs in told.items()
    }
