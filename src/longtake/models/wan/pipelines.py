# ruff: noqa: F722
"""diffusers' Wan pipelines for denoising alone: what encoders make comes from outside, latents go out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from torch import Tensor

from longtake.models.spec import ModelSpec
from longtake.models.wan.first_and_rest import first_and_rest

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True)
class ImageInputs:
    """What an image-to-video pipeline would have its encoders make of its images.

    `image_embeds` are CLIP's tokens, None where the model takes none. `condition` is the normalised latents of the
    first frame where timesteps are per token (`spec.expand_timesteps`), else mask and latents of `image_condition`.
    """

    image_embeds: Float[Tensor, "images tokens dim"] | None
    condition: Float[Tensor, "1 channels frames height width"]


def text_pipeline(spec: ModelSpec, transformers: Mapping[str, WanTransformer3DModel], shift: float) -> WanPipeline:
    """A pipeline to call with prompt embeddings and `output_type="latent"`."""
    pipeline = WanPipeline(**_components(spec, transformers, shift))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def image_pipeline(
    spec: ModelSpec, transformers: Mapping[str, WanTransformer3DModel], shift: float, inputs: ImageInputs
) -> WanImageToVideoPipeline:
    """The same for a video from images. It wants the images in the call, too, though it looks at their size alone."""
    pipeline = _ReadyImagePipeline(**_components(spec, transformers, shift))
    pipeline.inputs = inputs
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@contextmanager
def few_timesteps(transformers: Iterable[WanTransformer3DModel]) -> Iterator[None]:
    """Inside the context a pipeline's timesteps [batch, tokens] take no more than two would (`first_and_rest`)."""
    with ExitStack() as each:
        for transformer in transformers:
            each.enter_context(first_and_rest(transformer))
        yield


class _ReadyImagePipeline(WanImageToVideoPipeline):
    """It refuses `image` and `image_embeds` in one call, although it needs both, and would keep the encoders loaded."""

    inputs: ImageInputs

    def encode_image(self, *_: Any) -> Tensor | None:
        """[images, tokens, dim], whatever the arguments."""
        return self.inputs.image_embeds

    def prepare_latents(self, _image: Tensor, *drawn: Any) -> tuple[Tensor, ...]:
        """Noise, the condition, and where timesteps are per token the mask of noise.

        `drawn` are the arguments with which the text pipeline draws the same noise, and the last image.
        """
        noise = WanPipeline.prepare_latents(self, *drawn[:-1])
        condition = self.inputs.condition.to(noise)
        if not self.config.expand_timesteps:
            return noise, condition
        mask = noise.new_ones(1, 1, *noise.shape[2:])
        mask[:, :, 0] = 0
        return noise, condition, mask


@dataclass(frozen=True)
class _Sizes:
    """Of a VAE's config what a pipeline asks for that neither encodes nor decodes."""

    z_dim: int
    scale_factor_temporal: int
    scale_factor_spatial: int


@dataclass(frozen=True)
class _AbsentVae:
    config: _Sizes


def _components(spec: ModelSpec, transformers: Mapping[str, WanTransformer3DModel], shift: float) -> dict[str, Any]:
    return {
        "tokenizer": None,
        "text_encoder": None,
        "vae": _AbsentVae(_Sizes(spec.latent_channels, spec.temporal_stride, spec.spatial_stride)),
        "scheduler": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift),
        "boundary_ratio": spec.boundary_ratio,
        "expand_timesteps": spec.expand_timesteps,
        **{name: transformers[name] for name in spec.experts},
    }
