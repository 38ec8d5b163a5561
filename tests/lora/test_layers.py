"""Attaching adapters, and their state."""

import pytest
import torch
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer

from longtake.config.schema import LoraConfig
from longtake.errors import ConfigError, ModelError
from longtake.lora import adapter_state, attach, attach_adapter, load_adapter_state, trained_adapter
from longtake.memory.quantization import quantize_blocks
from longtake.models.wan.keys import to_original
from longtake.models.wan.variants import variant

ATTENTION = {f"attn{i}.{leaf}" for i in (1, 2) for leaf in ("to_q", "to_k", "to_v", "to_out.0")}
FFN = {"ffn.net.0.proj", "ffn.net.2"}
IMAGE = {"attn2.add_k_proj", "attn2.add_v_proj"}


def adapted(transformer):
    names = [name for name, module in transformer.named_modules() if isinstance(module, LoraLayer)]
    return {name.split(".", 2)[2] for name in names}, len(names)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("attention",), ATTENTION),
        (("ffn",), FFN),
        (("image",), IMAGE),
        (("attention", "ffn", "image"), ATTENTION | FFN | IMAGE),
        (("q", "k", "v", "o", "ffn.0", "ffn.2"), ATTENTION | FFN),
        (("k_img",), {"attn2.add_k_proj"}),
        (("to_q",), {"attn1.to_q", "attn2.to_q"}),
        (("attn1.to_out.0",), {"attn1.to_out.0"}),
    ],
)
def test_targets_choose_these_layers_of_every_block(build, targets, expected):
    transformer = build("tiny-i2v")
    attach(transformer, LoraConfig(rank=2, targets=targets), seed=0)
    assert adapted(transformer) == (expected, 2 * len(expected))


