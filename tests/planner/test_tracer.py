"""What a step of several ranks is composed of: recorded as an engine has it."""

import pytest

from longtake.config.schema import LoraConfig, MemoryStrategy, ParallelConfig, TrainingConfig
from longtake.models.wan.variants import variant
from longtake.planner.events import KINDS, Compute
from longtake.planner.load import Load
from longtake.planner.meta_model import Subject
from longtake.planner.tracer import Tracer

LOAD = Load((17, 480, 832), 1, True)


def held(tracer: Tracer, strategy: str) -> int:
    """The most bytes of the kind `block`, activations and casts, in the forward pass."""
    composed = tracer.distributed(MemoryStrategy(), LOAD, ParallelConfig(strategy=strategy), 8)
    forward = (each for each in composed.micro_batch if isinstance(each, Compute) and each.label.startswith("forward"))
    return max(each.held[KINDS.index("block")] for each in forward)


@pytest.mark.parametrize("strategy", ["fsdp2", "deepspeed_stage_3"])
def test_casts_of_weights_that_are_gathered_block_by_block_are_not_kept(strategy: str) -> None:
    tracer = Tracer(Subject(variant("wan2.1-t2v-1.3b"), None, TrainingConfig()))
    casts = 2 * 30 * 46_440_704  # bf16 of all blocks' weights
    assert held(tracer, "ddp") - held(tracer, strategy) == pytest.approx(casts, rel=0.05)


def test_casts_of_adapters_are_kept_under_every_engine() -> None:
    tracer = Tracer(Subject(variant("wan2.1-t2v-1.3b"), LoraConfig(), TrainingConfig()))
    assert held(tracer, "ddp") == held(tracer, "fsdp2")
