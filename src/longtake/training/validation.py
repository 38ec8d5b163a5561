"""What is looked at while training: the loss on held-out clips at fixed noise and sigmas, and sampled videos."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from longtake import files
from longtake.config.schema import RunConfig
from longtake.data.cache import Entry
from longtake.data.loader import EntryReader, Visit
from longtake.data.video import read_image, write_clip
from longtake.distributed.ranks import ALONE, Ranks
from longtake.errors import ConfigError
from longtake.models.spec import ModelSpec
from longtake.sampling import EncodedRequest, SampleRequest, check_request, encode_requests, sample_encoded
from longtake.training.batch import collate, summed_loss
from longtake.training.experts import share_of
from longtake.training.flow_matching import Draw, generator_for, quantile_of, sigma_at
from longtake.training.model import TrainedModel
from longtake.training.precision import compute_in
from longtake.training.samples import Sample

SIGMAS = 4
"""Sigmas a clip, at the middle of equal shares of their distribution."""
MOST_CLIPS = 32


@dataclass
class Validation:
    """Held-out `entries` of the last stage of the curriculum, and what to sample.

    `encoded` is what `prepare` leaves: prompts and images are the same at every validation. Ranks share the work, each
    group of them that has clips of its own (`share`: which one, of how many); those that wait for each other in every
    forward pass (`lockstep`) make the same number of them.
    """

    config: RunConfig
    entries: Sequence[Entry]
    reader: EntryReader
    root: Path
    device: torch.device
    ranks: Ranks = ALONE
    share: tuple[int, int] = (0, 1)
    lockstep: bool = False
    encoded: Sequence[EncodedRequest] | None = field(default=None, init=False)

    def prepare(self, spec: ModelSpec) -> None:
        """Encodes the prompts and images of the config's samples, once, into host memory.

        Called before the transformer is built, so that no encoder is ever beside it; else the first `sample` does it.
        Raises as `requests`, and ModelError where an encoder is missing or damaged.
        """
        if self.encoded is None:
            encode = lambda: encode_requests(self.root, spec, self._requests(spec), self.device)  # noqa: E731
            self.encoded = self.ranks.first(encode)

    def loss(self, models: Sequence[TrainedModel]) -> float:
        """Mean loss over clips and sigmas: the same noise at every call, nothing dropped.

        Each of two experts has its share of the distribution of sigma, and sigmas of its own.
        """
        shares = [share_of(model.expert, self.config.training) for model in models]
        return sum(share * self._loss_of(model) for model, share in zip(models, shares, strict=True)) / sum(shares)

    def _loss_of(self, model: TrainedModel) -> float:
        training = self.config.training
        jobs = [(entry, index) for entry in self.entries[:MOST_CLIPS] for index in range(SIGMAS)]
        own, groups = self.share
        mine = jobs[own::groups]
        if self.lockstep:  # in which a job is made once more, to be there with the others
            mine += jobs[:1] * (-(-len(jobs) // groups) - len(mine))
        total, counted = 0.0, len(jobs[own::groups])
        computing = compute_in(model.transformer, model.spec, training.precision, self.device)
        with torch.no_grad(), _evaluating(model.transformer), computing:
            for number, (entry, draw_index) in enumerate(mine):
                one = self._sample(entry, draw_index, model)
                batch = collate([one], model.spec, training, self.device)
                loss = float(summed_loss(model.transformer, model.spec, batch))
                total += loss if number < counted else 0.0
        together = self.ranks.world // groups
        return self.ranks.summed(total)[0] / together / len(jobs)

    def sample(self, models: Sequence[TrainedModel], step: int, folder: Path) -> list[Path]:
        """Writes `step-00000100-0.mp4` and a JSON beside it for each of the config's samples; all ranks get them."""
        spec, precision = models[0].spec, self.config.training.precision
        self.prepare(spec)
        transformers = {model.expert.component: model.transformer for model in models}
        own, groups = (0, 1) if self.lockstep else self.share
        written = []
        for index, encoded in [*enumerate(self.encoded or ())][own::groups]:
            request = encoded.request
            with ExitStack() as computing:
                for transformer in transformers.values():
                    computing.enter_context(compute_in(transformer, spec, precision, self.device))
                frames = sample_encoded(self.root, spec, transformers, encoded, self.device)
            path = folder / f"step-{step:08d}-{index}.mp4"
            written.append(path)
            if self.lockstep and not self.ranks.is_first:
                continue
            files.write_file(path, lambda staged, frames=frames: write_clip(frames, staged, float(spec.fps)))  # type: ignore[misc]
            files.write_json(path.with_suffix(".json"), {"step": step, "prompt": request.prompt, "seed": request.seed})
        return sorted({path for each in self.ranks.gathered(written) for path in each})

    def requests(self, model: TrainedModel) -> list[SampleRequest]:
        """The config's samples; raises where an image cannot be read or the model cannot follow one."""
        return self._requests(model.spec)

    def _requests(self, spec: ModelSpec) -> list[SampleRequest]:
        size, validation = self.config.data.size, self.config.validation
        requests = []
        for index, wanted in enumerate(validation.samples):
            request = SampleRequest(
                prompt=wanted.prompt,
                image=read_image(Path(wanted.image).resolve(), size) if wanted.image else None,
                last_image=read_image(Path(wanted.last_image).resolve(), size) if wanted.last_image else None,
                size=size,
                num_frames=self.config.data.num_frames,
                steps=validation.sample_steps,
                guidance_scale=validation.guidance_scale,
                seed=index,
                shift=self.config.training.shift,
            )
            _check(request, spec, f"validation.samples[{index}]")
            requests.append(request)
        return requests

    def _sample(self, entry: Entry, draw_index: int, model: TrainedModel) -> Sample:
        training = self.config.training
        tensors = self.reader.read(entry)
        low, high = (quantile_of(sigma, training) for sigma in model.expert.sigma_range)
        sigma = sigma_at(low + (high - low) * (draw_index + 0.5) / SIGMAS, training)
        noise = torch.randn(tensors.latents.shape, generator=generator_for(f"validation:{entry.latents}:{draw_index}"))
        return Sample(Visit(entry, 0, 0), tensors, Draw(noise, sigma, drop_caption=False))


def _check(request: SampleRequest, spec: ModelSpec, where: str) -> None:
    """Raises ConfigError with what of a request the model cannot follow, in the config's words."""
    try:
        check_request(request, spec)
    except ConfigError as error:
        named = [replace(problem, where=f"{where}.{problem.where}") for problem in error.problems]
        raise ConfigError(named) from None


@contextmanager
def _evaluating(transformer: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode: LoRA's dropout would draw from the global generator."""
    training = transformer.training
    transformer.eval()
    try:
        yield
    finally:
        transformer.train(training)
