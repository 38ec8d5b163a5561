# ruff: noqa: F722
"""Runs of tiny models from random weights on the clips of `synthetic_motion`: prepared, trained and sampled."""

from __future__ import annotations

import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from synthetic_motion import Canvas, Case, training_cases

from longtake.config.schema import (
    DataConfig,
    MemoryStrategy,
    ModelConfig,
    OutputConfig,
    RunConfig,
    TrainingConfig,
)
from longtake.data.cache import Cache, Manifest
from longtake.data.encode import prepare
from longtake.models.spec import ModelSpec, Task
from longtake.models.wan import encoders, tiny
from longtake.models.wan.pipelines import image_pipeline
from longtake.models.wan.variants import variant
from longtake.progress import Reporter
from longtake.sampling import EncodedRequest, SampleRequest, encode_requests, sample_encoded
from longtake.training.run import train

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8
    from torch import Tensor

    Shown = Float[Tensor, "frames channels height width"]

MEASURED = 64
"""Clips whose latents' mean and deviation are measured."""
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Settings:
    """How long a model is trained, on how many clips, and how its videos are sampled; `shift` is of both."""

    clips: int
    steps: int
    batch: int
    learning_rate: float
    sample_steps: int
    guidance: float
    shift: float = 3.0


class Runs:
    """The runs of one model in `folder`, on clips of `canvas`; `silent` captions do not name the way."""

    def __init__(self, name: str, folder: Path, canvas: Canvas, settings: Settings, silent: bool) -> None:
        self.name, self.folder, self.canvas, self.settings, self.silent = name, folder, canvas, settings, silent
        cases = training_cases(settings.clips)
        self.root = _random_model(name, folder / "model", [canvas.draw(case) for case in cases[:MEASURED]])
        self.source = canvas.write(cases, folder / "clips", self.spec.fps, silent)
        self.vae = encoders.load_vae(self.root, CPU)
        self.in_latents = variant(name).vae == "2.2"

    @property
    def spec(self) -> ModelSpec:
        """Of the model."""
        return variant(self.name).spec

    def untrained(self) -> dict[str, WanTransformer3DModel]:
        """The transformers that training starts from, by component."""
        return self._load(self.root)

    def trained(self) -> dict[str, WanTransformer3DModel]:
        """Trained on the clips as they are."""
        self.prepare()
        return self._train("trained")

    def shuffled(self) -> dict[str, WanTransformer3DModel]:
        """Trained as long, each clip with the caption and the images of another."""
        shuffle(self.prepare(), *self.caches, self.spec.task)
        return self._train("shuffled")

    @property
    def caches(self) -> tuple[Cache, Cache]:
        """Of the clips as they are, and of the shuffled ones."""
        return Cache(self.folder / "trained-cache"), Cache(self.folder / "shuffled-cache")

    def prepare(self) -> Manifest:
        """Fills the first cache."""
        return prepare(self._config("trained"), self.spec, self.root, CPU, Reporter(quiet=True), (0, 1))

    def requests(self, cases: Sequence[Case]) -> list[EncodedRequest]:
        """What to sample for `cases`: their captions, and those of their frames that the task gives."""
        requests = [self._request(case, seed) for seed, case in enumerate(cases)]
        return encode_requests(self.root, self.spec, requests, CPU)

    def sample(
        self, transformers: Mapping[str, WanTransformer3DModel], requests: Sequence[EncodedRequest]
    ) -> list[Shown]:
        """For each request its video, or what `shown` says."""
        if self.in_latents:
            return [self._sample_latents(transformers, request) for request in requests]
        return [sample_encoded(self.root, self.spec, transformers, each, CPU).float() for each in requests]

    def shown(self, case: Case) -> Shown:
        """The clip of `case` after the VAE's encoder and decoder.

        Where the VAE is random, the normalised latents behind the first frame, which is given: its decoder would show
        that frame in all others.
        """
        latents = _latents(self.vae, self.canvas.draw(case))
        if self.in_latents:
            return latents[0, :, 1:].transpose(0, 1)
        video = encoders.decode_latents(self.vae, latents)[0].transpose(0, 1)
        return (video.clamp(-1, 1) + 1) * 127.5

    def _sample_latents(self, transformers: Mapping[str, WanTransformer3DModel], encoded: EncodedRequest) -> Shown:
        request = encoded.request
        assert encoded.image_inputs is not None
        assert request.image is not None
        pipeline: Any = image_pipeline(self.spec, transformers, request.shift, encoded.image_inputs)
        result = pipeline(
            image=request.image[None].float() / 255,
            prompt_embeds=encoded.prompt_embeds,
            negative_prompt_embeds=encoded.negative_prompt_embeds,
            width=self.canvas.side,
            height=self.canvas.side,
            num_frames=self.canvas.frames,
            num_inference_steps=request.steps,
            guidance_scale=request.guidance_scale,
            generator=torch.Generator().manual_seed(request.seed),
            output_type="latent",
        )
        latents: Tensor = result.frames
        return latents[0, :, 1:].transpose(0, 1)

    def _request(self, case: Case, seed: int) -> SampleRequest:
        frames, settings, canvas = self.canvas.draw(case), self.settings, self.canvas
        return SampleRequest(
            case.silent_caption if self.silent else case.caption,
            frames[0] if self.spec.task != "t2v" else None,
            frames[-1] if self.spec.task == "flf2v" else None,
            (canvas.side, canvas.side),
            canvas.frames,
            settings.sample_steps,
            settings.guidance,
            seed,
            settings.shift,
        )

    def _config(self, kind: str) -> RunConfig:
        settings, side = self.settings, self.canvas.side
        return RunConfig(
            model=ModelConfig(path=str(self.root), name=self.name, dtype="fp32"),
            data=DataConfig(
                source=str(self.source),
                cache=str(self.folder / f"{kind}-cache"),
                validation=0.0,
                num_frames=self.canvas.frames,
                size=(side, side),
            ),
            training=TrainingConfig(
                steps=settings.steps,
                global_batch_size=settings.batch,
                micro_batch_size=settings.batch,
                precision="fp32",
                learning_rate=settings.learning_rate,
                warmup_steps=settings.steps // 10,
                shift=settings.shift,
            ),
            memory=MemoryStrategy(gradient_checkpointing="none"),
            output=OutputConfig(run=str(self.folder / f"{kind}-run"), save_every=settings.steps, keep=1),
        )

    def _train(self, kind: str) -> dict[str, WanTransformer3DModel]:
        return self._load(train(self._config(kind), False, Reporter(quiet=True)))

    def _load(self, folder: Path) -> dict[str, WanTransformer3DModel]:
        return {name: WanTransformer3DModel.from_pretrained(folder / name) for name in self.spec.experts}


