"""Blocks in slices: the plain model's loss and gradients up to the order of sums, and memory that slices hold down."""

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longtake.config.schema import LoraConfig
from longtake.memory.host_buffers import Keep, Kept, keep_on_device
from longtake.memory.slices import slices
from longtake.models.wan.variants import variant
from longtake.training.precision import compute_in
from tiny_steps import MODELS, TOKENS, Gradients, Loaded, farthest, gradients_of, load, loss_of, step

LORA = LoraConfig(rank=2)
CUTS = {
    "one slice, groups of heads": (1, 2, False),
    "two slices": (2, 1, False),
    "three slices, attention kept": (3, 1, True),
    "uneven slices and groups": (4, 3, False),
    "uneven slices and groups, attention kept": (5, 4, True),
    "seven slices, each head alone": (7, 5, False),
}


class Keeper:
    """Keeps copies, as if they lay elsewhere, and counts those that are there."""

    def __init__(self) -> None:
        self.kept: list[tuple[int, torch.Size]] = []
        self.alive = 0

    def keep_for(self, index: int) -> Keep:
        """For one block."""

        def keep(tensor: Tensor) -> Kept:
            self.kept.append((index, tensor.shape))
            away = tensor.clone()
            self.alive += 1
            weakref.finalize(away, self._gone)
            return lambda: away

        return keep

    def _gone(self) -> None:
        self.alive -= 1


@contextmanager
def sliced(
    model: Any,
    cut: tuple[int, int, bool] = (4, 3, False),
    name: str = "tiny-t2v",
    keep_for: Callable[[int], Keep] = lambda _: keep_on_device,
) -> Iterator[None]:
    """Slices, groups of heads, and whether attention's output is kept."""
    count, groups, keep_attention = cut
    with slices(model.blocks, variant(name).spec.stages(), count, groups, keep_for, keep_attention):
        yield


def _split(gradients: Gradients) -> tuple[Gradients, Gradients]:
    """Those of keys' biases apart.

    What is added to all keys alike hardly changes a softmax over them: this gradient is what cancellation leaves, and
    differs between two of the plain model's own kernels by 5e-6 already.
    """
    apart = {name: gradient for name, gradient in gradients.items() if name.endswith("to_k.bias")}
    return {name: gradient for name, gradient in gradients.items() if name not in apart}, apart


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_the_plain_model(loaded: Loaded, name: str, lora: LoraConfig | None) -> None:
    model = loaded(name, lora)
    loss, gradients = step(model, name)
    for label, cut in CUTS.items():
        with sliced(model, cut, name, Keeper().keep_for):
            other_loss, other_gradients = step(model, name)
        torch.testing.assert_close(other_loss, loss, rtol=1e-5, atol=0, msg=label)
        (other, other_cancelled), (plain, cancelled) = map(_split, (other_gradients, gradients))
        assert farthest(other, plain) < 5e-6, label
        assert not cancelled or farthest(other_cancelled, cancelled) < 5e-5, label


def test_more_slices_than_tokens_and_more_groups_than_heads_are_one_each(loaded: Loaded) -> None:
    model = loaded("tiny-t2v", None)
    loss, gradients = step(model, "tiny-t2v")
    with sliced(model, (TOKENS, 5, True)):
        each_loss, each = step(model, "tiny-t2v")
    # Sums of single tokens round more: with 18 of them 1.0e-5 for the keys' bias in cross-attention, a difference of
    # large numbers for which the plain model is 0.6e-5 away from fp64.
    assert farthest(each, gradients) < 2e-5
    with sliced(model, (100, 9, True)):
        other_loss, other = step(model, "tiny-t2v")
    torch.testing.assert_close(other_loss, loss, rtol=1e-5, atol=0)
    assert torch.equal(other_loss, each_loss)
    assert all(torch.equal(other[key], gradient) for key, gradient in each.items())


