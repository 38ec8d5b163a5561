"""A clean first frame: its timestep and the others' are embedded once each, and the step is diffusers' per token."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longtake.config.schema import LoraConfig, MemoryStrategy
from longtake.memory.strategy import apply
from longtake.models.wan.conditioning import Conditioning, dit_inputs
from longtake.models.wan.first_and_rest import FirstAndRest, first_and_rest
from longtake.models.wan.variants import variant
from longtake.training.precision import compute_in
from tiny_steps import CPU, Gradients, Loaded, different, farthest, gradients_of, loaded_once

NAME = "tiny-ti2v"
SPEC = variant(NAME).spec
DIM = SPEC.heads * SPEC.head_dim
LORA = LoraConfig(rank=2)
LATENTS = ((3, 4, 4), (5, 6, 10), (2, 2, 2), (4, 2, 2))
STRATEGIES = {
    "block": {},
    "two blocks at a time": {"checkpoint_every": 2},
    "attention kept": {"gradient_checkpointing": "block_keep_attention"},
    "attention kept on the host": {"gradient_checkpointing": "block_keep_attention", "activation_offload": "host"},
    "slices": {"slices": 4},
    "slices, attention kept": {"slices": 5, "gradient_checkpointing": "block_keep_attention"},
}
Found = tuple[Tensor, Gradients]


@pytest.fixture(scope="module")
def loaded(tiny_root: Callable[[str], Path]) -> Loaded:
    return loaded_once(tiny_root)


def inputs(latents: tuple[int, int, int], seed: int = 1) -> dict[str, Tensor]:
    """Two clips with a timestep each, of which the first frame is given."""
    generator = torch.Generator().manual_seed(seed)
    made = lambda *shape: torch.randn(2, *shape, generator=generator)  # noqa: E731
    conditioning = Conditioning(made(512, SPEC.text_dim), first_latents=made(SPEC.latent_channels, 1, *latents[1:]))
    return dit_inputs(SPEC, made(SPEC.latent_channels, *latents), torch.tensor([0.3, 0.8]), conditioning)


def step(model: Any, given: dict[str, Tensor]) -> Found:
    """The velocity, and gradients to which every value of it contributes in its own way."""
    velocity = model(**given, return_dict=False)[0]
    weights = torch.randn(velocity.shape, generator=torch.Generator().manual_seed(2))
    gradients = gradients_of(model, (velocity.float() * weights).sum().backward)
    return velocity.detach(), {name: gradient.clone() for name, gradient in gradients.items()}


def of_timesteps(name: str) -> bool:
    """Whether a weight's gradient is a sum over the tokens that have one timestep."""
    return "scale_shift_table" in name or "condition_embedder.time_" in name


@pytest.mark.parametrize("latents", LATENTS, ids=str)
@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
def test_velocity_and_gradients_are_diffusers_own_to_the_bit_but_for_sums_over_tokens(
    loaded: Loaded, lora: LoraConfig | None, latents: tuple[int, int, int]
) -> None:
    model, given = loaded(NAME, lora), inputs(latents)
    velocity, gradients = step(model, given)
    with first_and_rest(model):
        other_velocity, others = step(model, given)
    assert torch.equal(other_velocity, velocity)
    assert all(of_timesteps(name) for name in different(others, gradients))
    assert lora or any(of_timesteps(name) for name in gradients)
    assert farthest(others, gradients) < 1e-6


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=[*STRATEGIES])
@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
def test_under_every_strategy_the_step_is_that_of_diffusers_alone(
    loaded: Loaded, tmp_path: Path, lora: LoraConfig | None, strategy: dict[str, Any]
) -> None:
    model, given = loaded(NAME, lora), inputs((3, 4, 4))
    velocity, gradients = step(model, given)
    with apply(model, SPEC, MemoryStrategy(**strategy), tmp_path):
        other_velocity, others = step(model, given)
    if "slices" in strategy:
        torch.testing.assert_close(other_velocity, velocity, rtol=1e-4, atol=1e-5)  # products of other shapes
        assert farthest(_without_cancelled(others), _without_cancelled(gradients)) < 1e-5
    else:
        assert torch.equal(other_velocity, velocity)
        assert all(of_timesteps(name) for name in different(others, gradients))
        assert farthest(others, gradients) < 1e-6


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # RMS norms whose weights are trained
@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
def test_in_bf16_it_is_the_same_but_that_gradients_of_timesteps_are_summed_before_they_are_rounded(
    loaded: Loaded, lora: LoraConfig | None
) -> None:
    model, given, found = loaded(NAME, lora), inputs((5, 6, 10)), []
    with compute_in(model, SPEC, "bf16", CPU):
        found.append(step(model, given))
        with first_and_rest(model):
            found.append(step(model, given))
    (velocity, gradients), (other_velocity, others) = found
    assert torch.equal(other_velocity, velocity)
    assert all(of_timesteps(name) for name in different(others, gradients))
    assert farthest(others, gradients) < 2**-7  # diffusers rounds those of each token to the 8 bits of bf16


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["in order", "reversed"])
def test_two_clips_of_other_sizes_wait_for_their_backward_passes_side_by_side(
    loaded: Loaded, tmp_path: Path, order: tuple[int, int]
) -> None:
    model, clips = loaded(NAME, LORA), [inputs(latents) for latents in LATENTS[:2]]
    loss_of = lambda given: model(**given, return_dict=False)[0].square().mean()  # noqa: E731
    expected = [_copied(gradients_of(model, loss_of(given).backward)) for given in clips]
    with apply(model, SPEC, MemoryStrategy(), tmp_path):
        losses = [loss_of(given) for given in clips]
        for which in order:
            assert not different(gradients_of(model, losses[which].backward), expected[which])


