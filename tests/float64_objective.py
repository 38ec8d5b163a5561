"""The objective a second time, from its description in docs/objective.md, in NumPy and float64: nothing of Longtake's.

Encoders and transformers are diffusers' and transformers' own classes, loaded by their own functions, in float64.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from numpy.typing import NDArray
from PIL import Image
from transformers import AutoTokenizer, CLIPVisionModel, UMT5EncoderModel

Array = NDArray[np.float64]
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of the images that OpenAI's CLIP was trained on."""


def mask(num_frames: int, height: int, width: int, both_ends: bool) -> Array:
    """[4, latent frames, height, width]: a latent frame stands for four frames, the first one for frame 0 alone."""
    latent_frames = 1 + (num_frames - 1) // 4
    result = np.zeros((4, latent_frames, height, width))
    for frame in (0, num_frames - 1) if both_ends else (0,):
        if frame == 0:
            result[:, 0] = 1
        else:
            result[(frame - 1) % 4, 1 + (frame - 1) // 4] = 1
    return result


def sinusoids(timesteps: Array, size: int = 256) -> Array:
    """[timesteps, size]: cosines and then sines of t / 10000^(i / half) (Vaswani et al. 2017, section 3.5)."""
    half = size // 2
    phases = timesteps[:, None] * 10000.0 ** (-np.arange(half) / half)
    return np.concatenate([np.cos(phases), np.sin(phases)], axis=1)


def sigma_of(u0: float, sigmas: str, shift: float) -> float:
    """sigma of a uniform variate."""
    u = u0 if sigmas == "uniform" else 1 / (1 + math.exp(-NormalDist().inv_cdf(u0)))
    return shift * u / (1 + (shift - 1) * u)


def share_below(sigma: float, sigmas: str, shift: float) -> float:
    """The share of a distribution of sigma that lies below `sigma`."""
    if sigma in (0.0, 1.0):
        return sigma
    u = sigma / (shift + (1 - shift) * sigma)
    return u if sigmas == "uniform" else NormalDist().cdf(math.log(u) - math.log1p(-u))


def bell(sigma: float) -> float:
    """exp(-2 (2 sigma - 1)^2) over its mean on [0, 1], which is summed up here."""
    middles = (np.arange(100_000) + 0.5) / 100_000
    return float(math.exp(-2 * (2 * sigma - 1) ** 2) / np.exp(-2 * (2 * middles - 1) ** 2).mean())


def loss(velocity: Array, latents: Array, noise: Array, first_given: bool) -> float:
    """Mean squared error against noise - latents, over the frames that are not given."""
    error = (velocity - (noise - latents)) ** 2
    return float((error[:, 1:] if first_given else error).mean())


@dataclass(frozen=True)
class Given:
    """What a transformer takes for one sample: float64, without the batch axis."""

    hidden_states: Array
    timesteps: Array
    prompt_embeds: Array
    image_embeds: Array | None


class Encoders:
    """VAE, UMT5 and CLIP of a diffusers folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.vae = AutoencoderKLWan.from_pretrained(root / "vae").double()

    @torch.no_grad()
    def latents(self, frames: Array) -> Array:
        """[channels, frames, height, width] of frames [frames, 3, height, width] in [-1, 1]: the mean, normalised."""
        video = torch.from_numpy(np.ascontiguousarray(frames.swapaxes(0, 1)[None]))
        posterior = self.vae.encode(video).latent_dist
        mean, std = (np.array(self.vae.config[f"latents_{name}"]) for name in ("mean", "std"))
        return (posterior.mean[0].numpy() - mean[:, None, None, None]) / std[:, None, None, None]

    def condition(self, frames: Array, both_ends: bool) -> Array:
        """Mask, and latents of a video that is mid-grey but for the first frame and, or not, the last."""
        video = np.zeros_like(frames)
        video[0] = frames[0]
        if both_ends:
            video[-1] = frames[-1]
        latents = self.latents(video)
        return np.concatenate([mask(len(frames), *latents.shape[2:], both_ends), latents])

    @torch.no_grad()
    def clip_tokens(self, pictures: Sequence[NDArray[np.uint8]]) -> Array:
        """[tokens, dim] of each picture [height, width, 3] in turn: what enters the last layer of CLIP's tower."""
        tower: Any = CLIPVisionModel.from_pretrained(self.root / "image_encoder").double()
        tower = getattr(tower, "vision_model", tower)
        side = tower.config.image_size
        pixels = torch.from_numpy(np.stack([_cut(picture, side) for picture in pictures]))
        hidden = tower.pre_layrnorm(tower.embeddings(pixels))
        for layer in tower.encoder.layers[:-1]:
            out = layer(hidden, None)
            hidden = out[0] if isinstance(out, tuple) else out
        return np.concatenate(hidden.numpy())

    @torch.no_grad()
    def text(self, prompt: str) -> Array:
        """[512, dim]: UMT5's last hidden state of the prompt and its end token, and zeros behind."""
        tokenizer = AutoTokenizer.from_pretrained(self.root / "tokenizer")
        encoder = UMT5EncoderModel.from_pretrained(self.root / "text_encoder").double()
        tokens = tokenizer(prompt, return_tensors="pt").input_ids
        hidden = encoder(tokens).last_hidden_state[0].numpy()
        return np.pad(hidden, ((0, 512 - len(hidden)), (0, 0)))


@torch.no_grad()
def velocity(folder: Path, given: Given) -> Array:
    """What diffusers' class makes of it with the weights of `folder`, in float64, one timestep for every token."""
    transformer = WanTransformer3DModel.from_pretrained(folder).double()
    embeds = given.image_embeds
    if embeds is not None:
        embeds = embeds.reshape(-1, transformer.config.image_dim)[None]
        if transformer.condition_embedder.image_embedder.pos_embed is not None:  # it joins pairs of rows itself
            embeds = embeds.reshape(2, -1, embeds.shape[-1])
    output = transformer(
        hidden_states=torch.from_numpy(given.hidden_states[None]),
        timestep=torch.from_numpy(given.timesteps[None]),
        encoder_hidden_states=torch.from_numpy(given.prompt_embeds[None]),
        encoder_hidden_states_image=None if embeds is None else torch.from_numpy(embeds),
    )
    return output.sample[0].numpy()  # type: ignore[no-any-return]


def _cut(picture: NDArray[np.uint8], side: int) -> Array:
    """[3, side, side]: the shorter edge scaled to `side`, the middle cut out, CLIP's mean and deviation taken off."""
    height, width = picture.shape[:2]
    scaled = (side * width // min(height, width), side * height // min(height, width))
    pixels = np.asarray(Image.fromarray(picture).resize(scaled, Image.Resampling.BICUBIC), np.float64) / 255
    top, left = (scaled[1] - side) // 2, (scaled[0] - side) // 2
    pixels = pixels[top : top + side, left : left + side]
    return ((pixels - np.array(CLIP_MEAN)) / np.array(CLIP_STD)).transpose(2, 0, 1)
