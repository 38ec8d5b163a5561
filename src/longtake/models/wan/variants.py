"""Every published Wan2.1 and 2.2 variant, and tiny ones of the same classes, as data. Needs no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from longtake.config.likeness import nearest
from longtake.errors import ModelError, Problem
from longtake.models.spec import BlockStages, ModelSpec, Task, TokenAxis

KEEP_FP32 = ("rope", "time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")
"""What diffusers keeps in fp32 (`WanTransformer3DModel._keep_in_fp32_modules`)."""


@dataclass(frozen=True)
class WanVariant:
    """One model: the transformer's configuration and what surrounds it.

    `transformer_config` are the arguments of diffusers' `WanTransformer3DModel`; `parameters` and `block_parameters`
    count one expert; `vae` names the AutoencoderKLWan generation; `size` and `num_frames` are what it was made for.
    """

    name: str
    spec: ModelSpec
    transformer_config: dict[str, Any]
    parameters: int
    block_parameters: int
    hub_id: str
    vae: str
    size: tuple[int, int]
    num_frames: int
    shift: float

    @property
    def has_image_encoder(self) -> bool:
        """Whether a CLIP vision encoder feeds the transformer."""
        return self.spec.image_tokens > 0

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter of one expert by diffusers' name, as its state dict would have them."""
        return _parameter_shapes(self.transformer_config)


_WIDE = {"num_layers": 40, "num_attention_heads": 40, "ffn_dim": 13824}
_CLIP = {"image_dim": 1280, "added_kv_proj_dim": 5120}
_I2V = {"in_channels": 36}
_TINY = {"num_layers": 4, "num_attention_heads": 5, "attention_head_dim": 32, "ffn_dim": 640, "text_dim": 64}
_FEWER = {"num_layers": 3}  # so that a file of one expert is not taken for a tiny-t2v
_TINY_CLIP = {"image_dim": 64, "added_kv_proj_dim": 160}


def _transformer_config(**changes: Any) -> dict[str, Any]:
    common: dict[str, Any] = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 40,
        "attention_head_dim": 128,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 4096,
        "freq_dim": 256,
        "ffn_dim": 13824,
        "num_layers": 40,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
        "image_dim": None,
        "added_kv_proj_dim": None,
        "rope_max_seq_len": 1024,
        "pos_embed_seq_len": None,
    }
    return common | changes


def _variant(
    name: str,
    task: Task,
    config: dict[str, Any],
    counts: tuple[int, int],
    hub_id: str,
    made_for: tuple[tuple[int, int], int, float],
    spec_changes: dict[str, Any] | None = None,
) -> WanVariant:
    full = _transformer_config(**config)
    spec: dict[str, Any] = {
        "name": name,
        "task": task,
        "latent_channels": full["out_channels"],
        "fps": 16,
        "text_dim": full["text_dim"],
        "heads": full["num_attention_heads"],
        "head_dim": full["attention_head_dim"],
        "stages": _stages,
        "token_axis": _token_axis,
        "keep_fp32": KEEP_FP32,
    }
    vae = "2.2" if full["out_channels"] == 48 else "2.1"
    size, num_frames, shift = made_for
    found = ModelSpec(**(spec | (spec_changes or {})))
    return WanVariant(name, found, full, *counts, hub_id, vae, size, num_frames, shift)


def _stages() -> BlockStages:
    from longtake.models.wan import block

    return block


def _token_axis() -> TokenAxis:
    from longtake.models.wan import token_axis

    return token_axis


_480P = ((832, 480), 81, 3.0)
_720P = ((1280, 720), 81, 5.0)
_IMAGE = {"image_tokens": 257, "image_dim": 1280}
_TWO = ("transformer", "transformer_2")
_TI2V = {"spatial_stride": 16, "fps": 24, "expand_timesteps": True}
_TINY_MADE_FOR = ((160, 96), 17, 3.0)

