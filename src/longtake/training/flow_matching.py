"""Flow matching: draws that are functions of (seed, epoch, sample), noisy latents, the velocity and its loss.

x_t = (1 - sigma) x_0 + sigma noise, velocity = noise - x_0 (Lipman et al. 2023, arXiv:2210.02747; rectified flow, Liu
et al. 2022, arXiv:2209.03003).
"""

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from longtake.config.schema import TrainingConfig


@dataclass(frozen=True)
class Draw:
    """The random part of one sample: `noise` like the latents (fp32), `sigma` in (0, 1), is its caption dropped."""

    noise: Tensor
    sigma: float
    drop_caption: bool


def draw(
    key: str, shape: tuple[int, ...], training: TrainingConfig, caption_dropout: float, sigma_range: tuple[float, float]
) -> Draw:
    """The draw of the sample visit called `key`, the same at every call on every rank.

    sigma lies in `sigma_range` (one expert's share of (0, 1)): the uniform variate is mapped through the range's
    quantiles, so the distribution inside the range keeps its shape.
    """
    generator = generator_for(f"{training.seed}:{key}")
    uniform, caption = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
    low, high = (quantile_of(sigma, training) for sigma in sigma_range)
    sigma = sigma_at(low + (high - low) * uniform, training)
    return Draw(torch.randn(shape, generator=generator), sigma, caption < caption_dropout)


def generator_for(key: str) -> torch.Generator:
    """A CPU generator whose state depends on `key` alone."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big", signed=False) >> 1
    return torch.Generator().manual_seed(seed)


def sigma_at(quantile: float, training: TrainingConfig) -> float:
    """sigma at a quantile in (0, 1) of its distribution: shift u / (1 + (shift - 1) u).

    u is uniform, or logit-normal(0, 1): the logistic function of a normal variate (Esser et al. 2024, arXiv:2403.03206,
    eq. 19 and, for the shift, eq. 23).
    """
    quantile = min(max(quantile, 1e-7), 1 - 1e-7)
    u = quantile
    if training.sigmas == "logit_normal":
        normal = math.sqrt(2) * torch.erfinv(torch.tensor(2 * quantile - 1, dtype=torch.float64)).item()
        u = 1 / (1 + math.exp(-normal))
    return training.shift * u / (1 + (training.shift - 1) * u)


def quantile_of(sigma: float, training: TrainingConfig) -> float:
    """Inverse of `sigma_at`; 0 and 1 map to themselves."""
    if sigma <= 0 or sigma >= 1:
        return min(max(sigma, 0.0), 1.0)
    u = sigma / (training.shift - (training.shift - 1) * sigma)
    if training.sigmas == "uniform":
        return u
    return 0.5 * (1 + math.erf(math.log(u / (1 - u)) / math.sqrt(2)))


def add_noise(latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x_t [batch, channels, frames, height, width] in fp32, for `sigma` [batch]."""
    weight = sigma.view(-1, 1, 1, 1, 1)
    return (1 - weight) * latents + weight * noise


def velocity_loss(predicted: Tensor, latents: Tensor, noise: Tensor, weights: Tensor, mask: Tensor | None) -> Tensor:
    """Sum over the batch of each sample's weighted mean squared error against noise - x_0, in fp32.

    `weights` is [batch]; `mask`, which broadcasts to the latents, is 0 where the loss is dropped.
    """
    error = (predicted.float() - (noise - latents)).square()
    if mask is None:
        return (error.flatten(1).mean(1) * weights).sum()
    kept = mask.expand_as(error)
    return ((error * kept).flatten(1).sum(1) / kept.flatten(1).sum(1) * weights).sum()


def loss_weight(sigma: float, training: TrainingConfig) -> float:
    """1, or a bell over sigma of mean 1 on [0, 1]: exp(-2 (2 sigma - 1)^2) over its mean."""
    if training.loss_weighting == "none":
        return 1.0
    mean = math.sqrt(math.pi / 2) * math.erf(math.sqrt(2)) / 2
    return math.exp(-2 * (2 * sigma - 1) ** 2) / mean
