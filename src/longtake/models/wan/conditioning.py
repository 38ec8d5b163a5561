# ruff: noqa: F722
"""From noisy latents, a noise level and the cached conditioning to the arguments of WanTransformer3DModel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from longtake.errors import ModelError, Problem
from longtake.models.spec import ModelSpec
from longtake.models.wan.encoders import encode_video, normalise_pixels

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan
    from jaxtyping import Float, Float32, UInt8

TIMESTEPS = 1000
"""The transformer's timestep is sigma times this."""

_MASK_CHANNELS = 4  # the VAE's temporal stride: one channel for each frame that a latent frame stands for


@dataclass(frozen=True)
class Conditioning:
    """What the transformer is told besides the noisy latents.

    `prompt_embeds` is zero past each prompt's length. `image_embeds` holds CLIP's tokens, of the first image and then
    of the last. `condition` is what `image_condition` makes; `first_latents` the clean first frame of ti2v.
    """

    prompt_embeds: Float[Tensor, "batch 512 text_dim"]
    image_embeds: Float[Tensor, "batch image_tokens image_dim"] | None = None
    condition: Float[Tensor, "batch 20 frames height width"] | None = None
    first_latents: Float[Tensor, "batch channels 1 height width"] | None = None


def pad_prompt(embeds: Float[Tensor, "length dim"], tokens: int) -> Float[Tensor, "tokens dim"]:
    """`embeds` with rows of zeros up to `tokens` rows; there is no attention mask for them in Wan."""
    assert len(embeds) <= tokens
    return functional.pad(embeds, (0, 0, 0, tokens - len(embeds)))


def image_mask(num_frames: int, latent_shape: tuple[int, ...], last: bool) -> Float32[Tensor, "4 frames height width"]:
    """1 where a frame is given: on frame 0 and, with `last`, on the last one.

    `latent_shape` ends in (frames, height, width). The first frame counts four times, because its latent frame stands
    for it alone (WanImageToVideoPipeline.prepare_latents).
    """
    frames, height, width = latent_shape[-3:]
    given = torch.zeros(num_frames)
    given[0] = 1
    if last:
        given[-1] = 1
    by_latent_frame = torch.cat([given[:1].repeat(_MASK_CHANNELS), given[1:]]).view(frames, _MASK_CHANNELS)
    return by_latent_frame.T[:, :, None, None].repeat(1, 1, height, width)


def image_condition(
    vae: AutoencoderKLWan,
    first: UInt8[Tensor, "3 height width"] | Float[Tensor, "3 height width"],
    last: UInt8[Tensor, "3 height width"] | Float[Tensor, "3 height width"] | None,
    num_frames: int,
) -> Float[Tensor, "20 frames latent_height latent_width"]:
    """The mask, and the latents of a video that is mid-grey but for the images; bytes, or floats in [-1, 1].

    The images are resized and cropped as the clip is, by the caller.
    """
    first = normalise_pixels(first).to(vae.device)
    video = first.new_zeros(1, 3, num_frames, *first.shape[-2:])
    video[:, :, 0] = first
    if last is not None:
        assert num_frames > 1
        video[:, :, -1] = normalise_pixels(last).to(vae.device)
    latents = encode_video(vae, video)[0]
    mask = image_mask(num_frames, tuple(latents.shape), last is not None)
    return torch.cat([mask.to(latents), latents])


def dit_inputs(
    spec: ModelSpec,
    noisy: Float[Tensor, "batch channels frames height width"],
    sigma: Float32[Tensor, " batch"],
    conditioning: Conditioning,
) -> dict[str, Tensor]:
    """Keyword arguments of `WanTransformer3DModel.forward`, in the dtype of `noisy`, but timesteps in fp32.

    Raises ModelError where `conditioning` lacks what the variant needs or has what the variant would ignore.
    """
    _check_conditioning(spec, conditioning)
    hidden_states = noisy
    if conditioning.condition is not None:
        hidden_states = torch.cat([noisy, conditioning.condition.to(noisy)], dim=1)
    timestep = sigma.float() * TIMESTEPS
    if conditioning.first_latents is not None:
        hidden_states = torch.cat([conditioning.first_latents.to(noisy), noisy[:, :, 1:]], dim=2)
        timestep = _token_timesteps(spec, timestep, noisy)
    inputs = {
        "hidden_states": hidden_states,
        "timestep": timestep,
        "encoder_hidden_states": conditioning.prompt_embeds.to(noisy),
    }
    if conditioning.image_embeds is not None:
        inputs["encoder_hidden_states_image"] = _one_row_an_image(spec, conditioning.image_embeds.to(noisy))
    return inputs


def loss_mask(
    spec: ModelSpec, conditioning: Conditioning, latents: Float[Tensor, "batch channels frames height width"]
) -> Float32[Tensor, "1 1 frames 1 1"] | None:
    """0 on the frames that the loss leaves out: the clean first frame of ti2v; None where every frame counts."""
    if conditioning.first_latents is None:
        return None
    assert spec.expand_timesteps
    mask = torch.ones(1, 1, latents.shape[2], 1, 1, device=latents.device)
    mask[:, :, 0] = 0
    return mask


def _token_timesteps(
    spec: ModelSpec, timestep: Float32[Tensor, " batch"], noisy: Float[Tensor, "batch channels frames height width"]
) -> Float32[Tensor, "batch tokens"]:
    """0 for the tokens of the first frame, the sample's timestep for all others, as diffusers' pipelines give them.

    `models.wan.first_and_rest` has the transformer embed the two, not all.
    """
    _, _, frames, height, width = noisy.shape
    a_frame = (height // spec.patch_size[1]) * (width // spec.patch_size[2])
    timesteps = timestep[:, None].repeat(1, frames // spec.patch_size[0] * a_frame)
    timesteps[:, :a_frame] = 0
    return timesteps


def _one_row_an_image(spec: ModelSpec, image_embeds: Tensor) -> Tensor:
    """Flf2v's image embedder joins rows in pairs itself; given both images in one row it would join two samples."""
    images = 2 if spec.task == "flf2v" else 1
    return image_embeds.reshape(-1, spec.image_tokens // images, image_embeds.shape[-1])


def _check_conditioning(spec: ModelSpec, conditioning: Conditioning) -> None:
    needs_condition = spec.task in ("i2v", "flf2v")
    problems = []
    if needs_condition != (conditioning.condition is not None):
        problems.append(_mismatch(spec, "image latents", needs_condition))
    if bool(spec.image_tokens) != (conditioning.image_embeds is not None):
        problems.append(_mismatch(spec, "CLIP image embeddings", bool(spec.image_tokens)))
    if conditioning.first_latents is not None and not spec.expand_timesteps:
        problems.append(_mismatch(spec, "a clean first frame", False))
    if problems:
        raise ModelError(problems)


def _mismatch(spec: ModelSpec, what: str, needed: bool) -> Problem:
    sentence = f"{spec.name} needs {what} and got none" if needed else f"{spec.name} has no use for {what}"
    remedy = "run `longtake prepare` for this model"
    return Problem(sentence, "conditioning", remedy, code="conditioning-missing" if needed else "conditioning-unused")
