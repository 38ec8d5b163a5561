"""Noise levels, timesteps, masks and weights against float64 code of the tests' own, on inputs that are new each time.

Where something is counted, the bound fails a right distribution in one of 10^12 runs (Dvoretzky, Kiefer and Wolfowitz
1956 with Massart's constant: P(sup |F_n - F| > e) <= 2 exp(-2 n e^2)).
"""

import math

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from hypothesis import given, settings
from hypothesis import strategies as some

import float64_objective
from longtake.config.schema import TrainingConfig
from longtake.models.wan.conditioning import Conditioning, dit_inputs, image_mask
from longtake.models.wan.variants import VARIANTS, variant
from longtake.training.flow_matching import draw, loss_weight, quantile_of, sigma_at

DRAWS = 2000
BOUND = math.sqrt(math.log(2e12) / (2 * DRAWS))
BOUNDARIES = {"tiny-t2v-a14b": 0.875, "tiny-i2v-a14b": 0.9, "wan2.2-t2v-a14b": 0.875, "wan2.2-i2v-a14b": 0.9}
KINDS = ("uniform", "logit_normal")
SHIFTS = (1.0, 3.0, 5.0)

kinds = some.sampled_from(KINDS)
shifts = some.floats(0.2, 20)
shares = some.floats(1e-6, 1 - 1e-6)


def drawn(training: TrainingConfig, sigma_range: tuple[float, float], seed: int) -> np.ndarray:
    """Sorted sigmas of visits that no other seed has."""
    return np.sort([draw(f"{seed}:{index}", (1,), training, 0.0, sigma_range).sigma for index in range(DRAWS)])


def distance(sigmas: np.ndarray, training: TrainingConfig, sigma_range: tuple[float, float]) -> float:
    """The greatest between the share of `sigmas` below a level and the share that the distribution has there."""
    below = lambda sigma: float64_objective.share_below(float(sigma), training.sigmas, training.shift)  # noqa: E731
    low, high = (below(edge) for edge in sigma_range)
    reached = (np.array([below(sigma) for sigma in sigmas]) - low) / (high - low)
    steps = np.arange(len(sigmas))
    return float(max(np.abs(reached - (steps + edge) / len(sigmas)).max() for edge in (0, 1)))


@settings(deadline=None)
@given(share=shares, sigmas=kinds, shift=shifts)
def test_sigma_at_a_share_of_the_distribution_is_the_formula(share: float, sigmas: str, shift: float) -> None:
    training = TrainingConfig(sigmas=sigmas, shift=shift)
    sigma = sigma_at(share, training)
    # the quantile function of the normal distribution in another library: 1e-9 of a deviation
    assert sigma == pytest.approx(float64_objective.sigma_of(share, sigmas, shift), rel=1e-7)
    # a sigma near 1 has 2^-53 left to tell shares of 1 - share from each other, times the density there
    assert quantile_of(sigma, training) == pytest.approx(share, abs=1e-7)
    assert float64_objective.share_below(sigma, sigmas, shift) == pytest.approx(share, abs=1e-7)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("sigmas", KINDS)
def test_sigmas_are_of_their_distribution_whatever_the_seed(seed: int, sigmas: str, shift: float) -> None:
    training = TrainingConfig(sigmas=sigmas, shift=shift)
    assert distance(drawn(training, (0.0, 1.0), seed), training, (0.0, 1.0)) < BOUND
    other = training.model_copy(update={"shift": 2 * shift})
    assert distance(drawn(other, (0.0, 1.0), seed), training, (0.0, 1.0)) > BOUND, "another shift is noticed"


@pytest.mark.parametrize("boundary", [0.875, 0.9])
@pytest.mark.parametrize("sigmas", KINDS)
def test_each_expert_has_the_part_of_the_distribution_on_its_side_of_the_boundary(
    seed: int, sigmas: str, boundary: float
) -> None:
    training = TrainingConfig(sigmas=sigmas)
    for sigma_range in ((boundary, 1.0), (0.0, boundary)):
        found = drawn(training, sigma_range, seed)
        assert sigma_range[0] <= found[0]
        assert found[-1] <= sigma_range[1]
        assert distance(found, training, sigma_range) < BOUND


def test_the_boundaries_are_those_of_the_published_models_and_the_high_noise_expert_is_the_first() -> None:
    found = {name: each.spec for name, each in VARIANTS.items() if len(each.spec.experts) > 1}
    assert {name: spec.boundary_ratio for name, spec in found.items()} == BOUNDARIES
    assert {spec.experts for spec in found.values()} == {("transformer", "transformer_2")}


@settings(deadline=None)
@given(sigma=some.floats(0, 1))
def test_the_bell_is_the_formula_over_its_mean(sigma: float) -> None:
    bell = TrainingConfig(loss_weighting="bell")
    assert loss_weight(sigma, bell) == pytest.approx(float64_objective.bell(sigma), rel=1e-8)


@settings(deadline=None)
@given(steps=some.integers(1, 40), height=some.integers(1, 5), width=some.integers(1, 5), last=some.booleans())
def test_the_mask_is_one_on_the_frames_that_are_given(steps: int, height: int, width: int, last: bool) -> None:
    num_frames = 4 * steps + 1
    found = image_mask(num_frames, (16, steps + 1, height, width), last)
    assert np.array_equal(found.numpy(), float64_objective.mask(num_frames, height, width, last))


@settings(deadline=None)
@given(sigmas=some.lists(some.floats(1e-4, 1), min_size=1, max_size=64))
def test_timesteps_are_a_thousand_sigma_in_fp32_under_every_type_of_the_latents(sigmas: list[float]) -> None:
    spec = variant("tiny-t2v").spec
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        noisy, prompts = torch.zeros(len(sigmas), 16, 1, 2, 2, dtype=dtype), torch.zeros(len(sigmas), 512, 1)
        found = dit_inputs(spec, noisy, torch.tensor(sigmas), Conditioning(prompts))["timestep"]
        assert found.dtype == torch.float32
        # sigma is rounded to fp32, and so is the product
        np.testing.assert_allclose(found.double().numpy(), 1000 * np.array(sigmas), rtol=2**-23)


def test_the_timestep_table_is_that_of_float64_to_the_rounding_of_a_phase(seed: int) -> None:
    sigmas = np.random.default_rng(seed).uniform(0, 1, 1000)
    spec = variant("tiny-t2v").spec
    conditioning = Conditioning(torch.zeros(1000, 512, 1))
    noisy = torch.zeros(1000, 16, 1, 2, 2)
    timesteps = dit_inputs(spec, noisy, torch.tensor(sigmas, dtype=torch.float32), conditioning)["timestep"]
    config = variant("tiny-t2v").transformer_config | {"num_layers": 1}
    table = WanTransformer3DModel(**config).condition_embedder.timesteps_proj
    wanted = float64_objective.sinusoids(1000 * sigmas)
    # phases of up to 1000, rounded to fp32 three times (timestep, frequency, product): each by 1000 * 2^-24 at most
    bound = 3 * 1000 * 2**-24 + 2**-23
    assert np.abs(table(timesteps).double().numpy() - wanted).max() < bound
    assert np.abs(table(timesteps.bfloat16()).double().numpy() - wanted).max() > 100 * bound, "as bf16 would be"