def test_attention_that_is_kept_gives_the_gradients_of_attention_that_is_not(loaded: Loaded) -> None:
    model, found = loaded("tiny-i2v", LORA), []
    for keep_attention in (True, False):
        with sliced(model, (3, 2, keep_attention), "tiny-i2v"):
            found.append(step(model, "tiny-i2v")[1])
    assert all(torch.equal(gradient, found[1][key]) for key, gradient in found[0].items())


@pytest.mark.parametrize("targets", [("ffn",), ("attn1.to_q",), ("attn2.to_v", "ffn.net.2")], ids=str)
def test_weights_that_only_one_stage_has_get_their_gradients(
    tiny_root: Callable[[str], Path], targets: tuple[str, ...]
) -> None:
    model = load(tiny_root("tiny-t2v"), "tiny-t2v", LoraConfig(rank=2, targets=targets))
    _, gradients = step(model, "tiny-t2v")
    with sliced(model):
        assert farthest(step(model, "tiny-t2v")[1], gradients) < 1e-5


@pytest.mark.parametrize("backward_inside", [True, False], ids=["inside", "outside"])
@pytest.mark.parametrize("name", ["tiny-i2v", "tiny-ti2v"])
def test_under_autocast_the_block_is_cast_in_backward_as_in_forward(
    tiny_root: Callable[[str], Path], name: str, backward_inside: bool
) -> None:
    model, found = load(tiny_root(name), name, LORA, torch.bfloat16), []
    for strategy in (nullcontext(), sliced(model, (4, 3, True), name)):
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=backward_inside)
        with strategy, compute_in(model, variant(name).spec, "bf16", torch.device("cpu")), autocast:
            found.append(step(model, name))
    (loss, gradients), (other_loss, other_gradients) = found
    torch.testing.assert_close(other_loss, loss, rtol=1e-3, atol=0)
    assert farthest(other_gradients, gradients) < 0.05  # bf16 has 8 bits, and each of 4 blocks rounds again


def test_without_gradients_nothing_is_kept_and_the_output_is_the_same(loaded: Loaded) -> None:
    model, keeper = loaded("tiny-t2v", LORA), Keeper()
    with torch.no_grad():
        expected = loss_of(model, "tiny-t2v")
        with sliced(model, keep_for=keeper.keep_for):
            torch.testing.assert_close(loss_of(model, "tiny-t2v"), expected, rtol=1e-5, atol=0)
    frozen = loaded("tiny-t2v", LORA)
    wanted = [parameter for parameter in frozen.parameters() if parameter.requires_grad]
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        with sliced(frozen, keep_for=keeper.keep_for):
            assert not loss_of(frozen, "tiny-t2v").requires_grad
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
    assert not keeper.kept


@pytest.mark.parametrize("keep_attention", [True, False])
def test_a_block_keeps_its_input_and_attentions_output_if_asked_and_neither_after_backward(
    loaded: Loaded, keep_attention: bool
) -> None:
    model, keeper, dim = loaded("tiny-t2v", LORA), Keeper(), 160
    with sliced(model, (3, 2, keep_attention), keep_for=keeper.keep_for):
        loss = loss_of(model, "tiny-t2v")
        shapes = [(2, TOKENS, dim), *([(2, 5, TOKENS, 32), (2, 5, TOKENS)] if keep_attention else [])]
        assert keeper.kept == [(index, shape) for index in range(4) for shape in shapes]
        assert keeper.alive == len(keeper.kept)
        loss.backward(retain_graph=True)
        assert keeper.alive == 0, "although the loss still has its graph"
        with pytest.raises(AssertionError, match="differentiated once"):
            loss.backward()
        del loss
        loss_of(model, "tiny-t2v")
        gc.collect()
        assert keeper.alive == 0, "although there was no backward pass"


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["in order", "reversed"])
def test_two_forward_passes_before_their_backward_passes_do_not_mix(loaded: Loaded, order: tuple[int, int]) -> None:
    model = loaded("tiny-t2v", LORA)
    expected = [gradients_of(model, loss_of(model, "tiny-t2v", seed).backward) for seed in (5, 6)]
    with sliced(model, (3, 2, True), keep_for=Keeper().keep_for):
        losses = [loss_of(model, "tiny-t2v", seed) for seed in (5, 6)]
        for which in order:
            assert farthest(gradients_of(model, losses[which].backward), expected[which]) < 1e-5


