"""Which ways to share the work come into question, and what is left of a strategy under an engine."""

import sys
from typing import Any

import pytest

from longtake.config.schema import MemoryStrategy, ParallelConfig, RunConfig
from longtake.config.sharing import sharing_conflicts
from longtake.errors import ConfigError
from longtake.planner.candidates import Freedom, allowed, open_conflicts, sharings
from longtake.planner.parallel import engines

FRUGAL = MemoryStrategy(block_swap=40, block_swap_from="disk", slices=16, attention_head_groups=4)


def found(
    gpus: int = 8, clips: int = 8, heads: int = 40, micro: int | None = None, **pinned: Any
) -> list[ParallelConfig]:
    usual = engines(MemoryStrategy(), gpus, "lora", heads)
    return sharings(Freedom({}, micro, pinned), usual, gpus, heads, clips)


def config(**sections: dict[str, Any]) -> RunConfig:
    table: dict[str, Any] = {
        "model": {"name": "tiny-t2v"},
        "data": {"source": "clips"},
        "lora": {},
        "output": {"run": "r"},
    }
    return RunConfig.model_validate(table | sections)


def said(ranks: int, **sections: dict[str, Any]) -> list[str]:
    return [str(problem) for problem in open_conflicts(config(**sections), ranks)]


def test_only_as_many_ranks_share_a_clip_as_make_the_batch_come_out_even() -> None:
    assert {each.sp for each in found()} == {1, 2, 4, 8}
    assert {each.sp for each in found(clips=4)} == {2, 4, 8}
    assert {each.sp for each in found(clips=4, micro=2)} == {4, 8}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3"])
def test_an_engine_that_is_named_is_the_only_one_in_each_degree(strategy: str) -> None:
    ways = found(strategy=strategy)
    assert {each.strategy for each in ways} == {strategy}
    assert {each.sp for each in ways} == {1, 2, 4, 8}
    assert len(ways) == len(set(ways))


def test_what_is_pinned_of_sharing_leaves_the_engines_that_have_it() -> None:
    assert {each.strategy for each in found(dp_replicate=2)} == {"fsdp2"}
    assert {each.strategy for each in found(offload="parameters")} == {"deepspeed_stage_3"}
    assert {(each.strategy, each.sp) for each in found(strategy="fsdp2", sp=2)} == {("fsdp2", 2)}
    assert {each.sp for each in found(heads=12, sp=8)} == {8}


def test_an_engine_that_is_named_stays_on_one_gpu() -> None:
    assert found(gpus=1) == [ParallelConfig(strategy="single")]
    assert found(gpus=1, strategy="deepspeed_stage_3", sp=1) == [ParallelConfig(strategy="deepspeed_stage_3")]


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"gpus": 3, "clips": 4}, "training.global_batch_size: 4 clips a step do not come out even on 3 GPUs; use 6"),
        (
            {"gpus": 8, "clips": 5, "sp": 4},
            "training.global_batch_size: 5 clips a step do not come out even on 8 GPUs; use 6",
        ),
        ({"gpus": 16, "clips": 16, "heads": 12, "sp": 16}, "parallel.sp: 16 ranks and 12 heads cannot be shared out"),
        ({"gpus": 1, "clips": 4, "offload": "optimizer"}, "parallel.offload: single does not keep it in host memory"),
        ({"strategy": "ddp", "dp_replicate": 2}, "parallel.dp_replicate: ddp has no groups"),
    ],
)
def test_where_no_way_works_it_says_why(fields: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        found(**fields)
    assert str(caught.value.problems[0]).startswith(line)


def test_an_engine_that_is_not_installed_is_used_only_where_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert any(each.strategy == "deepspeed_stage_3" for each in found())
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    assert {each.strategy for each in found()} == {"ddp", "fsdp2"}
    assert {each.strategy for each in found(strategy="deepspeed_stage_3")} == {"deepspeed_stage_3"}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3"])
def test_what_an_engine_refuses_is_left_out_of_a_strategy(strategy: str) -> None:
    for sp in (1, 8):
        parallel = ParallelConfig(strategy=strategy, sp=sp)
        left = allowed(FRUGAL, parallel, 8, 40)
        assert not [*sharing_conflicts(left, parallel, 8, 40)]
        assert (left == FRUGAL) == (strategy == "ddp")
        assert left.gradient_checkpointing == FRUGAL.gradient_checkpointing


def test_before_a_plan_only_what_no_plan_can_mend_is_a_conflict() -> None:
    batch = {"global_batch_size": 4}
    assert said(8, training=batch) == []
    (line,) = said(8, training=batch, parallel={"sp": 1})
    assert "4 is no multiple of 8 ranks" in line
    (line,) = said(8, training=batch | {"micro_batch_size": 3})
    assert "4 is no multiple of 1 ranks x micro-batch 3" in line
    (line,) = said(8, parallel={"strategy": "fsdp2"}, memory={"block_swap": 9})
    assert line.startswith("memory.block_swap: fsdp2 moves the weights itself")


@pytest.mark.parametrize("shared", [{"sp": 2}, {"strategy": "fsdp2", "dp_replicate": 2}])
def test_what_needs_several_gpus_asks_how_many_there_are(shared: dict[str, Any]) -> None:
    (line,) = said(1, parallel=shared)
    what = "one GPU has nobody to share with; say how many there are with --gpus [gpus-nobody-to-share]"
    assert line.endswith(f": {what}")
    assert said(4, parallel=shared) == []
