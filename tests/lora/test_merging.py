"""Merging an adapter into the weights, and refusing one that does not fit."""

import pytest
import torch

from longtake.config.schema import LoraConfig
from longtake.errors import ModelError
from longtake.lora import adapter_state, check_fits, merge, trained_adapter

LORA = LoraConfig(rank=4, alpha=6, targets=("attention", "ffn", "image"))


def test_merged_weights_give_the_adapter_s_output_within_fp32_rounding(build, trained, velocity):
    adapter = trained("tiny-i2v", LORA)
    merged = build("tiny-i2v")
    base = velocity(merged)
    merge(merged, trained_adapter(adapter_state(adapter), LORA, {}))
    assert (velocity(adapter) - base).abs().max() > 0.1
    # W + s B A against W x + s B (A x): sums of a few hundred products in another order, over two blocks
    torch.testing.assert_close(velocity(merged), velocity(adapter), rtol=1e-4, atol=1e-5)


def test_a_bf16_weight_is_rounded_once(build, trained):
    state = adapter_state(trained("tiny-t2v", LORA.model_copy(update={"targets": ("ffn",)})))
    merged = build("tiny-t2v", torch.bfloat16)
    before = merged.blocks[0].ffn.net[2].weight.detach().clone()
    merge(merged, trained_adapter(state, LORA, {}))
    down, up = (state[f"blocks.0.ffn.net.2.{half}.weight"] for half in ("lora_A", "lora_B"))
    exact = before.double() + 6 / 4 * up.double() @ down.double()
    weight = merged.blocks[0].ffn.net[2].weight
    assert weight.dtype == torch.bfloat16
    # half a unit in the last of bf16's 8 bits, and what the fp32 sum may push across a tie
    assert ((weight.double() - exact).abs() <= exact.abs() * 2**-8 * 1.001 + 1e-9).all()


def test_an_adapter_of_a_wider_model_is_refused_by_name_of_the_first_layers(build, trained):
    state = adapter_state(trained("tiny-t2v", LORA.model_copy(update={"targets": ("attention",)})))
    wide = {key: torch.zeros(4, 512) if "lora_A" in key else value for key, value in state.items()}
    with pytest.raises(ModelError) as caught:
        check_fits(wide, build("tiny-t2v"))
    assert len(caught.value.problems) == 4
    assert "blocks.0.attn1.to_q" in str(caught.value)
    assert "160x512" in str(caught.value)
    assert "160x160" in str(caught.value)


def test_an_image_branch_that_the_model_lacks_is_refused(build, trained):
    state = adapter_state(trained("tiny-i2v", LORA))
    with pytest.raises(ModelError, match="add_k_proj"):
        merge(build("tiny-t2v"), trained_adapter(state, LORA, {}))


def test_an_adapter_fits_the_model_that_carries_it(trained):
    transformer = trained("tiny-i2v", LORA)
    check_fits(adapter_state(transformer), transformer)
