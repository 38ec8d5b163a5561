"""A Wan block, cut around its self-attention, is the block."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from longtake.config.schema import ModelConfig
from longtake.models.spec import ModelSpec
from longtake.models.wan import block as stages
from longtake.models.wan.first_and_rest import FirstAndRest
from longtake.models.wan.tiny import bundled
from longtake.models.wan.variants import VARIANTS, variant
from longtake.models.wan.weights import load_transformer, locate
from longtake.training.precision import compute_in

MODELS = ("tiny-t2v", "tiny-i2v", "tiny-flf2v", "tiny-ti2v")
GRID = (3, 2, 2)
TOKENS = 12


Given = tuple[Any, Tensor, tuple[Any, ...]]
"""A block, its hidden state for two samples, and the arguments that it shares with others."""


@pytest.fixture(scope="module", params=MODELS)
def given(request: pytest.FixtureRequest, tiny_root: Callable[[str], Path]) -> Given:
    """In fp32, all weights trained."""
    model = load(tiny_root(request.param), request.param, torch.float32)
    return model.blocks[1].requires_grad_(True), *inputs(model, request.param)


def load(folder: Path, name: str, dtype: torch.dtype) -> Any:
    """A tiny transformer."""
    files = locate(ModelConfig(path=str(folder), name=name), bundled, print)
    return load_transformer(files, "transformer", dtype, torch.device("cpu"))


def inputs(model: Any, name: str) -> tuple[Tensor, tuple[Any, ...]]:
    """Of a block, for two samples."""
    spec = variant(name).spec
    dim = spec.heads * spec.head_dim
    torch.manual_seed(3)
    frames, height, width = GRID
    rotary = model.rope(torch.empty(2, 16, frames, 2 * height, 2 * width))
    temb = torch.randn(2, TOKENS, 6, dim) if spec.expand_timesteps else torch.randn(2, 6, dim)
    text = torch.randn(2, spec.text_tokens + spec.image_tokens, dim)
    return torch.randn(2, TOKENS, dim), (text, temb, rotary)


def test_its_stages_around_attention_give_the_blocks_output_and_gradients_to_the_bit(
    given: Given,
) -> None:
    block, hidden_states, (text, temb, rotary) = given
    results = []
    for evaluate in (block, _in_stages(block)):
        inputs = [tensor.clone().requires_grad_() for tensor in (hidden_states, text, temb)]
        output = evaluate(*inputs, rotary)
        weights = [*block.parameters()]
        results.append((output, *torch.autograd.grad(output.square().mean(), [*inputs, *weights])))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_a_bf16_block_under_autocast_is_the_same_to_the_bit(tiny_root: Callable[[str], Path], name: str) -> None:
    model = load(tiny_root(name), name, torch.bfloat16)
    block, (hidden_states, (text, temb, rotary)) = model.blocks[1], inputs(model, name)
    rows, shared = hidden_states.bfloat16(), (text.bfloat16(), temb.bfloat16(), rotary)
    autocast = torch.autocast("cpu", torch.bfloat16)
    with compute_in(model, variant(name).spec, "bf16", torch.device("cpu")), torch.no_grad(), autocast:
        assert torch.equal(_in_stages(block)(rows, *shared), block(rows, *shared))


def test_a_slice_has_the_rows_that_the_whole_has(given: Given) -> None:
    block, hidden_states, shared = given
    with torch.no_grad():
        whole = stages.before(block, hidden_states, shared)
        attended = torch.randn_like(whole[0])
        output = stages.after(block, hidden_states, attended, shared)
        for tokens in (slice(0, 5), slice(5, 12), slice(3, 4)):
            rows, cut = hidden_states[:, tokens], stages.cut(shared, tokens)
            for part, all_rows in zip(stages.before(block, rows, cut), whole, strict=True):
                torch.testing.assert_close(part, all_rows[:, :, tokens], rtol=1e-5, atol=1e-6)
            part = stages.after(block, rows, attended[:, :, tokens], cut)
            torch.testing.assert_close(part, output[:, tokens], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("given", ["tiny-ti2v"], indirect=True)
def test_of_two_timesteps_its_stages_and_slices_are_the_block_with_a_row_for_each_token(given: Given) -> None:
    block, hidden_states, (text, temb, rotary) = given
    two = temb[:, :2].clone().requires_grad_()
    whole = torch.cat([two[:, :1].expand(-1, 4, -1, -1), two[:, 1:].expand(-1, TOKENS - 4, -1, -1)], dim=1)
    short = FirstAndRest(two, 4, TOKENS)
    expected = block(hidden_states, text, whole, rotary)
    assert torch.equal(block(hidden_states, text, short, rotary), expected)
    assert torch.equal(_in_stages(block)(hidden_states, text, short, rotary), expected)
    for tokens in (slice(0, 3), slice(3, 6), slice(6, 12)):
        parts = [
            stages.before(block, hidden_states[:, tokens], stages.cut((text, temb, rotary), tokens))
            for temb in (whole, short)
        ]
        assert all(torch.equal(one, other) for one, other in zip(*parts, strict=True))
    assert stages.cut((text, short, rotary), slice(3, 6))[1].rows is two, "where slices add its gradient up"


def test_cutting_makes_views_of_what_has_a_row_for_each_token_and_keeps_the_rest() -> None:
    text, tables = torch.randn(2, 8, 4), (torch.randn(1, 6, 1, 4), torch.randn(1, 6, 1, 4))
    whole, of_tokens = torch.randn(2, 6, 4), torch.randn(2, 6, 6, 4)
    for temb, rows in ((whole, whole), (of_tokens, of_tokens[:, 2:5])):
        cut_text, cut_temb, (cosines, sines) = stages.cut((text, temb, tables), slice(2, 5))
        assert cut_text is text
        assert cut_temb.data_ptr() == rows.data_ptr()
        assert cut_temb.shape == rows.shape
        assert torch.equal(cosines, tables[0][:, 2:5])
        assert sines.data_ptr() == tables[1][:, 2:5].data_ptr()


@pytest.mark.parametrize("spec", [entry.spec for entry in VARIANTS.values()], ids=[*VARIANTS])
def test_every_variants_spec_says_how_wide_it_is_and_how_its_blocks_are_cut(spec: ModelSpec) -> None:
    config = variant(spec.name).transformer_config
    assert (spec.heads, spec.head_dim) == (config["num_attention_heads"], config["attention_head_dim"])
    assert spec.stages() is stages
    assert spec.self_attention == "attn1"
    assert len({spec, variant(spec.name).spec}) == 1


def _in_stages(block: Any) -> Callable[..., Tensor]:
    def evaluate(hidden_states: Tensor, *shared: Any) -> Tensor:
        query, key, value = stages.before(block, hidden_states, shared)
        attended = functional.scaled_dot_product_attention(query, key, value)
        return stages.after(block, hidden_states, attended, shared)

    return evaluate