_ALL = (
    _variant(
        "wan2.1-t2v-1.3b",
        "t2v",
        {"num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960},
        (1_418_996_800, 46_440_704),
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        _480P,
    ),
    _variant("wan2.1-t2v-14b", "t2v", _WIDE, (14_288_491_584, 351_394_304), "Wan-AI/Wan2.1-T2V-14B-Diffusers", _720P),
    _variant(
        "wan2.1-i2v-14b-480p",
        "i2v",
        _WIDE | _I2V | _CLIP,
        (16_394_878_784, 403_838_464),
        "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
        _480P,
        _IMAGE,
    ),
    _variant(
        "wan2.1-i2v-14b-720p",
        "i2v",
        _WIDE | _I2V | _CLIP,
        (16_394_878_784, 403_838_464),
        "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers",
        _720P,
        _IMAGE,
    ),
    _variant(
        "wan2.1-flf2v-14b-720p",
        "flf2v",
        _WIDE | _I2V | _CLIP | {"pos_embed_seq_len": 514},
        (16_395_536_704, 403_838_464),
        "Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers",
        _720P,
        {"image_tokens": 514, "image_dim": 1280},
    ),
    _variant(
        "wan2.2-t2v-a14b",
        "t2v",
        _WIDE,
        (14_288_491_584, 351_394_304),
        "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        _720P,
        {"experts": _TWO, "boundary_ratio": 0.875},
    ),
    _variant(
        "wan2.2-i2v-a14b",
        "i2v",
        _WIDE | _I2V,
        (14_288_901_184, 351_394_304),
        "Wan-AI/Wan2.2-I2V-A14B-Diffusers",
        _720P,
        {"experts": _TWO, "boundary_ratio": 0.9},
    ),
    _variant(
        "wan2.2-ti2v-5b",
        "ti2v",
        {"num_layers": 30, "num_attention_heads": 24, "ffn_dim": 14336, "in_channels": 48, "out_channels": 48},
        (4_999_787_712, 163_656_704),
        "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
        ((1280, 704), 121, 5.0),
        _TI2V,
    ),
    _variant("tiny-t2v", "t2v", _TINY, (1_933_024, 413_600), "", _TINY_MADE_FOR),
    _variant(
        "tiny-i2v",
        "i2v",
        _TINY | _I2V | _TINY_CLIP,
        (2_167_552, 465_280),
        "",
        _TINY_MADE_FOR,
        {"image_tokens": 17, "image_dim": 64},
    ),
    _variant(
        "tiny-flf2v",
        "flf2v",
        _TINY | _I2V | _TINY_CLIP | {"pos_embed_seq_len": 34},
        (2_169_728, 465_280),
        "",
        _TINY_MADE_FOR,
        {"image_tokens": 34, "image_dim": 64},
    ),
    _variant(
        "tiny-ti2v",
        "ti2v",
        _TINY | {"in_channels": 48, "out_channels": 48},
        (1_974_112, 413_600),
        "",
        ((160, 96), 17, 5.0),
        _TI2V,
    ),
    _variant(
        "tiny-t2v-a14b",
        "t2v",
        _TINY | _FEWER,
        (1_519_424, 413_600),
        "",
        _TINY_MADE_FOR,
        {"experts": _TWO, "boundary_ratio": 0.875},
    ),
    _variant(
        "tiny-i2v-a14b",
        "i2v",
        _TINY | _I2V | _FEWER,
        (1_532_224, 413_600),
        "",
        _TINY_MADE_FOR,
        {"experts": _TWO, "boundary_ratio": 0.9},
    ),
)

VARIANTS = {variant.name: variant for variant in _ALL}


def variant(name: str) -> WanVariant:
    """The variant called `name`; raises ModelError with the nearest names, or with all where none is like it."""
    if name in VARIANTS:
        return VARIANTS[name]
    near = nearest(name.rpartition("/")[2], VARIANTS)
    remedy = f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(VARIANTS)}"
    raise ModelError(Problem(f"there is no model called {name!r}", "model.name", remedy, code="model-name-unknown"))


def _parameter_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    out = config["out_channels"] * prod(config["patch_size"])
    embedder = "condition_embedder"
    shapes: dict[str, tuple[int, ...]] = {
        "scale_shift_table": (1, 2, dim),
        "patch_embedding.weight": (dim, config["in_channels"], *config["patch_size"]),
        "patch_embedding.bias": (dim,),
        **_linear(f"{embedder}.time_embedder.linear_1", config["freq_dim"], dim),
        **_linear(f"{embedder}.time_embedder.linear_2", dim, dim),
        **_linear(f"{embedder}.time_proj", dim, 6 * dim),
        **_linear(f"{embedder}.text_embedder.linear_1", config["text_dim"], dim),
        **_linear(f"{embedder}.text_embedder.linear_2", dim, dim),
        **_image_embedder_shapes(config, dim),
        **_linear("proj_out", dim, out),
    }
    block = _block_shapes(config, dim)
    for index in range(config["num_layers"]):
        shapes |= {f"blocks.{index}.{name}": shape for name, shape in block.items()}
    return shapes


def _image_embedder_shapes(config: Mapping[str, Any], dim: int) -> dict[str, tuple[int, ...]]:
    image_dim, tokens = config["image_dim"], config["pos_embed_seq_len"]
    if image_dim is None:
        return {}
    embedder = "condition_embedder.image_embedder"
    return {
        **({f"{embedder}.pos_embed": (1, tokens, image_dim)} if tokens else {}),
        **_norm(f"{embedder}.norm1", image_dim),
        **_linear(f"{embedder}.ff.net.0.proj", image_dim, image_dim),
        **_linear(f"{embedder}.ff.net.2", image_dim, dim),
        **_norm(f"{embedder}.norm2", dim),
    }


def _block_shapes(config: Mapping[str, Any], dim: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"scale_shift_table": (1, 6, dim), **_norm("norm2", dim)}
    for attention in ("attn1", "attn2"):
        for projection in ("to_q", "to_k", "to_v", "to_out.0"):
            shapes |= _linear(f"{attention}.{projection}", dim, dim)
        shapes |= {f"{attention}.norm_q.weight": (dim,), f"{attention}.norm_k.weight": (dim,)}
    if config["added_kv_proj_dim"] is not None:
        shapes |= _linear("attn2.add_k_proj", config["added_kv_proj_dim"], dim)
        shapes |= _linear("attn2.add_v_proj", config["added_kv_proj_dim"], dim)
        shapes["attn2.norm_added_k.weight"] = (dim,)
    return shapes | _linear("ffn.net.0.proj", dim, config["ffn_dim"]) | _linear("ffn.net.2", config["ffn_dim"], dim)


def _linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _norm(name: str, dim: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}
