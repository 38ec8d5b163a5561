"""Attention that keeps its output: gradients to the bit, one kernel call a block, and whose is what is kept."""

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from longtake.config.schema import LoraConfig
from longtake.errors import RunError
from longtake.memory.gradient_checkpointing import gradient_checkpointing
from longtake.memory.host_buffers import Kept, keep_on_device
from longtake.memory.keep_attention import keep_attention
from longtake.models.wan.variants import variant
from longtake.training.precision import compute_in
from tiny_steps import MODELS, TOKENS, Loaded, different, gradients_of, load, loss_of, step

LORA = LoraConfig(rank=2, dropout=0.2)


class Keeper:
    """Keeps copies, as if they lay elsewhere, and counts what is there."""

    def __init__(self) -> None:
        self.blocks: list[int] = []
        self.given: list[Tensor] = []
        self.handed_in: list[weakref.ref[Any]] = []
        self.alive = 0

    def keep_for(self, index: int) -> Callable[[Tensor], Kept]:
        """For one block."""

        def keep(tensor: Tensor) -> Kept:
            self.blocks.append(index)
            self.given.append(tensor.to("meta"))
            self.handed_in.append(weakref.ref(tensor.untyped_storage()))
            away = tensor.clone()
            self.alive += 1
            weakref.finalize(away, self._gone)
            return lambda: away

        return keep

    def _gone(self) -> None:
        self.alive -= 1


@contextmanager
def keeping(model: Any, keep_for: Callable[[int], Any] = lambda _: keep_on_device, every: int = 1) -> Iterator[None]:
    """Checkpointing that keeps attention's output."""
    with (
        keep_attention(model.blocks, "attn1", keep_for) as contexts,
        gradient_checkpointing(model, model.blocks, every, lambda _: keep_on_device, contexts),
    ):
        yield


class Kernels(TorchDispatchMode):
    """Counts attention's kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_the_plain_model_to_the_bit(
    loaded: Loaded, name: str, lora: LoraConfig | None
) -> None:
    model = loaded(name, lora)
    loss, gradients = step(model, name)
    for every in (1, 3):
        with keeping(model, every=every):
            other_loss, other_gradients = step(model, name)
        assert torch.equal(other_loss, loss)
        assert not different(other_gradients, gradients)
    keeper = Keeper()
    with keeping(model, keeper.keep_for):
        assert not different(step(model, name)[1], gradients)


@pytest.mark.parametrize("every", [1, 2])
def test_under_autocast_they_are_the_plain_models_too(tiny_root: Callable[[str], Path], every: int) -> None:
    name = "tiny-i2v"
    model = load(tiny_root(name), name, LORA, torch.bfloat16)
    found = []
    for strategy in (nullcontext(), keeping(model, every=every)):
        with strategy, compute_in(model, variant(name).spec, "bf16", torch.device("cpu")):
            found.append(step(model, name))
    (loss, gradients), (other_loss, other_gradients) = found
    assert torch.equal(other_loss, loss)
    assert not different(other_gradients, gradients)


def test_the_kernel_of_self_attention_runs_once_and_that_of_cross_attention_again(loaded: Loaded) -> None:
    model, calls = loaded("tiny-t2v", LORA), []
    plain = gradient_checkpointing(model, model.blocks, 1, lambda _: keep_on_device, None)
    for strategy in (plain, keeping(model)):
        with strategy:
            loss = loss_of(model, "tiny-t2v")
            with Kernels() as kernels:
                loss.backward()
        calls.append(kernels.calls)
    assert calls == [8, 4]


def test_output_and_logsumexp_of_every_block_are_kept_and_gone_after_backward(loaded: Loaded) -> None:
    model, keeper = loaded("tiny-t2v", LORA), Keeper()
    with keeping(model, keeper.keep_for):
        loss = loss_of(model, "tiny-t2v")
        assert keeper.blocks == [0, 0, 1, 1, 2, 2, 3, 3]
        assert [tuple(tensor.shape) for tensor in keeper.given] == [(2, 5, TOKENS, 32), (2, 5, TOKENS)] * 4
        assert keeper.alive == 8
        assert not any(storage() for storage in keeper.handed_in), "only the keeper has them"
        loss.backward()
        assert keeper.alive == 0, "although the loss still has its graph"


def test_a_forward_pass_without_backward_leaves_nothing(loaded: Loaded) -> None:
    model, keeper = loaded("tiny-t2v", LORA), Keeper()
    with keeping(model, keeper.keep_for):
        loss = loss_of(model, "tiny-t2v")
        assert keeper.alive == 8
        del loss
        assert keeper.alive == 0


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["in order", "reversed"])
def test_two_forward_passes_before_their_backward_passes_do_not_mix(loaded: Loaded, order: tuple[int, int]) -> None:
    model = loaded("tiny-t2v", LORA)
    expected = [gradients_of(model, loss_of(model, "tiny-t2v", seed).backward) for seed in (5, 6)]
    with keeping(model, Keeper().keep_for):
        losses = [loss_of(model, "tiny-t2v", seed) for seed in (5, 6)]
        for which in order:
            assert not different(gradients_of(model, losses[which].backward), expected[which])


def test_a_graph_that_is_retained_can_be_differentiated_again(loaded: Loaded) -> None:
    model, keeper = loaded("tiny-t2v", LORA), Keeper()
    _, expected = step(model, "tiny-t2v")
    with keeping(model, keeper.keep_for):
        loss = loss_of(model, "tiny-t2v")
        for retain in (True, False):
            gradients = gradients_of(model, lambda retain=retain: loss.backward(retain_graph=retain))
            assert not different(gradients, expected)


def test_nothing_is_kept_without_gradients_or_checkpointing(loaded: Loaded) -> None:
    model, keeper = loaded("tiny-t2v", LORA), Keeper()
    with keeping(model, keeper.keep_for), torch.no_grad():
        loss_of(model, "tiny-t2v")
    with keep_attention(model.blocks, "attn1", keeper.keep_for):
        loss_of(model, "tiny-t2v").backward()
    assert not keeper.blocks


def test_it_is_gone_afterwards_even_after_a_failure(loaded: Loaded) -> None:
    model = loaded("tiny-t2v", LORA)

    def fail_inside() -> None:
        with keeping(model):
            assert "forward" in vars(model.blocks[0].attn1)
            raise ValueError

    with pytest.raises(ValueError):
        fail_inside()
    assert not any("forward" in vars(block.attn1) for block in model.blocks)


class Attention(nn.Module):
    """An attention of another kind than those that can be kept."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, rows: Tensor) -> Tensor:
        """[batch, heads, tokens, head_dim]"""
        if self.kind == "hand-made":
            return (rows @ rows.transpose(2, 3)).softmax(-1) @ rows
        return functional.scaled_dot_product_attention(rows, rows, rows, scale=0.5)


@pytest.mark.parametrize(("kind", "message"), [("hand-made", "another operator"), ("scaled", "is masked, scaled")])
def test_attention_that_cannot_be_kept_is_an_error_that_says_so(kind: str, message: str) -> None:
    attention = Attention(kind)
    rows = torch.randn(1, 2, 4, 8, requires_grad=True)
    blocks = nn.ModuleList([nn.Sequential(OrderedDict(attention=attention))])
    with (
        keep_attention(blocks, "attention", lambda _: keep_on_device) as contexts,
        pytest.raises(RunError, match=message),
    ):
        checkpoint(attention, rows, use_reentrant=False, context_fn=contexts)