def shuffle(manifest: Manifest, source: Cache, target: Cache, task: Task) -> Manifest:
    """Fills `target` with the entries of `source`, each with the caption and the images of another; its manifest."""
    for kind in ("texts", "images"):
        if (source.folder / kind).exists():
            shutil.copytree(source.folder / kind, target.folder / kind)
    others = random.Random(0).sample(manifest.entries, len(manifest.entries))
    pairs = [*zip(manifest.entries, others, strict=True)]
    for entry, other in pairs:
        own, strange = source.read("latents", entry.latents), source.read("latents", other.latents)
        if task == "ti2v":
            own["latents"][:, :1] = strange["latents"][:, :1]
        if "condition" in own:
            own["condition"] = strange["condition"]
        target.write("latents", entry.latents, own)
    entries = tuple(replace(entry, text=other.text, image=other.image) for entry, other in pairs)
    shuffled = replace(manifest, entries=entries)
    target.write_manifest(shuffled)
    return shuffled


def _random_model(name: str, folder: Path, clips: Sequence[UInt8[Tensor, "frames 3 height width"]]) -> Path:
    """The tiny model with random transformers, and a VAE whose latents tell clips apart.

    That is the trained one of the package. The 2.2 kind has none: there the random one loses its biases and residual
    branches, so that it says more of a clip and less of itself, and gets the mean and deviation of latents of `clips`.
    """
    tiny.build_tiny(name, folder)
    if variant(name).vae == "2.1":
        shutil.rmtree(folder / "vae")
        shutil.copytree(tiny.WEIGHTS / "vae", folder / "vae")
        return folder
    vae = AutoencoderKLWan.from_pretrained(folder / "vae")
    for key, parameter in vae.named_parameters():
        if key.endswith(("bias", "conv2.weight", "proj.weight")):
            parameter.data.zero_()
    channels = vae.config.z_dim
    vae.register_to_config(latents_mean=[0.0] * channels, latents_std=[1.0] * channels)
    values = torch.cat([_latents(vae, clip) for clip in clips])
    # of one place among clips: what tells them apart is then as large as the noise that is put over it
    deviation = values.var(0).mean((1, 2, 3)).sqrt()
    vae.register_to_config(latents_mean=values.mean((0, 2, 3, 4)).tolist(), latents_std=deviation.tolist())
    vae.save_pretrained(folder / "vae")
    return folder


def _latents(vae: AutoencoderKLWan, clip: UInt8[Tensor, "frames 3 height width"]) -> Tensor:
    return encoders.encode_video(vae, encoders.normalise_pixels(clip).permute(1, 0, 2, 3)[None])
