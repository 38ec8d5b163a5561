"""Plans of DoRA, rsLoRA, ranks of single blocks and LoRA+: recorded on `meta` from what a run attaches."""

from typing import Any

import pytest
import torch

from longtake.config.schema import LoraConfig, MemoryStrategy, TrainingConfig
from longtake.lora import attach
from longtake.models.wan.variants import variant
from longtake.planner.load import Load
from longtake.planner.meta_model import Subject, build
from longtake.planner.tracer import Tracer
from longtake.training.optimizer import trained_parameters

LOAD = Load((17, 480, 832), 1, False)
STRATEGIES = (
    MemoryStrategy(),
    MemoryStrategy(block_swap=8, slices=4, activation_offload="host"),
    MemoryStrategy(optimizer_offload=True, quantization="int8"),
)


def tracer(**changes: Any) -> Tracer:
    lora = LoraConfig(rank=16, **changes)
    return Tracer(Subject(variant("wan2.1-t2v-1.3b"), lora, TrainingConfig(lora_plus_ratio=16.0)))


def values(lora: LoraConfig) -> int:
    """Trained by a run of the whole model."""
    transformer = build(Subject(variant("wan2.1-t2v-1.3b"), None, TrainingConfig())).transformer
    attach(transformer, lora, 0)
    return sum(parameter.numel() for parameter in trained_parameters(transformer).values())


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: str(strategy.model_dump(exclude_defaults=True)))
def test_every_kind_is_planned_under_every_strategy(strategy: MemoryStrategy) -> None:
    plain, stabilised, dora = (
        tracer(**kind).composed(strategy, LOAD).peak_bytes for kind in ({}, {"rslora": True}, {"dora": True})
    )
    assert stabilised == plain
    assert plain < dora < 1.4 * plain


def test_lengths_are_counted_as_trained() -> None:
    lengths = 30 * (8 * 1536 + 8960 + 1536)
    assert tracer(dora=True).trained_values - tracer().trained_values == lengths
    assert tracer(dora=True).trained_values == values(LoraConfig(rank=16, dora=True))


@pytest.mark.parametrize("ranks", [((0, 9, 4),), ((3, 3, 64), (10, 29, 8)), ((0, 29, 5),)])
def test_blocks_of_unlike_ranks_are_planned_with_their_mean(ranks: tuple[tuple[int, int, int], ...]) -> None:
    planned, real = tracer(block_ranks=ranks).trained_values, values(LoraConfig(rank=16, block_ranks=ranks))
    one = tracer().trained_values / 16  # of a rank more in every block
    assert 0 <= planned - real < one


def test_what_attaches_on_meta_is_what_a_run_attaches() -> None:
    lora = LoraConfig(rank=2, dora=True, rslora=True)
    planned = build(Subject(variant("tiny-i2v"), lora, TrainingConfig()))
    real = build(Subject(variant("tiny-i2v"), None, TrainingConfig())).transformer.to_empty(device="cpu")
    attach(real, lora, 0)
    expected = trained_parameters(real)
    assert planned.parameters.keys() == expected.keys()
    for name, parameter in planned.parameters.items():
        assert parameter.is_meta
        assert (parameter.shape, parameter.dtype) == (expected[name].shape, torch.float32)