def test_hooks_on_trained_weights_see_the_whole_gradient_once(loaded: Loaded) -> None:
    model, seen = loaded("tiny-t2v", LORA), []
    weight = next(p for key, p in model.named_parameters() if "lora_B" in key)
    hook = weight.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad.clone()))
    try:
        with sliced(model):
            step(model, "tiny-t2v")
    finally:
        hook.remove()
    assert len(seen) == 1
    assert torch.equal(seen[0], weight.grad)


def test_the_gradient_that_comes_in_is_left_as_it_is(loaded: Loaded) -> None:
    model = loaded("tiny-t2v", None)
    block, given = model.blocks[1], []
    hook = block.register_forward_pre_hook(lambda _, arguments: given.append(arguments))
    loss_of(model, "tiny-t2v")
    hook.remove()
    hidden_states, *shared = (_detached(argument) for argument in given[0])
    gradient = torch.randn_like(hidden_states)
    before = gradient.clone()
    with sliced(model):
        block(hidden_states, *shared).backward(gradient)
    assert torch.equal(gradient, before)


def test_it_is_gone_afterwards_even_after_a_failure(loaded: Loaded) -> None:
    model = loaded("tiny-t2v", LORA)

    def fail_inside() -> None:
        with sliced(model):
            assert "forward" in vars(model.blocks[0])
            raise ValueError

    with pytest.raises(ValueError):
        fail_inside()
    assert not any("forward" in vars(block) for block in model.blocks)


class Peak(TorchDispatchMode):
    """Bytes of all storages that operators made and that are alive, at their highest."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in self.alive:
                storage = leaf.untyped_storage()
                self.alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, storage._cdata)
        self.bytes = max(self.bytes, sum(self.alive.values()))
        return result


@pytest.mark.parametrize("keep_attention", [True, False], ids=["attention kept", "attention again"])
def test_memory_grows_by_at_most_130_kilobytes_a_token_of_the_14b_model(keep_attention: bool) -> None:
    peaks = [_peak_of_a_block(frames, keep_attention) for frames in (5, 9)]
    assert (peaks[1] - peaks[0]) / (4 * 390) < 0.13e6


def _peak_of_a_block(frames: int, keep_attention: bool) -> int:
    """Of the forward and backward pass of one block of 390 tokens a frame, whose input is kept, on `meta`, in bf16."""
    entry = variant("wan2.1-i2v-14b-480p")
    with torch.device("meta"):
        model = WanTransformer3DModel(**(entry.transformer_config | {"num_layers": 1})).bfloat16()
        model.requires_grad_(False)
        tokens = frames * 390
        hidden_states = torch.empty(1, tokens, 5120, dtype=torch.bfloat16, requires_grad=True)
        text, temb = torch.empty(1, 769, 5120, dtype=torch.bfloat16), torch.empty(1, 6, 5120)
        tables = (torch.empty(1, tokens, 1, 128), torch.empty(1, tokens, 1, 128))
    with sliced(model, (16, 4, keep_attention), entry.name), Peak() as peak:
        output = model.blocks[0](hidden_states, text, temb, tables)
        (gradient,) = torch.autograd.grad(output, hidden_states, torch.empty_like(output))
        assert gradient.shape == output.shape
    return peak.bytes


def _detached(argument: Any) -> Any:
    return argument.detach().requires_grad_() if isinstance(argument, Tensor) else argument
