"""Which variants the names and shapes of a transformer's tensors agree with, and where they differ. Needs no torch."""

import re
from collections.abc import Mapping
from pathlib import Path

from longtake.errors import ModelError, Problem
from longtake.models.wan.headers import TensorHeader, listed
from longtake.models.wan.keys import to_diffusers
from longtake.models.wan.scales import is_scale
from longtake.models.wan.variants import VARIANTS, WanVariant

Shape = tuple[int, ...]

PREFIXES = ("model.diffusion_model.", "diffusion_model.")
"""What ComfyUI puts before the names of a transformer's tensors."""

_UNUSED = ("norm_added_q", "norm_q_img")
_BLOCK_INDEX = re.compile(r"blocks\.(\d+)\.")
_OTHERS = {
    "vace_": "a VACE model",
    "face_adapter": "a Wan Animate model",
    "motion_encoder": "a Wan Animate model",
    "face_encoder": "a Wan Animate model",
    "pose_patch_embedding": "a Wan Animate model",
    "casual_audio_encoder": "a Wan speech-to-video model",
    "trainable_cond_mask": "a Wan speech-to-video model",
    "audio_injector": "a Wan speech-to-video model",
    "audio_proj": "an audio-driven Wan model",
    "audio_cross_attn": "an audio-driven Wan model",
    "cam_encoder": "a camera-controlled Wan model",
    "fps_embedding": "a SkyReels diffusion-forcing model",
    "control_adapter": "a Wan Fun Control-Camera model",
    "ref_conv": "a Wan Fun Control model",
}
_OF_CONTROL = {48: "a Wan2.1 Fun Control model", 52: "a Wan2.2 Fun Control model"}
"""By input channels, where the outputs are 16: beside the image's condition they take a control video's latents."""


def without_prefix(tensors: Mapping[str, TensorHeader], prefix: str) -> dict[str, TensorHeader]:
    """The tensors whose names start with `prefix`, by what follows it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def diffusers_names(tensors: Mapping[str, TensorHeader], original: bool, where: Path) -> dict[str, TensorHeader]:
    """The parameters among `tensors`, which have no prefix, by diffusers' names; scales are left out.

    Raises ModelError that lists the names which no Wan transformer has.
    """
    renamed: dict[str, TensorHeader] = {}
    unknown: list[str] = []
    for name, tensor in tensors.items():
        if is_scale(name) or any(part in _UNUSED for part in name.split(".")):
            continue
        try:
            renamed[to_diffusers(name) if original else name] = tensor
        except ModelError:
            unknown.append(name)
    if unknown:
        what = f"{len(unknown)} tensors are not a Wan transformer's: {listed(unknown)}"
        raise ModelError(Problem(what, str(where), trained(), code="weights-unexpected"))
    return renamed


def refuse_others(tensors: Mapping[str, TensorHeader], where: Path) -> None:
    """Raises ModelError, with the key that tells, for models that are no plain Wan transformer."""
    for name in tensors:
        for part, model in _OTHERS.items():
            if part in name:
                what = f"this is {model} (it has {name})"
                raise ModelError(Problem(what, str(where), trained(), code="model-not-trainable"))
    if "patch_embedding.weight" not in tensors:
        what = "this is not a Wan model: it has no patch_embedding.weight"
        raise ModelError(Problem(what, str(where), trained(), code="model-not-wan"))


def candidates(shapes: Mapping[str, Shape], where: Path) -> tuple[str, ...]:
    """Names of the variants that agree with a transformer's shapes, which are by diffusers' names.

    Raises ModelError that gives the shapes where none agrees, and one that lists the differences where only some
    parameters are missing, superfluous, or misshapen.
    """
    found = _features(shapes)
    names = tuple(name for name, variant in VARIANTS.items() if _agrees(found, variant))
    if not names:
        held = ", ".join(f"{name} {value}" for name, value in found.items() if value is not None)
        control = _OF_CONTROL.get(found["in_channels"] or 0) if found["out_channels"] == 16 else None
        what = f"this is {control} (it has {held})" if control else f"no Wan model has {held}"
        code = "model-not-trainable" if control else "model-shapes-unknown"
        raise ModelError(Problem(what, str(where), trained(), code=code))
    if problems := differences(shapes, VARIANTS[names[0]].parameter_shapes(), where):
        raise ModelError(problems)
    return names


def differences(found: Mapping[str, Shape], expected: Mapping[str, Shape], where: Path) -> list[Problem]:
    """Parameters that are missing, unexpected, or of another shape: one Problem for each kind that occurs.

    Missing and unexpected ones are one: they may be the same under another name.
    """
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    both = [name for name in expected if name in found and found[name] != expected[name]]
    reshaped = [f"{name} {list(found[name])} instead of {list(expected[name])}" for name in both]
    if missing and unexpected:
        renamed = f"{len(missing)} parameters are missing: {listed(missing)}"
        renamed += f", and {len(unexpected)} tensors are not this transformer's: {listed(unexpected)}"
        problems = [Problem(renamed, str(where), trained(), code="weights-names-differ")]
        return problems + differences(
            {name: found[name] for name in both}, {name: expected[name] for name in both}, where
        )
    kinds = (
        ("parameters are missing", missing, "download it again", "weights-missing"),
        ("tensors are not this transformer's", unexpected, trained(), "weights-unexpected"),
        ("parameters have another shape", reshaped, "download it again", "weights-shape-differs"),
    )
    return [
        Problem(f"{len(names)} {what}: {listed(names)}", str(where), remedy, code=code)
        for what, names, remedy, code in kinds
        if names
    ]


def trained() -> str:
    """The remedy that lists what can be trained."""
    return f"Longtake trains {', '.join(name for name, variant in VARIANTS.items() if variant.hub_id)}"


def _features(shapes: Mapping[str, Shape]) -> dict[str, int | None]:
    def size(name: str, axis: int) -> int | None:
        shape = shapes.get(name, ())
        return shape[axis] if axis < len(shape) else None

    out = size("proj_out.weight", 0)
    blocks = {int(match[1]) for name in shapes if (match := _BLOCK_INDEX.match(name))}
    return {
        "in_channels": size("patch_embedding.weight", 1),
        "out_channels": out // 4 if out is not None else None,
        "dim": size("patch_embedding.weight", 0),
        "num_layers": max(blocks) + 1 if blocks else None,
        "ffn_dim": size("blocks.0.ffn.net.0.proj.weight", 0),
        "text_dim": size("condition_embedder.text_embedder.linear_1.weight", 1),
        "image_dim": size("condition_embedder.image_embedder.norm1.weight", 0),
        "added_kv_proj_dim": size("blocks.0.attn2.add_k_proj.weight", 1),
        "pos_embed_seq_len": size("condition_embedder.image_embedder.pos_embed", 1),
    }


def _agrees(found: Mapping[str, int | None], variant: WanVariant) -> bool:
    config = variant.transformer_config
    expected = config | {"dim": config["num_attention_heads"] * config["attention_head_dim"]}
    optional = ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len")
    told = [name for name, value in found.items() if value is not None or name in optional]
    return all(found[name] == expected[name] for name in told)
