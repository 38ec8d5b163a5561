"""From a config to a run with a plan: alone, among ranks, and when it is resumed."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from longtake.config.conflicts import check
from longtake.config.dump import to_toml
from longtake.config.schema import RunConfig
from longtake.planner.request import Where, is_open, needs_plan, planned_run, request_of
from longtake.training.planned import Planned

BUDGET = "2GiB"


def config(run: Path, **sections: dict[str, Any]) -> RunConfig:
    table: dict[str, Any] = {
        "model": {"name": "tiny-t2v", "dtype": "fp32"},
        "data": {"source": "clips", "num_frames": 17, "size": [160, 96]},
        "lora": {"rank": 4},
        "training": {"precision": "fp32"},
        "memory": {"budget": BUDGET},
        "output": {"run": str(run)},
    }
    return RunConfig.model_validate(table | sections)


def test_a_plan_chooses_what_the_config_leaves_open_and_knows_what_it_needs(tmp_path: Path) -> None:
    run, planned = planned_run(config(tmp_path / "run"))
    assert run.memory.budget == BUDGET
    assert planned.under(run.memory) is planned.strategies[0]
    assert planned.strategies[0].device_peak_bytes <= 2 * 2**30
    assert planned.report["chosen"] == 0


def test_a_resumed_run_keeps_its_strategy_and_micro_batch_though_another_is_faster(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    memory = {"budget": BUDGET, "slices": 3, "attention_head_groups": 5}
    before = config(folder, memory=memory, training={"precision": "fp32", "micro_batch_size": 4})
    (folder / "config.toml").write_text(to_toml(before))
    anew, _ = planned_run(config(folder))
    assert anew.memory.slices == 1
    resumed, _ = planned_run(config(folder), resume=True)
    assert (resumed.memory.slices, resumed.memory.attention_head_groups) == (3, 5)
    assert resumed.training.micro_batch_size == 4


def test_a_resumed_run_with_another_budget_or_strategy_is_planned_anew(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.toml").write_text(to_toml(config(folder, memory={"budget": BUDGET, "slices": 3})))
    for memory in ({"budget": "3GiB"}, {"budget": BUDGET, "slices": 2}):
        resumed, _ = planned_run(config(folder, memory=memory), resume=True)
        assert resumed.memory.slices == memory.get("slices", 1)


@pytest.fixture(scope="module")
def among_two(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Planned]:
    """A run on two ranks with nothing said of how they share."""
    return planned_run(config(tmp_path_factory.mktemp("two") / "run"), ranks=2, local_ranks=2)


def test_a_run_of_several_ranks_gets_an_engine_and_can_be_trained(among_two: tuple[RunConfig, Planned]) -> None:
    run, planned = among_two
    chosen = planned.report["plans"][planned.report["chosen"]]
    check(run, 2)
    assert run.parallel.strategy not in ("auto", "single")
    assert run.parallel.model_dump() == chosen["strategy"]["parallel"]
    assert run.training.micro_batch_size == chosen["micro_batch_size"]
    assert planned.report["gpus"] == 2
    for memory in run.memory.fallbacks:
        check(run.model_copy(update={"memory": memory}), 2)


def test_only_strategies_that_the_run_can_go_to_are_known_of_its_plan(among_two: tuple[RunConfig, Planned]) -> None:
    run, planned = among_two
    for strategy in planned.strategies[1:]:
        assert strategy.memory in run.memory.fallbacks
        plan = next(
            each for each in planned.report["plans"] if each["peak_bytes"]["device"] == strategy.device_peak_bytes
        )
        assert plan["strategy"]["parallel"] == run.parallel.model_dump()


def test_a_plan_can_be_sent_to_other_ranks(among_two: tuple[RunConfig, Planned]) -> None:
    run, planned = pickle.loads(pickle.dumps(among_two))
    assert (run, planned) == among_two
    assert run.parallel.model_fields_set == among_two[0].parallel.model_fields_set


def test_what_the_config_says_of_sharing_is_kept(tmp_path: Path) -> None:
    pinned = {"strategy": "fsdp2", "sp": 2, "dp_replicate": 2}
    run, _ = planned_run(config(tmp_path / "run", parallel=pinned), ranks=4)
    assert run.parallel.model_dump() == pinned | {"offload": "none"}


def test_an_engine_that_is_named_is_kept_on_one_rank(tmp_path: Path) -> None:
    run, _ = planned_run(config(tmp_path / "run", parallel={"strategy": "deepspeed_stage_3"}))
    assert run.parallel.strategy == "deepspeed_stage_3"
    alone, _ = planned_run(config(tmp_path / "run"))
    assert alone.parallel.strategy == "single"


def test_a_run_resumed_on_as_many_ranks_shares_as_before_and_on_others_anew(
    tmp_path: Path, among_two: tuple[RunConfig, Planned]
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    before = config(
        folder,
        memory={"budget": BUDGET, "slices": 3},
        parallel={"strategy": "fsdp2", "sp": 2},
        training={"precision": "fp32", "micro_batch_size": 2},
    )
    (folder / "config.toml").write_text(to_toml(before))
    (folder / "plan.json").write_text(json.dumps({"gpus": 2}))
    same, _ = planned_run(config(folder), True, 2)
    assert (same.parallel, same.memory.slices) == (before.parallel, 3)
    assert same.training.micro_batch_size == 2
    for ranks in (1, 4):
        other, _ = planned_run(config(folder), True, ranks)
        assert other.memory.slices == 1
        check(other, ranks)
    anew, _ = planned_run(config(folder, parallel={"strategy": "ddp"}), True, 2)
    assert (anew.parallel.strategy, anew.memory.slices) == ("ddp", 1)


@pytest.mark.parametrize("written", ["", "{}", "[]", '{"gpus": "many"}'])
def test_a_run_without_a_plan_that_can_be_read_keeps_what_works_on_so_many_ranks(tmp_path: Path, written: str) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    parallel = {"strategy": "fsdp2", "sp": 2}
    (folder / "config.toml").write_text(
        to_toml(config(folder, parallel=parallel, memory={"budget": BUDGET, "slices": 3}))
    )
    if written:
        (folder / "plan.json").write_text(written)
    kept, _ = planned_run(config(folder), True, 2)
    assert (kept.parallel.strategy, kept.parallel.sp, kept.memory.slices) == ("fsdp2", 2, 3)
    alone, _ = planned_run(config(folder), True, 1)
    assert (alone.parallel.strategy, alone.memory.slices) == ("single", 1)


def test_ranks_of_a_machine_have_its_memory_together(tmp_path: Path) -> None:
    own = config(tmp_path / "run", memory={})
    one, eight, of_two_machines = (
        request_of(own, Where(gpus=gpus, local_gpus=local))[0].machine for gpus, local in ((1, 0), (8, 0), (8, 4))
    )
    assert eight.budget_bytes == pytest.approx(one.budget_bytes / 8, rel=0.1)
    assert of_two_machines.budget_bytes == pytest.approx(one.budget_bytes / 4, rel=0.1)
    assert of_two_machines.host_bytes == pytest.approx(2 * eight.host_bytes, rel=0.1)


def test_a_run_is_planned_where_something_is_left_open(tmp_path: Path) -> None:
    with_budget, decided = config(tmp_path), config(tmp_path, memory={"gradient_checkpointing": "block"})
    assert is_open(with_budget)
    assert needs_plan(with_budget)
    assert not needs_plan(decided)
    assert needs_plan(decided, 2)
    assert not needs_plan(config(tmp_path, memory={"slices": 2}, parallel={"strategy": "ddp"}), 2)
