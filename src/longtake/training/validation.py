"""What is looked at while training: the loss on held-out clips at fixed noise and sigmas, and sampled videos."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from longtake import files
from longtake.config.schema import RunConfig
from longtake.data.cache import Entry
from longtake.data.loader import EntryReader, Visit
from longtake.data.video import read_image, write_clip
from longtake.sampling import SampleRequest, check_request, sample
from longtake.training.batch import Sample, collate, summed_loss
from longtake.training.flow_matching import Draw, generator_for, quantile_of, sigma_at
from longtake.training.model import TrainedModel
from longtake.training.precision import compute_in

SIGMAS = 4
"""Sigmas a clip, at the middle of equal shares of their distribution."""
MOST_CLIPS = 32


@dataclass(frozen=True)
class Validation:
    """Held-out `entries` of the last stage of the curriculum, and what to sample."""

    config: RunConfig
    entries: Sequence[Entry]
    reader: EntryReader
    root: Path
    device: torch.device

    def loss(self, model: TrainedModel) -> float:
        """Mean loss over clips and sigmas: the same noise at every call, nothing dropped."""
        training = self.config.training
        total, count = 0.0, 0
        computing = compute_in(model.transformer, model.spec, training.precision, self.device)
        with torch.no_grad(), _evaluating(model.transformer), computing:
            for entry in self.entries[:MOST_CLIPS]:
                for draw_index in range(SIGMAS):
                    one = self._sample(entry, draw_index, model)
                    batch = collate([one], model.spec, training, self.device)
                    total += float(summed_loss(model.transformer, model.spec, batch))
                    count += 1
        return total / count

    def sample(self, model: TrainedModel, step: int, folder: Path) -> list[Path]:
        """Writes `step-00000100-0.mp4` and a JSON beside it for each of the config's samples."""
        written = []
        for index, request in enumerate(self.requests(model)):
            with compute_in(model.transformer, model.spec, self.config.training.precision, self.device):
                frames = sample(self.root, model.spec, {model.component: model.transformer}, request, self.device)
            path = folder / f"step-{step:08d}-{index}.mp4"
            files.write_file(path, lambda staged, frames=frames: write_clip(frames, staged, float(model.spec.fps)))  # type: ignore[misc]
            files.write_json(path.with_suffix(".json"), {"step": step, "prompt": request.prompt, "seed": request.seed})
            written.append(path)
        return written

    def requests(self, model: TrainedModel) -> list[SampleRequest]:
        """The config's samples; raises where an image cannot be read or the model cannot follow one."""
        size, validation = self.config.data.size, self.config.validation
        requests = []
        for index, wanted in enumerate(validation.samples):
            request = SampleRequest(
                prompt=wanted.prompt,
                image=read_image(Path(wanted.image), size) if wanted.image else None,
                last_image=read_image(Path(wanted.last_image), size) if wanted.last_image else None,
                size=size,
                num_frames=self.config.data.num_frames,
                steps=validation.sample_steps,
                guidance_scale=validation.guidance_scale,
                seed=index,
                shift=self.config.training.shift,
            )
            check_request(request, model.spec)
            requests.append(request)
        return requests

    def _sample(self, entry: Entry, draw_index: int, model: TrainedModel) -> Sample:
        training = self.config.training
        tensors = self.reader.read(entry)
        low, high = (quantile_of(sigma, training) for sigma in model.sigma_range)
        sigma = sigma_at(low + (high - low) * (draw_index + 0.5) / SIGMAS, training)
        noise = torch.randn(tensors.latents.shape, generator=generator_for(f"validation:{entry.latents}:{draw_index}"))
        return Sample(Visit(entry, 0, 0), tensors, Draw(noise, sigma, drop_caption=False))


@contextmanager
def _evaluating(transformer: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode: LoRA's dropout would draw from the global generator."""
    training = transformer.training
    transformer.eval()
    try:
        yield
    finally:
        transformer.train(training)
