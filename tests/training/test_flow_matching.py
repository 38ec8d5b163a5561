"""The objective: draws, distributions of sigma, noisy latents, the loss and its weights."""

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch

from longtake.config.schema import TrainingConfig
from longtake.training.flow_matching import (
    add_noise,
    draw,
    loss_weight,
    quantile_of,
    sigma_at,
    velocity_loss,
)

DRAWS = 3000
WHOLE = (0.0, 1.0)
SETTINGS = [
    TrainingConfig(sigmas=sigmas, shift=shift) for sigmas in ("uniform", "logit_normal") for shift in (1.0, 3.0, 5.0)
]


def drawn(training: TrainingConfig, sigma_range: tuple[float, float] = WHOLE) -> np.ndarray:
    """Sorted sigmas of many visits."""
    return np.sort([draw(f"0:0:{i}", (1,), training, 0.0, sigma_range).sigma for i in range(DRAWS)])


def expected(training: TrainingConfig, quantiles: np.ndarray) -> np.ndarray:
    """sigma at `quantiles`, written down again without the code under test."""
    u = quantiles
    if training.sigmas == "logit_normal":
        u = np.array([1 / (1 + math.exp(-NormalDist().inv_cdf(q))) for q in quantiles])
    return training.shift * u / (1 + (training.shift - 1) * u)


def test_a_draw_is_a_function_of_seed_and_visit() -> None:
    training = TrainingConfig(seed=3)
    one = draw("0:1:clip", (16, 2, 4, 4), training, 0.5, WHOLE)
    draw("0:1:other", (16, 2, 4, 4), training, 0.5, WHOLE)
    again = draw("0:1:clip", (16, 2, 4, 4), training, 0.5, WHOLE)
    assert torch.equal(one.noise, again.noise)
    assert (one.sigma, one.drop_caption) == (again.sigma, again.drop_caption)


@pytest.mark.parametrize(("key", "seed"), [("0:2:clip", 3), ("1:1:clip", 3), ("0:1:other", 3), ("0:1:clip", 4)])
def test_another_epoch_stage_clip_or_seed_draws_otherwise(key: str, seed: int) -> None:
    one = draw("0:1:clip", (16, 2, 4, 4), TrainingConfig(seed=3), 0.0, WHOLE)
    other = draw(key, (16, 2, 4, 4), TrainingConfig(seed=seed), 0.0, WHOLE)
    assert not torch.equal(one.noise, other.noise)
    assert one.sigma != other.sigma


def test_a_draw_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    draw("0:0:clip", (4,), TrainingConfig(), 0.1, WHOLE)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_noise_is_standard_normal_in_fp32() -> None:
    noise = draw("0:0:clip", (16, 8, 32, 32), TrainingConfig(), 0.0, WHOLE).noise
    assert noise.dtype == torch.float32
    deviation = 1 / math.sqrt(noise.numel())
    assert abs(float(noise.mean())) < 5 * deviation
    assert abs(float(noise.std()) - 1) < 5 * deviation


@pytest.mark.parametrize("training", SETTINGS, ids=lambda t: f"{t.sigmas}-{t.shift:g}")
def test_sigma_at_is_the_formula_and_quantile_of_its_inverse(training: TrainingConfig) -> None:
    quantiles = np.linspace(0.001, 0.999, 97)
    sigmas = [sigma_at(quantile, training) for quantile in quantiles]
    np.testing.assert_allclose(sigmas, expected(training, quantiles), rtol=1e-9)
    np.testing.assert_allclose([quantile_of(sigma, training) for sigma in sigmas], quantiles, rtol=0, atol=1e-9)
    assert [quantile_of(edge, training) for edge in (0.0, 1.0)] == [0.0, 1.0]
    assert all(0 < sigma_at(edge, training) < 1 for edge in (0.0, 1.0))


@pytest.mark.parametrize("training", SETTINGS, ids=lambda t: f"{t.sigmas}-{t.shift:g}")
def test_drawn_sigmas_follow_their_distribution(training: TrainingConfig) -> None:
    middle = (np.arange(DRAWS) + 0.5) / DRAWS
    reached = np.array([quantile_of(float(sigma), training) for sigma in drawn(training)])
    # Kolmogorov's statistic stays below 1.95 / sqrt(n) in 999 of 1000 samples of the right distribution
    assert np.abs(reached - middle).max() < 1.95 / math.sqrt(DRAWS)
    wanted = expected(training, middle)
    assert abs(drawn(training).mean() - wanted.mean()) < 4 * wanted.std() / math.sqrt(DRAWS)


