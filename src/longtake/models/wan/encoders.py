# ruff: noqa: F722
"""The frozen encoders around a Wan transformer: VAE, UMT5 and CLIP, each loaded, used and released by the caller."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKLWan
from safetensors import SafetensorError
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from longtake.errors import ModelError, Problem
from longtake.models.spec import ModelSpec
from longtake.models.wan import tiny
from longtake.models.wan.component_configs import CLIP_VIT_H, VAE_2_1, VAE_2_2
from longtake.models.wan.component_files import Component, locate_component
from longtake.models.wan.component_kinds import FoundComponent
from longtake.models.wan.component_names import Place, clip_in_open_clip, clip_in_original, vae_in_original
from longtake.models.wan.component_weights import Model, empty_model, read_component, unreadable
from longtake.models.wan.fingerprints import ComponentName, component_fingerprint, fingerprint
from longtake.models.wan.text_encoders import (
    TEXT_TOKENS,
    TextEncoder,
    clean_prompt,
    computing_type,
    encode_prompt,
    load_text_encoder,
    text_encoder_types,
)
from longtake.models.wan.variants import VARIANTS, WanVariant

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8

__all__ = [
    "TEXT_TOKENS",
    "ComponentName",
    "ImageEncoder",
    "TextEncoder",
    "clean_prompt",
    "component_fingerprint",
    "computing_type",
    "decode_latents",
    "encode_image",
    "encode_prompt",
    "encode_video",
    "fingerprint",
    "load_image_encoder",
    "load_text_encoder",
    "load_vae",
    "normalise_pixels",
    "release",
    "text_encoder_types",
]

_CLIP_CONFIGS = (CLIP_VIT_H, tiny.IMAGE_ENCODER)


@dataclass(frozen=True)
class ImageEncoder:
    """How images become CLIP's pixels, and CLIP's vision tower."""

    processor: CLIPImageProcessorPil
    model: CLIPVisionModel


def load_vae(root: Path, device: torch.device | str, spec: ModelSpec | None = None) -> AutoencoderKLWan:
    """The VAE of `root`, a folder of components, in fp32: a diffusers folder, or a file with the original names.

    `spec` decides where there are VAEs of several models. Raises ModelError where it is missing, ambiguous or damaged.
    """
    component = locate_component(root, "vae", spec.name if spec else "")
    if component.found is None:
        return _load(AutoencoderKLWan, component.path, device, torch_dtype=torch.float32)
    config = _vae_config(VARIANTS[component.found.users[0]])
    vae = empty_model(lambda: AutoencoderKLWan(**config), component.path)
    residual, blocks = vae.config.is_residual, vae.config.num_res_blocks
    original = component.found.names == "original"
    place = (lambda name: vae_in_original(name, residual, blocks)) if original else Place
    return _filled(vae, component, component.found, place, device)


def normalise_pixels(
    pixels: UInt8[Tensor, "*shape"] | Float[Tensor, "*shape"],
) -> Float[Tensor, "*shape"]:
    """Pixels of 0..255 as fp32 in [-1, 1], rounded as diffusers' VideoProcessor does; floats pass as they are."""
    return pixels.float() / 255 * 2 - 1 if pixels.dtype == torch.uint8 else pixels.float()


@torch.no_grad()
def encode_video(
    vae: AutoencoderKLWan, video: Float[Tensor, "batch 3 frames height width"]
) -> Float[Tensor, "batch channels latent_frames latent_height latent_width"]:
    """Normalised latents, (z - mean) / std per channel, of a video in [-1, 1]: the posterior's mean, nothing drawn."""
    latents = vae.encode(video.to(vae.device, vae.dtype)).latent_dist.mode()
    mean, inverse_std = _latent_statistics(vae, latents)
    return (latents - mean) * inverse_std


@torch.no_grad()
def decode_latents(
    vae: AutoencoderKLWan, latents: Float[Tensor, "batch channels latent_frames latent_height latent_width"]
) -> Float[Tensor, "batch 3 frames height width"]:
    """The video in [-1, 1] of normalised latents."""
    latents = latents.to(vae.device, vae.dtype)
    mean, inverse_std = _latent_statistics(vae, latents)
    return vae.decode(latents / inverse_std + mean).sample