def test_timesteps_that_are_all_alike_are_taken_too_as_a_pipeline_without_an_image_gives_them(loaded: Loaded) -> None:
    model, given = loaded(NAME, None), inputs((3, 4, 4))
    given["timestep"] = torch.tensor([300.0, 800.0])[:, None].repeat(1, 12)
    velocity, _ = step(model, given)
    with first_and_rest(model):
        assert torch.equal(step(model, given)[0], velocity)


@pytest.mark.parametrize("name", [NAME, "tiny-i2v"])
def test_one_timestep_a_clip_is_left_as_it_is(loaded: Loaded, name: str) -> None:
    model, spec = loaded(name, None), variant(name).spec
    seen: list[Any] = []
    hook = model.blocks[0].register_forward_pre_hook(lambda _, arguments: seen.append(arguments[2]))
    text = torch.randn(2, 512, spec.text_dim)
    with torch.no_grad(), first_and_rest(model):
        model(torch.randn(2, model.config.in_channels, 3, 4, 4), torch.tensor([300.0, 800.0]), text)
    hook.remove()
    assert isinstance(seen[0], Tensor)
    assert seen[0].shape == (2, 6, DIM)


class Largest(TorchDispatchMode):
    """The most values that a tensor has which an operator makes."""

    values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.values = max([self.values, *(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor))])
        return result


@pytest.mark.parametrize("strategy", [{"gradient_checkpointing": "none"}, {}, {"slices": 3}], ids=str)
def test_no_tensor_has_six_values_of_modulation_for_every_token(
    loaded: Loaded, tmp_path: Path, strategy: dict[str, Any]
) -> None:
    model, given = loaded(NAME, None), inputs((6, 16, 16))
    modulation = given["timestep"].numel() * 6 * DIM
    with Largest() as largest:
        step(model, given)
    assert largest.values == modulation, "diffusers' own, which this test would see"
    with apply(model, SPEC, MemoryStrategy(**strategy), tmp_path), Largest() as largest:
        step(model, given)
    assert largest.values < modulation


@pytest.mark.parametrize("latents", LATENTS, ids=str)
def test_inside_of_itself_it_changes_nothing_more_and_nothing_is_left_of_it(
    loaded: Loaded, latents: tuple[int, int, int]
) -> None:
    model, given = loaded(NAME, LORA), inputs(latents)
    before = [*_hooks(model)]
    velocity, gradients = step(model, given)
    with first_and_rest(model), first_and_rest(model):
        other_velocity, others = step(model, given)
    assert torch.equal(other_velocity, velocity)
    assert not different(others, gradients)

    def fail_inside() -> None:
        with first_and_rest(model):
            assert [*_hooks(model)] != before
            raise ValueError

    with pytest.raises(ValueError):
        fail_inside()
    assert [*_hooks(model)] == before


@pytest.mark.parametrize("first", [0, 1, 3, 4, 6, 7, 12])
def test_it_does_to_a_hidden_state_what_a_row_for_each_token_does(first: int) -> None:
    rows, table = torch.randn(2, 2, 6, 4), torch.randn(1, 6, 4)
    stands_for = torch.cat([rows[:, :1].expand(-1, first, -1, -1), rows[:, 1:].expand(-1, 12 - first, -1, -1)], dim=1)
    short = FirstAndRest(rows, first, 12)
    hidden_states = torch.randn(2, 12, 4)
    for tokens in (slice(0, 12), slice(0, 1), slice(0, 5), slice(2, 9), slice(4, 12), slice(11, 12)):
        part, results = hidden_states[:, tokens], []
        for temb in (stands_for[:, tokens], short.of(tokens)):
            shift, scale, gate, *_ = (each.squeeze(2) for each in (table + temb.float()).chunk(6, dim=2))
            results.append((part * (1 + scale) + shift) * gate)
        assert torch.equal(*results)


def _without_cancelled(gradients: Gradients) -> Gradients:
    """Without keys' biases, which are what cancellation leaves of sums."""
    return {name: gradient for name, gradient in gradients.items() if not name.endswith("to_k.bias")}


def _copied(gradients: Gradients) -> Gradients:
    return {name: gradient.clone() for name, gradient in gradients.items()}


def _hooks(model: nn.Module) -> Iterator[tuple[int, ...]]:
    for module in model.modules():
        yield (*module._forward_hooks, *module._forward_pre_hooks)