@pytest.mark.parametrize("sigma_range", [(0.875, 1.0), (0.0, 0.875), (0.9, 1.0), (0.0, 0.9)])
@pytest.mark.parametrize("training", SETTINGS[1::3], ids=lambda t: t.sigmas)
def test_an_expert_gets_its_share_of_sigma_in_the_same_proportions(
    training: TrainingConfig, sigma_range: tuple[float, float]
) -> None:
    low, high = sigma_range
    sigmas = drawn(training, sigma_range)
    assert low <= sigmas.min()
    assert sigmas.max() <= high
    first, last = quantile_of(low, training), quantile_of(high, training)
    reached = (np.array([quantile_of(float(sigma), training) for sigma in sigmas]) - first) / (last - first)
    assert np.abs(reached - (np.arange(DRAWS) + 0.5) / DRAWS).max() < 1.95 / math.sqrt(DRAWS)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1.0])
def test_captions_are_dropped_at_the_rate_asked_for(rate: float) -> None:
    dropped = sum(draw(f"0:0:{i}", (1,), TrainingConfig(), rate, WHOLE).drop_caption for i in range(DRAWS))
    assert abs(dropped - rate * DRAWS) <= 4 * math.sqrt(rate * (1 - rate) * DRAWS)


def test_whether_a_caption_is_dropped_does_not_depend_on_sigma() -> None:
    draws = [draw(f"0:0:{i}", (1,), TrainingConfig(sigmas="uniform", shift=1), 0.5, WHOLE) for i in range(DRAWS)]
    means = [np.mean([d.sigma for d in draws if d.drop_caption is dropped]) for dropped in (True, False)]
    assert abs(means[0] - means[1]) < 4 * math.sqrt(1 / 12 / DRAWS * 4)


def test_noisy_latents_run_from_the_clip_to_the_noise_along_the_velocity() -> None:
    latents, noise = torch.randn(3, 4, 2, 3, 3), torch.randn(3, 4, 2, 3, 3)
    sigma = torch.tensor([0.0, 0.25, 1.0])
    noisy = add_noise(latents, noise, sigma)
    assert torch.equal(noisy[0], latents[0])
    assert torch.equal(noisy[2], noise[2])
    torch.testing.assert_close(noisy - sigma.view(-1, 1, 1, 1, 1) * (noise - latents), latents)


def test_the_loss_is_the_weighted_mean_square_of_each_sample_summed_in_fp32() -> None:
    latents, noise, wrong = (torch.randn(2, 4, 3, 2, 2) for _ in range(3))
    weights = torch.tensor([1.0, 0.5])
    predicted = (noise - latents + wrong).bfloat16()
    loss = velocity_loss(predicted, latents, noise, weights, None)
    error = predicted.double() - (noise - latents).double()
    expected_loss = (error.square().mean(dim=(1, 2, 3, 4)) * weights).sum()
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-6)
    assert float(velocity_loss(noise - latents, latents, noise, weights, None)) == 0.0


def test_what_is_masked_neither_counts_nor_dilutes() -> None:
    latents, noise, predicted = (torch.randn(2, 4, 3, 2, 2) for _ in range(3))
    mask = torch.ones(1, 1, 3, 1, 1)
    mask[:, :, 0] = 0
    masked = velocity_loss(predicted, latents, noise, torch.ones(2), mask)
    rest = velocity_loss(predicted[:, :, 1:], latents[:, :, 1:], noise[:, :, 1:], torch.ones(2), None)
    torch.testing.assert_close(masked, rest)


def test_the_bell_has_mean_one_and_its_top_in_the_middle() -> None:
    bell = TrainingConfig(loss_weighting="bell")
    weights = [loss_weight(sigma, bell) for sigma in (np.arange(10_000) + 0.5) / 10_000]
    assert np.mean(weights) == pytest.approx(1, abs=1e-6)
    assert max(weights) == pytest.approx(loss_weight(0.5, bell))
    assert loss_weight(0.2, bell) == pytest.approx(loss_weight(0.8, bell))
    assert loss_weight(0.0, bell) < 0.3 < loss_weight(0.5, bell)
    assert {loss_weight(sigma, TrainingConfig()) for sigma in (0.0, 0.3, 1.0)} == {1.0}
