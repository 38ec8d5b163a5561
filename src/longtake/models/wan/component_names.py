"""Names of the VAE's, UMT5's and CLIP's parameters: diffusers' and transformers' on one side, files' on the other.

Each function gives, of a parameter by its name in the module, where a file of that layout has it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """A tensor's name in a file, or the part at `index` of `parts` equal ones that it has one after the other."""

    name: str
    index: int = 0
    parts: int = 1


_VAE_TOP = {
    "quant_conv": "conv1",
    "post_quant_conv": "conv2",
    "encoder.conv_in": "encoder.conv1",
    "decoder.conv_in": "decoder.conv1",
    "encoder.norm_out": "encoder.head.0",
    "decoder.norm_out": "decoder.head.0",
    "encoder.conv_out": "encoder.head.2",
    "decoder.conv_out": "decoder.head.2",
}
_RESIDUAL = {
    "norm1": "residual.0",
    "conv1": "residual.2",
    "norm2": "residual.3",
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}
_MIDDLE = re.compile(r"(encoder|decoder)\.mid_block\.(resnets|attentions)\.(\d)\.(.+)")
_FLAT_DOWN = re.compile(r"encoder\.down_blocks\.(\d+)\.(.+)")
_DOWN = re.compile(r"encoder\.down_blocks\.(\d+)\.(?:resnets\.(\d+)|downsampler)\.(.+)")
_UP = re.compile(r"decoder\.up_blocks\.(\d+)\.(?:resnets\.(\d+)|upsamplers\.0|upsampler)\.(.+)")

_UMT5_TOP = {"shared": "token_embedding", "encoder.final_layer_norm": "norm"}
_UMT5_BLOCK = {
    "layer.0.SelfAttention.relative_attention_bias": "pos_embedding.embedding",
    "layer.0.SelfAttention": "attn",
    "layer.0.layer_norm": "norm1",
    "layer.1.layer_norm": "norm2",
    "layer.1.DenseReluDense.wi_0": "ffn.gate.0",
    "layer.1.DenseReluDense.wi_1": "ffn.fc1",
    "layer.1.DenseReluDense.wo": "ffn.fc2",
}
_IN_UMT5_BLOCK = re.compile(r"encoder\.block\.(\d+)\.(.+)")

_CLIP_TOP = {
    "embeddings.class_embedding": "cls_embedding",
    "embeddings.position_embedding.weight": "pos_embedding",
    "embeddings.patch_embedding.weight": "patch_embedding.weight",
    "pre_layrnorm": "pre_norm",
    "post_layernorm": "post_norm",
}
_CLIP_BLOCK = {
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "self_attn.out_proj": "attn.proj",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2",
}
_OPEN_CLIP_TOP = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.patch_embedding.weight": "conv1.weight",
    "pre_layrnorm": "ln_pre",
    "post_layernorm": "ln_post",
}
_OPEN_CLIP_BLOCK = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_IN_CLIP_BLOCK = re.compile(r"encoder\.layers\.(\d+)\.(.+)")
_PROJECTION = re.compile(r"self_attn\.([qkv])_proj\.(weight|bias)")


def vae_in_original(name: str, residual: bool, residual_blocks: int) -> Place:
    """Of AutoencoderKLWan's parameter in Wan2.1_VAE.pth, or with `residual` stages in Wan2.2_VAE.pth.

    `residual_blocks` are the config's `num_res_blocks`: in 2.1's file the stages of the decoder are one list.
    """
    if match := _MIDDLE.fullmatch(name):
        half, kind, index, rest = match.groups()
        position = 1 if kind == "attentions" else 2 * int(index)
        return Place(f"{half}.middle.{position}.{rest if kind == 'attentions' else _renamed(rest, _RESIDUAL)}")
    if not residual and (match := _FLAT_DOWN.fullmatch(name)):
        return Place(f"encoder.downsamples.{match[1]}.{_renamed(match[2], _RESIDUAL)}")
    for pattern, prefix, length in ((_DOWN, "encoder.down", residual_blocks), (_UP, "decoder.up", residual_blocks + 1)):
        if match := pattern.fullmatch(name):
            stage, step = int(match[1]), int(match[2]) if match[2] else length  # the resampling comes last
            inner = f"{stage}.{prefix[8:]}samples.{step}" if residual else f"{stage * (length + 1) + step}"
            return Place(f"{prefix}samples.{inner}.{_renamed(match[3], _RESIDUAL)}")
    return Place(_renamed(name, _VAE_TOP))


def umt5_in_original(name: str) -> Place:
    """Of UMT5EncoderModel's parameter in models_t5_umt5-xxl-enc-bf16.pth."""
    if match := _IN_UMT5_BLOCK.fullmatch(name):
        return Place(f"blocks.{match[1]}.{_renamed(match[2], _UMT5_BLOCK)}")
    return Place(_renamed(name, _UMT5_TOP))


def clip_in_original(name: str) -> Place:
    """Of CLIPVisionModel's parameter in models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth."""
    return _clip(name, "transformer", _CLIP_TOP, _CLIP_BLOCK, ("attn.to_qkv.weight", "attn.to_qkv.bias"))


def clip_in_open_clip(name: str) -> Place:
    """Of CLIPVisionModel's parameter in a file of the library open_clip."""
    joined = ("attn.in_proj_weight", "attn.in_proj_bias")
    return _clip(name, "transformer.resblocks", _OPEN_CLIP_TOP, _OPEN_CLIP_BLOCK, joined)


def _clip(name: str, blocks: str, top: Mapping[str, str], block: Mapping[str, str], joined: tuple[str, str]) -> Place:
    match = _IN_CLIP_BLOCK.fullmatch(name)
    if match is None:
        return Place(f"visual.{_renamed(name, top)}")
    if projection := _PROJECTION.fullmatch(match[2]):
        whole = joined[0 if projection[2] == "weight" else 1]
        return Place(f"visual.{blocks}.{match[1]}.{whole}", "qkv".index(projection[1]), 3)
    return Place(f"visual.{blocks}.{match[1]}.{_renamed(match[2], block)}")


def _renamed(name: str, table: Mapping[str, str]) -> str:
    """With the longest of the table's modules that it begins with replaced; one of none keeps its name."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        module = ".".join(parts[:length])
        if module in table:
            return ".".join([table[module], *parts[length:]])
    return name
