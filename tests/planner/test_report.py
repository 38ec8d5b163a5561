"""The answer as JSON and on a terminal, and the TOML of a plan."""

import io
import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from longtake.config.conflicts import check
from longtake.config.load import load_config, parse_set
from longtake.config.schema import MemoryStrategy, ParallelConfig, RunConfig
from longtake.errors import RunError
from longtake.planner.events import KINDS
from longtake.planner.plans import Report, StagePeak
from longtake.planner.report import print_report, to_json
from longtake.planner.toml import write_toml
from longtake.planner.words import answer, command_of, seconds_words, settings, why_not
from planner.reports import FRUGAL, GIB, STREAMED, hostile_report, nothing_fits_report, realistic_report

REPORTS = (realistic_report(), nothing_fits_report(), hostile_report())
PARTS = {*KINDS, "allocator_slack", "context"}


def printed(report: Report, width: int, **options: object) -> str:
    console = Console(file=io.StringIO(), width=width, **options)  # type: ignore[arg-type]
    print_report(report, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def words(text: str) -> list[str]:
    return text.split()


@pytest.mark.parametrize("report", REPORTS, ids=("fits", "nothing fits", "hostile"))
def test_json_has_every_key_of_the_contract_with_its_type(report: Report) -> None:
    found = json.loads(json.dumps(to_json(report), allow_nan=False))
    kinds = {"model": str, "task": str, "tokens": int, "budget_bytes": int, "gpu": str, "gpus": int, "plans": list}
    assert {key: type(found[key]) for key in kinds} == kinds
    assert found["chosen"] == report.chosen
    of_plan = {
        "fits": bool,
        "stage": str,
        "bucket": list,
        "allocated_bytes": int,
        "step_seconds": float,
        "bound_by": str,
    }
    for plan in found["plans"]:
        assert {key: type(plan[key]) for key in of_plan} == of_plan
        assert set(plan["strategy"]) == {"memory", "parallel"}
        assert set(plan["peak_bytes"]) == {"device", "host", "disk"}
        assert set(plan["breakdown_bytes"]) == PARTS
        sizes = [*plan["peak_bytes"].values(), *plan["breakdown_bytes"].values()]
        assert {type(size) for size in sizes} == {int}
        assert sum(plan["breakdown_bytes"].values()) == plan["peak_bytes"]["device"]


def test_a_plans_memory_in_json_loads_as_the_same_strategy() -> None:
    report = realistic_report()
    fallen = STREAMED.model_copy(update={"fallbacks": (STREAMED.model_copy(update={"block_swap": 40}),)})
    report = replace(report, plans=(replace(report.plans[0], strategy=fallen), *report.plans[1:]))
    for plan, written in zip(report.plans, json.loads(json.dumps(to_json(report)))["plans"], strict=True):
        assert MemoryStrategy.model_validate(written["strategy"]["memory"]) == plan.strategy
        assert ParallelConfig.model_validate(written["strategy"]["parallel"]) == plan.parallel


def test_json_fills_in_what_a_plan_does_not_name_and_leaves_timelines_out() -> None:
    report = realistic_report()
    bare = replace(report.plans[0], breakdown_bytes={"weights": 5}, peak_bytes={"device": 5})
    written = to_json(replace(report, plans=(bare,)))["plans"][0]
    assert written["breakdown_bytes"] == dict.fromkeys(PARTS, 0) | {"weights": 5}
    assert written["peak_bytes"] == {"device": 5, "host": 0, "disk": 0}
    assert "timeline" not in written


@pytest.mark.parametrize("width", [80, 120])
def test_the_answer_comes_first_and_the_chosen_plan_is_marked_and_first(width: int) -> None:
    lines = printed(realistic_report(), width).splitlines()
    first = " ".join(words("\n".join(lines[:2]))) if width == 80 else lines[0]
    assert first.startswith(
        "fits: 22.2 of 24.0 GiB, 30.3 s a step, bound by compute; the peak is in training at 129 fr"
    )
    rows = [line for line in lines if re.search(r"(yes|no: device) *$", line)]
    assert [row.startswith(">") for row in rows] == [True, False, False, False, False]
    assert words(rows[0])[1:4] == ["attention", "kept", "and"]
    assert words(rows[0])[-6:] == ["22.2", "58.9", "0", "30.3", "compute", "yes"]


@pytest.mark.parametrize("width", [80, 100, 120])
@pytest.mark.parametrize("report", REPORTS[:2], ids=("fits", "nothing fits"))
def test_no_line_is_too_long_and_no_word_is_broken(report: Report, width: int) -> None:
    text = printed(report, width)
    assert max(map(len, text.splitlines())) <= width
    wide = set(words(printed(report, 400)))
    broken = [word for word in words(text) if word not in wide and not re.fullmatch(r"[─\w.|]{20,}", word)]
    assert broken == []


def test_the_bar_is_as_long_as_the_line_and_in_proportion_to_the_bytes() -> None:
    report = realistic_report()
    bar = next(line for line in printed(report, 120).splitlines() if line.startswith("www"))
    breakdown = report.plans[0].breakdown_bytes
    assert len(bar) == 120
    for part, letter in (("weights", "w"), ("block", "b"), ("buffers", "u")):
        assert bar.count(letter) == pytest.approx(120 * breakdown[part] / report.budget_bytes, abs=1)
    assert bar.count(".") == pytest.approx(120 * (1 - sum(breakdown.values()) / report.budget_bytes), abs=1)


def test_the_bar_of_a_plan_beyond_the_budget_says_where_the_budget_is() -> None:
    report = nothing_fits_report()
    bar = next(line for line in printed(report, 80).splitlines() if line.startswith("www"))
    assert (len(bar), bar.count(".")) == (80, 0)
    assert bar.index("|") == pytest.approx(80 * report.budget_bytes / report.plans[0].peak_bytes["device"], abs=1)


def test_a_budget_far_above_leaves_the_whole_line_to_the_peak() -> None:
    report = replace(realistic_report(), budget_bytes=140 * GIB)
    bar = next(line for line in printed(report, 80).splitlines() if line.startswith("www"))
    assert (len(bar), bar.count(".")) == (80, 0)


def test_a_terminal_gets_colours_and_a_pipe_gets_letters() -> None:
    report = realistic_report()
    assert "\x1b" not in printed(report, 80)
    coloured = printed(report, 80, force_terminal=True, color_system="standard")
    assert "\x1b[34m█" in coloured
    assert "w weights" not in coloured
    without = printed(report, 80, force_terminal=True, color_system="standard", no_color=True)
    assert "w weights" in without


def test_stages_buckets_references_notes_and_the_command_are_told() -> None:
    text = " ".join(words(printed(realistic_report(), 100)))
    assert "for comparison: plain checkpointing, encoders resident: 84.2 GiB does not fit" in text
    assert "prepare UMT5 text encoder, 512 tokens" in text
    assert "train 129 frames of 832x480 22.2 GiB host 58.9 GiB the peak" in text
    assert "49 frames of 832x480 11.3 GiB 9.08 s a step" in text
    assert "note: times are computed" in text
    assert text.endswith("train with: longtake train planned.toml")


def test_a_long_command_stays_one_line() -> None:
    command = "longtake train " + "/a-long-folder" * 12 + "/run.toml --budget 24GiB"
    assert f"  {command}\n" in printed(replace(realistic_report(), command=command), 80)


def test_where_nothing_fits_that_is_said_first_then_what_would_with_numbers() -> None:
    report = replace(nothing_fits_report(), command="longtake train run.toml")
    text = " ".join(words(printed(report, 80)))
    assert text.startswith(
        "nothing fits 8.0 GiB: the nearest plan needs 11.3 GiB (3.3 GiB more than the device's budget)"
    )
    assert text.index("what would make it fit") < text.index("nearest all blocks streamed")
    assert "num_frames = 81 7.7 GiB 18.9 s a step" in text
    assert "gpus = 2 6.8 GiB 19.4 s a step" in text
    assert "longtake train" not in text


def test_without_any_plan_the_answer_says_so() -> None:
    report = replace(nothing_fits_report(), plans=(), references=(), advice=(), notes=())
    assert printed(report, 80).startswith("nothing fits 8.0 GiB: there is no plan")


def test_names_are_no_markup_and_no_commands_to_the_terminal() -> None:
    text = printed(hostile_report(), 120)
    assert "\x1b" not in text
    assert "[red]" in text


def test_small_models_are_told_in_mebibytes() -> None:
    report = realistic_report()
    small = [
        replace(plan, peak_bytes={tier: nbytes // 100 for tier, nbytes in plan.peak_bytes.items()})
        for plan in report.plans
    ]
    text = printed(replace(report, plans=tuple(small)), 80)
    assert re.search(r"MiB +MiB +MiB", text)


def test_a_peak_in_another_stage_is_named_with_what_it_is() -> None:
    report = realistic_report()
    encoder = StagePeak("prepare", "UMT5 text encoder", 23 * GIB)
    plan = replace(report.plans[0], stage="prepare", stages=(encoder,), peak_bytes={"device": 23 * GIB})
    report = replace(report, plans=(plan,))
    assert answer(report).endswith("the peak is in prepare, UMT5 text encoder")
    rows = [line for line in printed(report, 100).splitlines() if line.startswith(("prepare", "train  "))]
    assert [line.endswith("the peak") for line in map(str.rstrip, rows)] == [True, False]


def test_why_a_plan_does_not_fit_names_each_budget_that_it_exceeds() -> None:
    report = realistic_report()
    plan = replace(report.plans[0], fits=False)
    tight = replace(report, budget_bytes=20 * GIB, host_budget_bytes=50 * GIB)
    assert why_not(tight, plan) == "2.2 GiB more than the device's budget, 8.9 GiB more than the host's budget"
    assert why_not(tight, replace(plan, why_not="the encoder needs 30.0 GiB")) == "the encoder needs 30.0 GiB"
    assert why_not(report, plan) == "another stage does not fit"
    assert why_not(tight, report.plans[0]) == ""


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0 s"), (0.0123, "0.012 s"), (0.832, "0.83 s"), (9.999, "10.0 s"), (41.24, "41.2 s"), (1240.4, "1240 s")],
)
def test_seconds_have_three_digits(seconds: float, shown: str) -> None:
    assert seconds_words(seconds) == shown


def test_settings_are_what_is_not_usual() -> None:
    report = realistic_report()
    assert settings(report.plans[2]) == [
        ("memory.gradient_checkpointing", '"block"'),
        ("memory.activation_offload", '"host"'),
        ("memory.block_swap", "40"),
        ("memory.slices", "16"),
        ("memory.attention_head_groups", "4"),
        ("memory.optimizer_offload", "true"),
        ("parallel.strategy", '"single"'),
        ("training.micro_batch_size", "1"),
    ]


def run_config(memory: MemoryStrategy | None = None) -> RunConfig:
    sections = {"model": {"name": "tiny-i2v"}, "data": {"source": "/clips"}, "lora": {}, "output": {"run": "/run"}}
    config = RunConfig.model_validate(sections)
    return config if memory is None else config.model_copy(update={"memory": memory})


def written(folder: Path, report: Report, index: int, header: Sequence[str] = ()) -> Path:
    path = folder / "planned.toml"
    write_toml(run_config(), report.plans[index], path, header)
    return path


@pytest.mark.parametrize("index", range(5))
def test_a_plans_toml_loads_to_its_strategy_and_can_run(index: int, tmp_path: Path) -> None:
    report = realistic_report()
    fallen = report.plans[index].strategy.model_copy(update={"budget": "24GiB", "fallbacks": (FRUGAL,) * (index == 1)})
    plan = replace(report.plans[index], strategy=fallen, micro_batch_size=2)
    report = replace(report, plans=(*report.plans[:index], plan, *report.plans[index + 1 :]))
    loaded = load_config(written(tmp_path, report, index))
    assert (loaded.memory, loaded.parallel) == (plan.strategy, plan.parallel)
    assert loaded.training.micro_batch_size == 2
    usual = run_config().model_dump(exclude={"memory", "parallel", "training"})
    assert loaded.model_dump(exclude={"memory", "parallel", "training"}) == usual | {
        "data": usual["data"] | {"cache": str(tmp_path / "cache/")}
    }
    if index != 1:
        check(loaded)


def test_a_plans_toml_begins_with_the_header_as_comments(tmp_path: Path) -> None:
    path = written(tmp_path, realistic_report(), 0, ("Planned: 22.2 GiB", "", "two\nlines \x1b[31m\x00"))
    assert path.read_text().startswith("# Planned: 22.2 GiB\n#\n# two\n# lines  [31m\n\n[model]\n")
    load_config(path)


def test_a_toml_that_cannot_be_written_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="is no folder"):
        write_toml(run_config(), realistic_report().plans[0], tmp_path / "file" / "planned.toml", ())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("index", range(5))
def test_each_plans_command_sets_what_the_chosen_ones_file_has_otherwise(index: int, tmp_path: Path) -> None:
    report = realistic_report()
    report = replace(report, command=f"longtake train {written(tmp_path, report, 0)}")
    _, _, path, *rest = shlex.split(command_of(report, report.plans[index]))
    loaded = load_config(Path(path), parse_set([value for value in rest if value != "--set"]))
    assert loaded.memory == report.plans[index].strategy
    assert loaded.parallel == report.plans[index].parallel


def test_another_plans_command_drops_the_chosen_ones_fallbacks() -> None:
    report = realistic_report()
    fallen = report.plans[0].strategy.model_copy(update={"fallbacks": (FRUGAL,)})
    report = replace(report, plans=(replace(report.plans[0], strategy=fallen), *report.plans[1:]))
    assert command_of(report, report.plans[1]).endswith(" --set 'memory.fallbacks=[]'")


def test_there_is_no_command_where_nothing_is_chosen() -> None:
    report = replace(nothing_fits_report(), command="longtake train run.toml")
    assert [command_of(report, plan) for plan in report.plans] == ["", "", ""]
