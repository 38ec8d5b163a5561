# ruff: noqa: F722
"""A video from a prompt, and images where the model takes them, through diffusers' own pipelines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.video_processor import VideoProcessor
from torch import Tensor

from longtake.errors import ConfigError, Problem, RunError
from longtake.models.spec import ModelSpec
from longtake.models.wan import encoders
from longtake.models.wan.conditioning import image_condition, pad_prompt
from longtake.models.wan.pipelines import ImageInputs, few_timesteps, image_pipeline, text_pipeline

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8

Made = TypeVar("Made")


@dataclass(frozen=True)
class SampleRequest:
    """What to sample. `image` and `last_image` are uint8 [3, height, width], cut to `size` exactly as a clip is.

    `size` is (width, height) in pixels; `guidance_scale` 1 switches classifier-free guidance, and with it
    `negative_prompt`, off; `shift` is the schedule's, as in training.
    """

    prompt: str
    image: UInt8[Tensor, "3 height width"] | None
    last_image: UInt8[Tensor, "3 height width"] | None
    size: tuple[int, int]
    num_frames: int
    steps: int
    guidance_scale: float
    seed: int
    shift: float
    negative_prompt: str = ""

    @property
    def images(self) -> list[UInt8[Tensor, "3 height width"]]:
        """The images given, first frame first."""
        return [image for image in (self.image, self.last_image) if image is not None]


@dataclass(frozen=True)
class EncodedRequest:
    """A request, and in host memory what the encoders make of it.

    Prompts are padded to 512 tokens, as in training. `negative_prompt_embeds` is None without guidance, `image_inputs`
    without an image.
    """

    request: SampleRequest
    prompt_embeds: Float[Tensor, "1 tokens dim"]
    negative_prompt_embeds: Float[Tensor, "1 tokens dim"] | None
    image_inputs: ImageInputs | None


def sample(
    root: Path,
    spec: ModelSpec,
    transformers: Mapping[str, WanTransformer3DModel],
    request: SampleRequest,
    device: torch.device | str,
    on_step: Callable[[int], None] | None = None,
) -> UInt8[Tensor, "frames 3 height width"]:
    """A video, uint8 [frames, 3, height, width] on the CPU, as a function of `request` and the weights.

    `encode_requests`, then `sample_encoded`, which see for arguments and errors, both beside the transformers.
    """
    (encoded,) = encode_requests(root, spec, [request], device)
    return sample_encoded(root, spec, transformers, encoded, device, on_step)


def encode_requests(
    root: Path, spec: ModelSpec, requests: Sequence[SampleRequest], device: torch.device | str
) -> list[EncodedRequest]:
    """What needs no transformer: each encoder of the diffusers folder `root` is loaded, used for all, and released.

    Torch's random state is left as it was. Raises ConfigError for a request that the model cannot follow, ModelError
    for a damaged `root`.
    """
    for request in requests:
        check_request(request, spec)
    if not requests:
        return []
    device = torch.device(device)
    with _random_state_of(device), torch.no_grad():
        embeds = _prompt_embeds(root, spec, requests, device)
        images = _image_inputs(root, spec, requests, device)
    negatives = [embeds[each.negative_prompt] if each.guidance_scale > 1 else None for each in requests]
    return [
        EncodedRequest(request, embeds[request.prompt], negative, inputs)
        for request, negative, inputs in zip(requests, negatives, images, strict=True)
    ]


def sample_encoded(
    root: Path,
    spec: ModelSpec,
    transformers: Mapping[str, WanTransformer3DModel],
    encoded: EncodedRequest,
    device: torch.device | str,
    on_step: Callable[[int], None] | None = None,
) -> UInt8[Tensor, "frames 3 height width"]:
    """The video of `sample`, of which the VAE alone is still to be loaded; it comes to `device` after the denoising.

    `transformers` (by component name, one for each expert) lie on `device` with their adapters, and are given back as
    they were, as is torch's random state. `on_step` is called with the number of denoising steps done. Raises
    ModelError for a damaged VAE, RunError where the video is not finite.
    """
    device = torch.device(device)
    with _random_state_of(device), _evaluating(transformers.values()), torch.no_grad():
        vae = encoders.load_vae(root, "cpu", spec)  # first: nobody wants to hear of a damaged file after the denoising
        latents = _denoise(spec, transformers, encoded, device, on_step)
        encoders.release()
        frames = _decode(vae.to(device), latents)
    del vae, latents
    encoders.release()
    return frames


def check_request(request: SampleRequest, spec: ModelSpec) -> None:
    """Raises ConfigError with everything in `request` that the model cannot follow."""
    if problems := [*_shape_problems(request, spec), *_image_problems(request, spec)]:
        raise ConfigError(problems)


def _denoise(
    spec: ModelSpec,
    transformers: Mapping[str, WanTransformer3DModel],
    encoded: EncodedRequest,
    device: torch.device,
    on_step: Callable[[int], None] | None,
) -> Float[Tensor, "1 channels latent_frames latent_height latent_width"]:
    """Denoised latents; all else that the pipeline had ends with this call."""
    shift, inputs = encoded.request.shift, encoded.image_inputs
    of = (spec, transformers, shift)
    pipeline: Any = text_pipeline(*of) if inputs is None else image_pipeline(*of, inputs)
    arguments = _arguments(encoded, device)
    if on_step is not None:
        arguments["callback_on_step_end"] = _callback(on_step)
    with few_timesteps(transformers.values()):
        latents: Tensor = pipeline(**arguments, output_type="latent").frames
    return latents


def _decode(
    vae: AutoencoderKLWan, latents: Float[Tensor, "1 channels latent_frames latent_height latent_width"]
) -> UInt8[Tensor, "frames 3 height width"]:
    return _to_bytes(VideoProcessor().postprocess_video(encoders.decode_latents(vae, latents), "pt")[0])


def _arguments(encoded: EncodedRequest, device: torch.device) -> dict[str, Any]:
    request = encoded.request
    width, height = request.size
    negative = encoded.negative_prompt_embeds
    arguments = {
        "prompt_embeds": encoded.prompt_embeds.to(device),
        "negative_prompt_embeds": None if negative is None else negative.to(device),
        "width": width,
        "height": height,
        "num_frames": request.num_frames,
        "num_inference_steps": request.steps,
        "guidance_scale": request.guidance_scale,
        # drawn on the CPU, so that a seed means the same noise on every device
        "generator": torch.Generator().manual_seed(request.seed),
    }
    names = ("image", "last_image")
    images = {name: image[None].float() / 255 for name, image in zip(names, request.images, strict=False)}
    return arguments | images


def _prompt_embeds(
    root: Path, spec: ModelSpec, requests: Sequence[SampleRequest], device: torch.device
) -> dict[str, Float[Tensor, "1 tokens dim"]]:
    """By text, and each text once."""
    prompts = [request.prompt for request in requests]
    texts = dict.fromkeys([*prompts, *(request.negative_prompt for request in requests if request.guidance_scale > 1)])

    def encode(encoder: encoders.TextEncoder) -> dict[str, Tensor]:
        return {text: pad_prompt(encoders.encode_prompt(encoder, text), spec.text_tokens)[None].cpu() for text in texts}

    return _used_once(encoders.load_text_encoder, (root, spec), device, encode)


def _image_inputs(
    root: Path, spec: ModelSpec, requests: Sequence[SampleRequest], device: torch.device
) -> list[ImageInputs | None]:
    given = [request for request in requests if request.images]
    if not given:
        return [None] * len(requests)

    def tokens(clip: encoders.ImageEncoder) -> list[Tensor | None]:
        return [torch.stack([encoders.encode_image(clip, image).cpu() for image in each.images]) for each in given]

    def conditions(vae: AutoencoderKLWan) -> list[Tensor]:
        return [_condition(vae, spec, request) for request in given]

    of = (root, spec)
    embeds = _used_once(encoders.load_image_encoder, of, device, tokens) if spec.image_tokens else [None] * len(given)
    inputs = map(ImageInputs, embeds, _used_once(encoders.load_vae, of, device, conditions))
    return [next(inputs) if request.images else None for request in requests]


def _used_once(
    load: Callable[..., Any], of: tuple[Path, ModelSpec], device: torch.device, work: Callable[[Any], Made]
) -> Made:
    """What `work` makes of the loaded encoder, which is gone afterwards: no name here may hold it."""
    made = work(load(of[0], device, of[1]))
    encoders.release()
    return made


def _condition(
    vae: AutoencoderKLWan, spec: ModelSpec, request: SampleRequest
) -> Float[Tensor, "1 channels latent_frames latent_height latent_width"]:
    assert request.image is not None
    if spec.expand_timesteps:
        return encoders.encode_video(vae, encoders.normalise_pixels(request.image)[None, :, None]).cpu()
    return image_condition(vae, request.image, request.last_image, request.num_frames)[None].cpu()


@contextmanager
def _random_state_of(device: torch.device) -> Iterator[None]:
    """Whatever is drawn inside, torch's random state is afterwards what it was."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


