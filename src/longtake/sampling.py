# ruff: noqa: F722
"""A video from a prompt, and images where the model takes them, through diffusers' own pipelines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from torch import Tensor

from longtake.errors import ConfigError, Problem, RunError
from longtake.models.spec import ModelSpec
from longtake.models.wan.conditioning import pad_prompt
from longtake.models.wan.encoders import encode_image, encode_prompt, load_image_encoder, load_text_encoder, load_vae

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8


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


def sample(
    root: Path,
    spec: ModelSpec,
    transformers: Mapping[str, WanTransformer3DModel],
    request: SampleRequest,
    device: torch.device | str,
    on_step: Callable[[int], None] | None = None,
) -> UInt8[Tensor, "frames 3 height width"]:
    """A video, uint8 [frames, 3, height, width] on the CPU, as a function of `request` and the weights.

    `root` is a diffusers folder with everything but the transformers; those (by component name, one for each expert)
    lie on `device` with their adapters, and are given back as they were, as is torch's random state. Each encoder is
    loaded, used and released in turn. `on_step` is called with the number of denoising steps done. Raises ConfigError
    for a request that the model cannot follow, ModelError for a damaged `root`, RunError where the video is not finite.
    """
    check_request(request, spec)
    device = torch.device(device)
    forked = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=forked), _evaluating(transformers.values()), torch.no_grad():
        arguments = _arguments(root, spec, request, device)
        pipeline = _pipeline(root, spec, transformers, request, device)
        if on_step is not None:
            arguments["callback_on_step_end"] = _callback(on_step)
        frames = pipeline(**arguments, output_type="pt").frames[0]
        return _to_bytes(frames)


def check_request(request: SampleRequest, spec: ModelSpec) -> None:
    """Raises ConfigError with everything in `request` that the model cannot follow."""
    if problems := [*_shape_problems(request, spec), *_image_problems(request, spec)]:
        raise ConfigError(problems)


class _ReadyImagePipeline(WanImageToVideoPipeline):
    """The image-to-video pipeline with CLIP's tokens computed beforehand.

    It refuses `image` and `image_embeds` in one call, although it needs both, and would keep the encoder loaded.
    """

    ready_image_embeds: Float[Tensor, "images tokens dim"] | None = None

    def encode_image(self, *_: Any) -> Float[Tensor, "images tokens dim"]:
        """[images, tokens, dim], whatever the arguments."""
        assert self.ready_image_embeds is not None
        return self.ready_image_embeds


def _pipeline(
    root: Path,
    spec: ModelSpec,
    transformers: Mapping[str, WanTransformer3DModel],
    request: SampleRequest,
    device: torch.device,
) -> WanPipeline | WanImageToVideoPipeline:
    components = {
        "tokenizer": None,
        "text_encoder": None,
        "vae": load_vae(root, device),
        "scheduler": UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=request.shift
        ),
        "boundary_ratio": spec.boundary_ratio,
        "expand_timesteps": spec.expand_timesteps,
        **{name: transformers[name] for name in spec.experts},
    }
    pipeline = WanPipeline(**components) if request.image is None else _ReadyImagePipeline(**components)
    if spec.image_tokens:
        pipeline.ready_image_embeds = _image_embeds(root, request, device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _arguments(root: Path, spec: ModelSpec, request: SampleRequest, device: torch.device) -> dict[str, Any]:
    width, height = request.size
    arguments = {
        **_prompt_embeds(root, spec, request, device),
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
    root: Path, spec: ModelSpec, request: SampleRequest, device: torch.device
) -> dict[str, Float[Tensor, "1 tokens dim"]]:
    """Encoded here as for training (512 tokens), which also lets the encoder go before the first step."""
    encoder = load_text_encoder(root, device)
    prompts = {"prompt_embeds": request.prompt}
    if request.guidance_scale > 1:
        prompts["negative_prompt_embeds"] = request.negative_prompt
    return {name: pad_prompt(encode_prompt(encoder, text), spec.text_tokens)[None] for name, text in prompts.items()}


def _image_embeds(root: Path, request: SampleRequest, device: torch.device) -> Float[Tensor, "images tokens dim"]:
    encoder = load_image_encoder(root, device)
    return torch.stack([encode_image(encoder, image) for image in request.images])


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


def _to_bytes(
    frames: Float[Tensor, "frames 3 height width"],
) -> UInt8[Tensor, "frames 3 height width"]:
    if not frames.isfinite().all():
        remedy = "sample an earlier checkpoint, or with fp32 weights"
        raise RunError(Problem("the sampled video has values that are not finite", remedy=remedy))
    return (frames * 255).round().to(torch.uint8).cpu()


def _shape_problems(request: SampleRequest, spec: ModelSpec) -> Iterator[Problem]:
    if (request.num_frames - 1) % spec.temporal_stride or request.num_frames < 1:
        nearest = max(request.num_frames - 1, 0) // spec.temporal_stride * spec.temporal_stride + 1
        remedy = f"use {nearest} or {nearest + spec.temporal_stride}"
        yield Problem(f"{request.num_frames} is not {spec.temporal_stride}n+1", "num_frames", remedy)
    for side, name in zip(request.size, ("width", "height"), strict=True):
        if side % spec.size_divisor or side < 1:
            nearest = max(side // spec.size_divisor, 1) * spec.size_divisor
            yield Problem(f"the {name} {side} does not divide by {spec.size_divisor}", "size", f"use {nearest}")
    if request.steps < 1:
        yield Problem(f"{request.steps} denoising steps make no video", "steps", "use 20 to 50")


def _image_problems(request: SampleRequest, spec: ModelSpec) -> Iterator[Problem]:
    takes = {"image": spec.task != "t2v", "last_image": spec.task == "flf2v"}
    needs = {"image": spec.task in ("i2v", "flf2v"), "last_image": spec.task == "flf2v"}
    width, height = request.size
    for name, image in (("image", request.image), ("last_image", request.last_image)):
        if image is None and needs[name]:
            yield Problem(f"{spec.name} makes a video from an image, none is given", name, "give one")
        elif image is not None and not takes[name]:
            yield Problem(f"{spec.name} would ignore the image", name, "leave it out, or choose a model that takes it")
        elif image is not None and tuple(image.shape) != (3, height, width):
            yield Problem(f"the image is {list(image.shape)}, not {[3, height, width]}", name, "cut it as a clip is")
