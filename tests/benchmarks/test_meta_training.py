from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from longtake.config.schema import LoraConfig, MemoryStrategy, TrainingConfig
from longtake.memory.quantization import QuantizedWeight
from longtake.models.wan.variants import variant

FRAMES, SIZE, RANK = 81, (160, 96), 8
DIM, LAYERS = 5 * 32, 4
PER_BLOCK = MemoryStrategy()
PLAIN = MemoryStrategy(gradient_checkpointing="none")
SWAPPED = MemoryStrategy(activation_offload="host", block_swap=LAYERS)


@pytest.fixture(scope="module")
def training(script: Callable[[str], Any]) -> Any:
    return script("meta_training")


@pytest.fixture(scope="module")
def traced(training: Any) -> Any:
    return training.build(variant("tiny-i2v"), LoraConfig(rank=RANK), TrainingConfig())


def step(training: Any, traced: Any, strategy: MemoryStrategy, **choices: Any) -> Any:
    return training.trace(traced, strategy, training.meta_batch(traced.spec, FRAMES, SIZE), **choices)


def rounded(nbytes: int, unit: int = 512) -> int:
    return -(-nbytes // unit) * unit


def input_bytes(traced: Any) -> int:
    return traced.spec.tokens(FRAMES, SIZE[1], SIZE[0]) * DIM * 2


def frozen_bytes(traced: Any) -> int:
    """Of one block, as it lies in a buffer of the ring."""
    frozen = [parameter for parameter in traced.transformer.blocks[0].parameters() if not parameter.requires_grad]
    return sum(rounded(parameter.nbytes, 256) for parameter in frozen)


def test_checkpointing_keeps_each_blocks_input_in_bf16_and_one_block(training: Any, traced: Any) -> None:
    plain, checkpointed = (step(training, traced, strategy).peak for strategy in (PLAIN, PER_BLOCK))
    assert checkpointed["checkpoints"] == LAYERS * rounded(input_bytes(traced))
    assert 0.2 * plain["block"] < checkpointed["block"] < 0.4 * plain["block"]
    assert checkpointed["weights"] == plain["weights"]


def test_adapters_and_two_moments_are_held_in_fp32(training: Any, traced: Any) -> None:
    peak = step(training, traced, PER_BLOCK).peak
    held = sum(rounded(parameter.nbytes) for parameter in traced.parameters.values())
    assert all(parameter.dtype == torch.float32 for parameter in traced.parameters.values())
    steps = rounded(4) * len(traced.parameters)  # the one kernel of CUDA's AdamW reads them on the device
    assert (peak["adapters"], peak["optimizer"]) == (held, 2 * held + steps)


def test_what_is_offloaded_and_swapped_is_in_host_memory_and_crosses_as_often_as_it_must(
    training: Any, traced: Any
) -> None:
    found = step(training, traced, SWAPPED)
    kept, weights = input_bytes(traced), frozen_bytes(traced)
    assert found.host_bytes == LAYERS * (kept + weights)
    assert found.moved["outward"] == LAYERS * kept
    # When backward begins, the last two inputs and the last two blocks' weights are still on the device.
    assert found.moved["inward"] == (LAYERS - 2) * kept + (LAYERS + LAYERS - 2) * weights


def test_the_device_has_the_ring_and_not_the_blocks_weights(training: Any, traced: Any) -> None:
    swapped, resident = (step(training, traced, strategy).peak for strategy in (SWAPPED, PER_BLOCK))
    gone = resident["weights"] - swapped["weights"]
    assert abs(gone - LAYERS * frozen_bytes(traced)) < 256 * 4 * 40  # parameters and whole blocks are rounded otherwise
    assert swapped["buffers"] >= 2 * rounded(frozen_bytes(traced))


def test_offloaded_states_of_the_optimiser_are_not_the_devices(training: Any, traced: Any) -> None:
    found = step(training, traced, MemoryStrategy(optimizer_offload=True))
    values = sum(parameter.numel() for parameter in traced.parameters.values())
    assert found.peak["optimizer"] == 0
    assert 8 * values <= found.host_bytes < 8 * values * 1.1
    assert found.moved["inward"] == found.moved["outward"] == found.host_bytes


def test_an_update_of_many_tensors_at_a_time_has_a_temporary_of_their_size(training: Any, traced: Any) -> None:
    found = step(training, traced, PER_BLOCK)
    held = sum(rounded(parameter.nbytes) for parameter in traced.parameters.values())
    at_the_end = [nbytes for flops, nbytes in found.timeline if flops == found.flops]
    trained = {kind: found.peak[kind] for kind in ("weights", "adapters", "optimizer")}
    assert max(at_the_end[-40:]) >= sum(trained.values()) + 2 * held  # gradients and the temporary


def test_checkpointing_computes_the_forward_pass_again_and_attention_only_where_it_is_not_kept(
    training: Any, traced: Any
) -> None:
    plain, block, kept = (
        step(training, traced, strategy)
        for strategy in (PLAIN, PER_BLOCK, MemoryStrategy(gradient_checkpointing="block_keep_attention"))
    )
    assert plain.forward_flops == block.forward_flops == kept.forward_flops
    assert plain.flops < kept.flops < block.flops < plain.flops + plain.forward_flops


def test_the_timelines_highest_point_is_the_peak(training: Any, traced: Any) -> None:
    for strategy in (PER_BLOCK, SWAPPED):
        found = step(training, traced, strategy)
        assert max(nbytes for _, nbytes in found.timeline) == found.peak.total()


def test_what_autocast_does_to_rms_norm_changes_nothing_because_norms_are_kept_out_of_it(
    training: Any, traced: Any
) -> None:
    inside, outside = (
        step(training, traced, PLAIN, details=training.Details(rms_norm_in_fp32=in_fp32)).peak["block"]
        for in_fp32 in (True, False)
    )
    assert inside == outside


def test_details_change_what_they_name(training: Any, traced: Any) -> None:
    usual = step(training, traced, PER_BLOCK).peak
    changed = {
        name: step(training, traced, PER_BLOCK, details=training.Details(**{name: value})).peak
        for name, value in {"adapters": torch.bfloat16, "adam": False, "peft_casts": True}.items()
    }
    assert changed["adapters"]["adapters"] < 0.6 * usual["adapters"]
    assert changed["adam"]["optimizer"] == 0
    assert changed["peft_casts"]["block"] > usual["block"]
    decomposed = step(training, traced, PER_BLOCK, details=training.Details(fused_rms_norm=False)).peak
    assert decomposed["block"] > usual["block"]


@pytest.mark.parametrize(
    "strategy",
    [PER_BLOCK, SWAPPED, MemoryStrategy(quantization="int8"), MemoryStrategy(optimizer_offload=True)],
    ids=["block", "swap", "int8", "optimizer_offload"],
)
def test_a_traced_step_leaves_the_model_as_it_was(training: Any, traced: Any, strategy: MemoryStrategy) -> None:
    before = dict(traced.transformer.named_parameters())
    step(training, traced, strategy)
    after = dict(traced.transformer.named_parameters())
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
    assert all(parameter.grad is None for parameter in traced.parameters.values())
    assert "forward" not in vars(traced.transformer)
    assert not any(block._forward_pre_hooks for block in traced.transformer.blocks)


def test_a_traced_step_gives_every_adapter_a_gradient(training: Any, traced: Any) -> None:
    seen: list[Tensor] = []
    hooks = [p.register_post_accumulate_grad_hook(seen.append) for p in traced.parameters.values()]
    step(training, traced, SWAPPED)
    for hook in hooks:
        hook.remove()
    assert {id(parameter) for parameter in seen} == {id(parameter) for parameter in traced.parameters.values()}


def test_quantised_weights_count_with_the_bytes_that_they_have(training: Any, traced: Any) -> None:
    plain, quantised = (
        step(training, traced, strategy).peak["weights"] for strategy in (PER_BLOCK, MemoryStrategy(quantization="nf4"))
    )
    assert not any(isinstance(parameter, QuantizedWeight) for parameter in traced.transformer.parameters())
    matrices = sum(m.weight.nbytes for m in traced.transformer.blocks.modules() if hasattr(m, "base_layer"))
    assert plain - quantised > 0.5 * matrices


def test_a_step_is_traced_to_the_same_bytes_twice(training: Any, traced: Any) -> None:
    first, second = (step(training, traced, SWAPPED) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("name", ["tiny-t2v", "tiny-flf2v", "tiny-ti2v"])
def test_every_kind_of_model_can_be_traced(training: Any, name: str) -> None:
    traced = training.build(variant(name), LoraConfig(rank=RANK), TrainingConfig())
    peak = step(training, traced, PER_BLOCK).peak
    assert set(+peak) >= {"weights", "adapters", "optimizer", "checkpoints", "block"}