def test_a_target_that_matches_nothing_is_an_error_that_names_those_that_do(build):
    with pytest.raises(ConfigError) as caught:
        attach(build("tiny-t2v"), LoraConfig(targets=("attention", "image", "query")), seed=0)
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert "'image'" in lines[0]
    assert "'query'" in lines[1]
    assert "attention, ffn" in lines[1]
    assert "attn1.to_q" in lines[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_fp32_adapters_are_trained(build, dtype):
    transformer = build("tiny-t2v", dtype)
    attach(transformer, LoraConfig(rank=4), seed=0)
    trained = {name: weight for name, weight in transformer.named_parameters() if weight.requires_grad}
    assert len(trained) == 2 * 2 * 10
    assert all(".lora_" in name and weight.dtype == torch.float32 for name, weight in trained.items())
    assert {weight.dtype for name, weight in transformer.named_parameters() if name not in trained} == {dtype}


def test_a_new_adapter_changes_nothing(build, velocity):
    before = velocity(build("tiny-i2v"))
    transformer = build("tiny-i2v")
    attach(transformer, LoraConfig(rank=4, targets=("attention", "ffn", "image")), seed=0)
    assert torch.equal(velocity(transformer), before)


def test_the_start_depends_on_the_seed_alone_and_leaves_the_global_random_state(build):
    states = []
    for seed, disturbance in ((7, 1), (7, 2), (8, 1)):
        transformer = build("tiny-t2v")
        torch.manual_seed(disturbance)
        before = torch.get_rng_state()
        attach(transformer, LoraConfig(rank=4), seed)
        assert torch.equal(torch.get_rng_state(), before)
        states.append(adapter_state(transformer))
    one, same, other = states
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert all(torch.equal(one[key], other[key]) == ("lora_B" in key) for key in one)
    bound = 160**-0.5  # Kaiming's, of a layer with 160 inputs, at peft's slope of sqrt(5)
    drawn = one["blocks.0.attn1.to_q.lora_A.weight"].abs().max()
    assert 0.9 * bound < drawn <= bound


def test_adapters_attach_to_meta_tensors(build):
    transformer = build("tiny-t2v").to("meta")
    attach(transformer, LoraConfig(rank=4), seed=0)
    assert {weight.device.type for weight in transformer.parameters()} == {"meta"}


@pytest.mark.parametrize("away", ["meta", "nf4"])
def test_adapters_are_real_fp32_and_the_same_wherever_the_weights_are(build, away):
    lora = LoraConfig(rank=4, targets=("attention", "ffn"))
    plain, transformer = build("tiny-t2v", torch.bfloat16), build("tiny-t2v", torch.bfloat16)
    attach(plain, lora, seed=5)
    if away == "meta":
        transformer.blocks[1].to("meta")
    else:
        quantize_blocks(transformer, variant("tiny-t2v").spec, "nf4")
    attach(transformer, lora, 5, torch.device("cpu"))
    expected = dict(plain.named_parameters())
    assert [*dict(transformer.named_parameters())] == [*expected]
    trained = {name: weight for name, weight in transformer.named_parameters() if weight.requires_grad}
    assert len(trained) == 2 * 2 * 10
    assert all(
        weight.dtype == torch.float32 and torch.equal(weight, expected[name]) for name, weight in trained.items()
    )
    layers = [module for module in transformer.modules() if isinstance(module, LoraLayer)]
    assert {type(layer) for layer in layers} == {PeftLinear}
    state = adapter_state(transformer)
    assert all(torch.equal(value, state[key]) for key, value in adapter_state(plain).items())


def test_adapters_go_to_the_device_that_is_asked_for(build):
    transformer = build("tiny-t2v")
    attach(transformer, LoraConfig(rank=4), 0, torch.device("meta"))
    assert all(weight.is_meta == weight.requires_grad for weight in transformer.parameters())


def test_a_state_goes_back_exactly(build, trained):
    lora = LoraConfig(rank=4, alpha=8, targets=("attention", "image"))
    state = adapter_state(trained("tiny-i2v", lora))
    other = build("tiny-i2v")
    attach(other, lora, seed=9)
    load_adapter_state(other, state)
    assert adapter_state(other).keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in adapter_state(other).items())
    assert state["blocks.1.attn2.add_k_proj.lora_A.weight"].shape == (4, 160)
    assert not any("default" in key for key in state)
    assert {to_original(key) for key in state} >= {"blocks.0.self_attn.q.lora_A.weight"}


def test_a_state_is_a_copy(trained):
    transformer = trained("tiny-t2v", LoraConfig(rank=4))
    state = adapter_state(transformer)
    for value in state.values():
        value.zero_()
    assert all(value.any() for value in adapter_state(transformer).values())


def test_missing_unknown_and_misshaped_keys_are_refused_and_nothing_is_changed(build, trained):
    lora = LoraConfig(rank=4, targets=("ffn",))
    state = adapter_state(trained("tiny-t2v", lora))
    state.pop("blocks.0.ffn.net.0.proj.lora_A.weight")
    state["blocks.0.ffn.net.2.lora_A.weight"] = torch.zeros(3, 640)
    state["blocks.0.attn1.to_q.lora_A.weight"] = torch.zeros(4, 160)
    transformer = build("tiny-t2v")
    attach(transformer, lora, seed=0)
    before = adapter_state(transformer)
    with pytest.raises(ModelError) as caught:
        load_adapter_state(transformer, state)
    assert len(caught.value.problems) == 3
    assert all(torch.equal(value, before[key]) for key, value in adapter_state(transformer).items())


def test_an_adapter_from_a_file_is_attached_with_its_own_rank_alpha_and_layers(build, trained, velocity):
    lora = LoraConfig(rank=4, alpha=8, targets=("attn1.to_q", "ffn"))
    transformer = trained("tiny-t2v", lora)
    adapter = trained_adapter(adapter_state(transformer), lora, {})
    other = build("tiny-t2v")
    attach_adapter(other, adapter)
    assert torch.equal(velocity(other), velocity(transformer))
