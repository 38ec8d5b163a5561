from pathlib import Path
from typing import Any

from longtake.config.dump import to_toml
from longtake.config.schema import RunConfig
from longtake.planner.request import planned_run

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