def load_image_encoder(root: Path, device: torch.device | str, spec: ModelSpec | None = None) -> ImageEncoder:
    """CLIP's vision tower of `root`, a folder of components, in fp32; raises ModelError as `load_vae`.

    A file of its own comes without a processor: then it is CLIP's, which that of the published folders is, too.
    """
    component = locate_component(root, "image_encoder", spec.name if spec else "")
    found = component.found
    if found is None:
        model = _load(CLIPVisionModel, component.path, device, dtype=torch.float32)
        return ImageEncoder(_processor(root / "image_processor"), model)
    width = VARIANTS[found.users[0]].spec.image_dim
    config = CLIPVisionConfig(**next(each for each in _CLIP_CONFIGS if each["hidden_size"] == width))
    model = empty_model(lambda: CLIPVisionModel(config), component.path)
    place = {"original": clip_in_original, "open_clip": clip_in_open_clip, "diffusers": Place}[found.names]
    model = _filled(model, component, found, place, device)
    # not in the state dict, so `meta` left it without values
    embeddings = model.embeddings
    embeddings.position_ids = torch.arange(embeddings.num_positions, device=device).expand((1, -1))
    if (root / "image_processor").is_dir():
        return ImageEncoder(_processor(root / "image_processor"), model)
    side = config.image_size
    sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    return ImageEncoder(CLIPImageProcessorPil(**sizes), model)


@torch.no_grad()
def encode_image(encoder: ImageEncoder, image: UInt8[Tensor, "3 height width"]) -> Float[Tensor, "tokens dim"]:
    """CLIP's penultimate hidden state, class token first. Pillow resizes, whatever the device."""
    pixels = encoder.processor(
        image.cpu().numpy(), input_data_format="channels_first", return_tensors="pt"
    ).pixel_values
    hidden_states = encoder.model(pixels.to(encoder.model.device), output_hidden_states=True).hidden_states
    return hidden_states[-2][0]


def release() -> None:
    """Gives what the last tensors left in CUDA's allocator back to the driver: the next stage wants other sizes.

    Nothing is collected: encoders and pipelines refer to nothing in a circle, and end with the last name for them.
    """
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _latent_statistics(vae: AutoencoderKLWan, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and 1 / std, [1, channels, 1, 1, 1]; the reciprocal first, as the pipelines do, for the same rounding."""
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1).to(like)
    return mean, (1.0 / torch.tensor(vae.config.latents_std)).view(1, -1, 1, 1, 1).to(like)


def _load(kind: Any, folder: Path, device: torch.device | str, **options: Any) -> Any:
    try:
        model, loading = kind.from_pretrained(
            str(folder), use_safetensors=True, local_files_only=True, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise unreadable(folder, error) from error
    # a tensor that the file lacks would be drawn at random, with a log line only
    if missing := sorted(loading["missing_keys"]):
        lacking = f"{len(missing)} tensors are missing, the first is {missing[0]}"
        raise ModelError(Problem(lacking, str(folder), "download the component again", code="weights-missing"))
    return model.eval().requires_grad_(False).to(device)


def _processor(folder: Path) -> CLIPImageProcessorPil:
    if not (folder / "preprocessor_config.json").is_file():
        remedy = "give a diffusers folder, or one that has it in model.components"
        what = f"there is no {folder.name} (preprocessor_config.json)"
        raise ModelError(Problem(what, str(folder.parent), remedy, code="image-processor-missing"))
    try:
        return CLIPImageProcessorPil.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise unreadable(folder, error) from error


def _vae_config(variant: WanVariant) -> dict[str, Any]:
    published, small = (VAE_2_2, tiny.VAE_2_2) if variant.vae == "2.2" else (VAE_2_1, tiny.VAE_2_1)
    return published if variant.hub_id else small


def _filled(
    model: Model, component: Component, found: FoundComponent, place: Callable[[str], Place], device: torch.device | str
) -> Model:
    """`model`, which lies on `meta`, in fp32 with the weights of a file."""
    places = {name: place(name) for name in model.state_dict()}
    state = read_component(model, (found.tensors, places), lambda _: torch.float32, device, component.path)
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)
