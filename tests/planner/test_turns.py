"""Two experts in one run: the plan of a step of either is what a trace of both, whole, gives."""

from dataclasses import replace
from typing import Any

import pytest

from longtake.config.load import config_of
from longtake.config.schema import LoraConfig, MemoryStrategy, ParallelConfig, TrainingConfig
from longtake.models.wan.variants import variant
from longtake.planner.composition import Composed
from longtake.planner.direct import trace
from longtake.planner.events import KINDS, Copy
from longtake.planner.load import Load
from longtake.planner.meta_model import Subject, build, meta_batch
from longtake.planner.rank_items import rounded
from longtake.planner.request import Where, request_of
from longtake.planner.tracer import Tracer
from longtake.training.experts import share_of
from longtake.training.model import Expert

ONE = ParallelConfig(strategy="single")
BUCKET = (17, 96, 160)
STRATEGIES: dict[str, dict[str, Any]] = {
    "none": {"gradient_checkpointing": "none"},
    "block": {},
    "to host": {"activation_offload": "host", "activation_offload_fraction": 0.5},
    "part swapped": {"activation_offload": "host", "block_swap": 5},
    "from disk": {"block_swap": 7, "block_swap_from": "disk"},
    "states in host memory": {"optimizer_offload": True},
    "int8": {"quantization": "int8", "block_swap": 6},
    "slices": {"slices": 4, "attention_head_groups": 2, "block_swap": 4},
}


def subject(lora: LoraConfig | None, experts: int = 2) -> Subject:
    """The tiny model of two experts with seven blocks each."""
    found = variant("tiny-i2v-a14b")
    deep = replace(found, transformer_config=found.transformer_config | {"num_layers": 7})
    return Subject(deep, lora, TrainingConfig(precision="bf16", shift=5.0), experts=experts)


def planned(given: Subject, strategy: MemoryStrategy) -> Composed:
    """A step on one GPU."""
    return Tracer(given).distributed(strategy, Load(BUCKET, 1, False), ONE, 1)


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("lora", [LoraConfig(rank=8), None], ids=["lora", "full"])
def test_a_step_beside_the_other_expert_takes_what_a_trace_of_both_takes(name: str, lora: LoraConfig | None) -> None:
    strategy = MemoryStrategy(**STRATEGIES[name])
    if lora is None and (strategy.block_swap or strategy.quantization != "none"):
        pytest.skip("weights that are trained are neither swapped nor quantised")
    given = subject(lora)
    composed = planned(given, strategy)
    whole = trace(build(given), strategy, meta_batch(given.spec, BUCKET), idle=build(given))
    assert composed.peak_bytes == whole.peak_bytes
    for kind, mine, its in zip(KINDS, composed.peak, whole.peak, strict=True):
        # what the other left to it counts as buffers in a trace, once copies have filled it
        assert kind in ("checkpoints", "block", "buffers", "weights") or mine == its, kind
    assert composed.host_bytes == whole.host_bytes
    assert composed.disk_bytes in (whole.disk_bytes, 0)  # 0: the weights are in the model's own files


def test_a_change_of_turns_is_spread_over_the_steps_between_two() -> None:
    given, strategy = subject(LoraConfig(rank=8)), MemoryStrategy(block_swap=3)
    moved = [
        sum(item.nbytes for item in planned(each, strategy).update if isinstance(item, Copy) and item.queue == "inward")
        for each in (given, replace(given, experts=1))
    ]
    recording = Tracer(given).recording(strategy, Load(BUCKET, 1, False))
    share = share_of(Expert("transformer", (0.9, 1.0), "high"), given.training)
    assert moved[0] - moved[1] == pytest.approx(2 * min(share, 1 - share) * 4 * rounded(recording.layout.nbytes), abs=1)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "deepspeed_stage_2", "deepspeed_stage_3"])
def test_beside_the_other_expert_every_engine_keeps_its_share_of_it(engine: str) -> None:
    strategy, parallel = MemoryStrategy(), ParallelConfig.model_validate({"strategy": engine})
    one, two = (
        Tracer(subject(LoraConfig(rank=8), experts)).distributed(strategy, Load(BUCKET, 1, False), parallel, 2)
        for experts in (1, 2)
    )
    more = {kind: its - mine for kind, mine, its in zip(KINDS, one.peak, two.peak, strict=True)}
    assert more["adapters"] > 0
    assert more["optimizer"] > 0
    assert (two.host_bytes > one.host_bytes) == (engine in ("ddp", "deepspeed_stage_2"))
    assert (more["gradients"] > 0) == (engine == "ddp")
    assert more["block"] == more["checkpoints"] == 0


def test_both_are_planned_unless_one_is_named() -> None:
    for expert, experts in (("both", 2), ("high", 1), ("low", 1)):
        model = {"name": "wan2.2-t2v-a14b", "expert": expert}
        config = config_of({"model": model, "data": {"source": "clips"}, "output": {"run": "run"}, "lora": {}}, [])
        request, _ = request_of(config, Where(gpu="h100-sxm"))
        assert request.subject.experts == experts