@contextmanager
def _evaluating(transformers: Iterable[WanTransformer3DModel]) -> Iterator[None]:
    """Evaluation mode (no LoRA dropout) for a while, then every module's own mode again."""
    before = [(module, module.training) for transformer in transformers for module in transformer.modules()]
    for module, _ in before:
        module.training = False
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def _callback(on_step: Callable[[int], None]) -> Callable[..., dict[str, Tensor]]:
    def call(_pipeline: Any, step: int, _timestep: Any, _tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        on_step(step + 1)
        return {}

    return call


def _to_bytes(frames: Float[Tensor, "frames 3 height width"]) -> UInt8[Tensor, "frames 3 height width"]:
    if not frames.isfinite().all():
        remedy = "sample an earlier checkpoint, or with fp32 weights"
        what = "the sampled video has values that are not finite"
        raise RunError(Problem(what, remedy=remedy, code="sample-not-finite"))
    return (frames * 255).round().to(torch.uint8).cpu()


def _shape_problems(request: SampleRequest, spec: ModelSpec) -> Iterator[Problem]:
    if (request.num_frames - 1) % spec.temporal_stride or request.num_frames < 1:
        nearest = max(request.num_frames - 1, 0) // spec.temporal_stride * spec.temporal_stride + 1
        remedy = f"use {nearest} or {nearest + spec.temporal_stride}"
        what = f"{request.num_frames} is not {spec.temporal_stride}n+1"
        yield Problem(what, "num_frames", remedy, code="sample-frame-count-wrong")
    for side, name in zip(request.size, ("width", "height"), strict=True):
        if side % spec.size_divisor or side < 1:
            nearest = max(side // spec.size_divisor, 1) * spec.size_divisor
            what = f"the {name} {side} does not divide by {spec.size_divisor}"
            yield Problem(what, "size", f"use {nearest}", code="sample-size-indivisible")
    if request.steps < 1:
        what = f"{request.steps} denoising steps make no video"
        yield Problem(what, "steps", "use 20 to 50", code="sample-without-steps")


def _image_problems(request: SampleRequest, spec: ModelSpec) -> Iterator[Problem]:
    takes = {"image": spec.task != "t2v", "last_image": spec.task == "flf2v"}
    needs = {"image": spec.task in ("i2v", "flf2v"), "last_image": spec.task == "flf2v"}
    for name, image in (("image", request.image), ("last_image", request.last_image)):
        if image is None and needs[name]:
            which = "an image" if name == "image" else "a last image too"
            what = f"{spec.name} makes a video from {which}, none is given"
            yield Problem(what, name, "give one", code="sample-image-missing")
        elif image is not None and not takes[name]:
            what = f"{spec.name} would ignore the image"
            yield Problem(what, name, "leave it out, or choose a model that takes it", code="sample-image-unused")
        elif image is not None and (found := [*image.shape]) != (wanted := [3, *reversed(request.size)]):
            what = f"the image is {found}, not {wanted}"
            yield Problem(what, name, "cut it as a clip is", code="sample-image-size-differs")
