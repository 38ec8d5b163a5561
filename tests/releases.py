"""The model files that users of Wan have, written from a tiny model's diffusers folder under the names they know."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from longtake.models.wan import tiny
from longtake.models.wan.component_names import Place, clip_in_original, umt5_in_original, vae_in_original
from longtake.models.wan.keys import to_original

VAES = {"tiny-i2v": "Wan2.1_VAE.pth", "tiny-ti2v": "Wan2.2_VAE.pth"}
T5 = "models_t5_umt5-xxl-enc-bf16.pth"
CLIP = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
FP8 = torch.float8_e4m3fn


def weights_of(root: Path, component: str) -> dict[str, Tensor]:
    """A component's tensors by the names of its module."""
    (file,) = (root / component).glob("*.safetensors")
    return load_file(file)


def in_layout(state: Mapping[str, Tensor], place: Callable[[str], Place]) -> dict[str, Tensor]:
    """The tensors under a layout's names; parts of one are put together."""
    parts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in state.items():
        found = place(name)
        parts.setdefault(found.name, {})[found.index] = tensor
    return {
        name: torch.cat([held[index] for index in sorted(held)]) if len(held) > 1 else held[0].clone()
        for name, held in parts.items()
    }


def original_vae(root: Path, name: str = "tiny-i2v") -> dict[str, Tensor]:
    """As Wan2.1_VAE.pth has them, or Wan2.2_VAE.pth."""
    config = tiny.VAE_2_2 if name == "tiny-ti2v" else tiny.VAE_2_1
    residual = bool(config.get("is_residual"))
    return in_layout(weights_of(root, "vae"), lambda each: vae_in_original(each, residual, config["num_res_blocks"]))


def original_umt5(root: Path, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """As models_t5_umt5-xxl-enc-bf16.pth has them."""
    return {name: tensor.to(dtype) for name, tensor in in_layout(_umt5(root), umt5_in_original).items()}


def original_clip(root: Path, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """As the original CLIP has them: the vision tower with its axes of length 1, its head, and the text half."""
    state = in_layout(weights_of(root, "image_encoder"), clip_in_original)
    for name, axes in (("visual.cls_embedding", 2), ("visual.pos_embedding", 1)):
        state[name] = state[name][(None,) * axes]
    others = {"visual.head": torch.randn(64, 32), "log_scale": torch.ones(())}
    others |= {
        "textual.token_embedding.weight": torch.randn(50, 16),
        "textual.blocks.0.attn.q.weight": torch.ones(4, 4),
    }
    return {name: tensor.to(dtype) for name, tensor in (state | others).items()}


def write_release(folder: Path, root: Path, name: str = "tiny-i2v") -> Path:
    """The folder of an original release: transformer, pickles, and the tokenizer's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    transformer = {to_original(key): tensor for key, tensor in weights_of(root, "transformer").items()}
    save_file(transformer, folder / "diffusion_pytorch_model.safetensors")
    torch.save(original_vae(root, name), folder / VAES[name])
    torch.save(original_umt5(root), folder / T5)
    if (root / "image_encoder").is_dir():
        torch.save(original_clip(root), folder / CLIP)
    shutil.copytree(root / "tokenizer", folder / "google" / "umt5-xxl")
    return folder


def write_comfyui(models: Path, root: Path, prefix: str = "model.diffusion_model.") -> Path:
    """ComfyUI's folder `models` with a model in its own formats; returns the transformer's file."""
    for folder in ("diffusion_models", "vae", "text_encoders", "clip_vision"):
        (models / folder).mkdir(parents=True, exist_ok=True)
    transformer = {to_original(key): tensor for key, tensor in weights_of(root, "transformer").items()}
    file = models / "diffusion_models" / "wan2.1_i2v_480p_14B_fp8_scaled.safetensors"
    save_file(scaled(transformer, prefix), file)
    save_file(original_vae(root), models / "vae" / "wan_2.1_vae.safetensors")
    text = scaled(_umt5(root), "", keep=("shared.weight",), dtype=torch.float16)
    text["spiece_model"] = torch.frombuffer(bytearray(sentencepiece_model()), dtype=torch.uint8)
    save_file(text, models / "text_encoders" / "umt5_xxl_fp8_e4m3fn_scaled.safetensors")
    clip = {f"vision_model.{name}": tensor.half() for name, tensor in weights_of(root, "image_encoder").items()}
    save_file(
        clip | {"visual_projection.weight": torch.ones(4, 64)}, models / "clip_vision" / "clip_vision_h.safetensors"
    )
    return file


def scaled(
    state: Mapping[str, Tensor],
    prefix: str = "",
    suffix: str = ".scale_weight",
    keep: tuple[str, ...] = (),
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """ComfyUI's `scaled_fp8`: matrices in fp8 with one scale each, all else in `dtype`."""
    made: dict[str, Tensor] = {f"{prefix}scaled_fp8": torch.empty(0, dtype=FP8)} if suffix == ".scale_weight" else {}
    for name, tensor in state.items():
        if tensor.ndim != 2 or not name.endswith(".weight") or name in keep:
            made[prefix + name] = tensor.to(dtype)
            continue
        scale = tensor.abs().max().float() / 448
        made[prefix + name] = (tensor / scale).to(FP8)
        layer = prefix + name.removesuffix(".weight")
        made[layer + suffix] = scale
        if suffix == ".scale_weight":
            made[layer + ".scale_input"] = torch.ones(())
        else:
            made[layer + ".comfy_quant"] = torch.frombuffer(
                bytearray(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8
            )
    return made


def unscaled(tensors: Mapping[str, Tensor], suffix: str = ".scale_weight") -> dict[str, Tensor]:
    """In fp32 what `scaled` wrote, without what belongs to the quantisation."""
    made = {}
    for name, tensor in tensors.items():
        if name.endswith((suffix, ".scale_input", ".comfy_quant", "scaled_fp8", "spiece_model")):
            continue
        scale = tensors.get(name.removesuffix(".weight") + suffix, torch.ones(()))
        made[name] = tensor.float() * scale
    return made


def sentencepiece_model(pieces: tuple[tuple[str, float, int], ...] = (), fallback: bool = True) -> bytes:
    """A ModelProto of unigrams: <pad>, </s>, <unk>, `pieces`, and the 256 bytes where it falls back to them."""
    all_pieces = [("<pad>", 0.0, 3), ("</s>", 0.0, 3), ("<unk>", 0.0, 2), *pieces]
    all_pieces += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)] if fallback else []
    proto = b""
    for text, score, kind in all_pieces:
        piece = _field(1, text.encode()) + b"\x15" + torch.tensor(score).numpy().tobytes() + b"\x18" + bytes([kind])
        proto += _field(1, piece)
    return proto + _field(2, b"\x18\x01\x98\x02" + bytes([fallback])) + _field(3, b"\x18\x01\x20\x01")


def _field(number: int, value: bytes) -> bytes:
    return bytes([number << 3 | 2]) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 0x7F | 0x80]) + _varint(value >> 7)


def _umt5(root: Path) -> dict[str, Tensor]:
    return {name: value for name, value in weights_of(root, "text_encoder").items() if "embed_tokens" not in name}
