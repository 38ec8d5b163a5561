"""From the samples of a step to the tensors of a micro-batch on the device, and their loss."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longtake.config.schema import TrainingConfig
from longtake.models.spec import ModelSpec
from longtake.models.wan.conditioning import Conditioning, dit_inputs, loss_mask, pad_prompt
from longtake.training.flow_matching import add_noise, loss_weight, velocity_loss
from longtake.training.samples import Sample


@dataclass(frozen=True)
class Batch:
    """A micro-batch: `latents`, `noise` [batch, channels, frames, height, width], `sigma`, `weights` [batch], fp32."""

    latents: Tensor
    noise: Tensor
    sigma: Tensor
    weights: Tensor
    conditioning: Conditioning

    @property
    def size(self) -> int:
        """Samples in it."""
        return len(self.latents)


def collate(samples: Sequence[Sample], spec: ModelSpec, training: TrainingConfig, device: torch.device) -> Batch:
    """One micro-batch of samples of one bucket on `device`."""

    def stack(tensors: Sequence[Tensor | None]) -> Tensor | None:
        present = [tensor for tensor in tensors if tensor is not None]
        return torch.stack(present).to(device) if present else None

    latents = torch.stack([sample.tensors.latents for sample in samples])
    prompts = [s.tensors.empty_embeds if s.draw.drop_caption else s.tensors.prompt_embeds for s in samples]
    conditioning = Conditioning(
        prompt_embeds=torch.stack([pad_prompt(prompt, spec.text_tokens) for prompt in prompts]).to(device),
        image_embeds=stack([sample.tensors.image_embeds for sample in samples]),
        condition=stack([sample.tensors.condition for sample in samples]),
        first_latents=latents[:, :, :1].to(device) if _clean_first_frame(spec, latents) else None,
    )
    sigmas = [sample.draw.sigma for sample in samples]
    return Batch(
        latents.to(device),
        torch.stack([sample.draw.noise for sample in samples]).to(device),
        torch.tensor(sigmas, dtype=torch.float32, device=device),
        torch.tensor([loss_weight(sigma, training) for sigma in sigmas], dtype=torch.float32, device=device),
        conditioning,
    )


def summed_loss(transformer: torch.nn.Module, spec: ModelSpec, batch: Batch) -> Tensor:
    """Sum over the micro-batch of each sample's flow-matching loss, fp32; the caller divides by the global batch."""
    noisy = add_noise(batch.latents, batch.noise, batch.sigma)
    inputs = dit_inputs(spec, noisy, batch.sigma, batch.conditioning)
    predicted = transformer(**inputs, return_dict=False)[0]
    mask = loss_mask(spec, batch.conditioning, batch.latents)
    return velocity_loss(predicted, batch.latents, batch.noise, batch.weights, mask)


def _clean_first_frame(spec: ModelSpec, latents: Tensor) -> bool:
    """A ti2v model is trained from its first frame; a still has no frame left to predict from it."""
    return spec.task == "ti2v" and latents.shape[2] > 1
