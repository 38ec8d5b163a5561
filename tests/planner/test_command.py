"""`longtake plan`: what people type, what it says, what it writes."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from command_line import Outcome, run
from longtake.config.conflicts import check
from longtake.config.load import load_config
from longtake.config.schema import MemoryStrategy, ParallelConfig
from longtake.config.sharing import sharing_conflicts
from longtake.models.wan.variants import variant
from longtake.planner.direct import trace
from longtake.planner.meta_model import Subject, build, meta_batch
from longtake.planner.planning import Request, plan
from longtake.planner.request import Where, nothing_fits, request_of

SMALL = ("--model", "wan2.1-t2v-1.3b", "--num-frames", "17")
LARGE = ("--model", "wan2.1-i2v-14b-480p")
OF_OTHERS = ("--training_strategy", "deepspeed_stage_3", "--use_gradient_checkpointing_offload", "--num_frames", 129)
"""Flags with which other trainers are told to save memory."""


def planned(*arguments: object) -> Outcome:
    found = run("plan", *arguments)
    assert found.status in (0, 3), found.err
    return found


def as_json(*arguments: object) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(planned(*arguments, "--json", "-").out)
    return report


@pytest.fixture(scope="module")
def on_four(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """A report of hybrid sharding on four GPUs, and the file that it wrote."""
    file = tmp_path_factory.mktemp("planned") / "planned.toml"
    sharing = ("--training-strategy", "fsdp2", "--set", "parallel.sp=2", "--set", "parallel.dp_replicate=2")
    own = ("--use-gradient-checkpointing", "--set", "memory.slices=1")  # which leave less to look at
    return as_json(*SMALL, *own, "--gpu", "rtx-3090", "--budget", "8GiB", "--gpus", 4, *sharing, "-o", file), file


@pytest.fixture(scope="module")
def others_on_eight() -> dict[str, Any]:
    return as_json(*LARGE, *OF_OTHERS, "--gpu", "a100-80gb", "--gpus", 8)


@pytest.fixture(scope="module")
def others_on_one() -> dict[str, Any]:
    return as_json(*LARGE, *OF_OTHERS, "--gpu", "a100-80gb")


def chosen_of(report: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = report["plans"][report["chosen"]]
    return found


def test_the_reference_case_is_answered_with_a_plan_and_plain_checkpointing_beside_it() -> None:
    report = as_json(*LARGE, "--num-frames", 129, "--gpu", "a100-80gb")
    chosen = report["plans"][report["chosen"]]
    assert chosen["fits"]
    assert sum(chosen["breakdown_bytes"].values()) == chosen["peak_bytes"]["device"] <= report["budget_bytes"]
    resident = next(each for each in report["references"] if "encoders resident" in each["name"])
    assert not resident["fits"]
    assert resident["peak_bytes"]["device"] > 80 * 10**9


def test_the_flags_of_other_trainers_are_answered_as_they_are() -> None:
    said = planned(*LARGE, "--num_frames", 129, "--use_gradient_checkpointing", "--gpu", "a100-40gb").out
    assert "as your flags have it (plain checkpointing): 71." in said
    assert "does not fit" in said


def test_a_planned_file_trains_as_planned_and_traces_to_the_same_peak(tmp_path: Path) -> None:
    file, own = tmp_path / "planned.toml", ("--gpu", "rtx-3090", "--budget", "6GiB")
    first = as_json(*SMALL, *own, "-o", file)
    chosen = first["plans"][first["chosen"]]
    config = load_config(file)
    assert config.memory == MemoryStrategy(**chosen["strategy"]["memory"]).model_copy(update={"budget": "6GiB"})
    again = as_json(file, "--gpu", "rtx-3090")
    assert again["plans"][0]["peak_bytes"] == chosen["peak_bytes"]
    subject = Subject(variant("wan2.1-t2v-1.3b"), config.lora, config.training)
    batch = meta_batch(subject.spec, (17, 480, 832), chosen["micro_batch_size"])
    clips = config.training.global_batch_size // config.training.micro_batch_size
    assert trace(build(subject), config.memory, batch, min(clips, 2)).peak_bytes == chosen["allocated_bytes"]


def test_what_does_not_fit_exits_with_three_and_says_what_would(tmp_path: Path) -> None:
    found = planned(*SMALL, "--gpu", "rtx-3090", "--budget", "1GiB", "-o", tmp_path / "no.toml")
    assert found.status == 3
    assert found.out.startswith("nothing fits 1.0 GiB")
    assert "what would make it fit" in found.out
    assert not (tmp_path / "no.toml").exists()


def test_the_most_frames_fit_and_four_more_do_not() -> None:
    own = ("--model", "wan2.1-t2v-1.3b", "--gpu", "rtx-3090", "--budget", "4GiB")
    report = as_json(*own, "--num-frames", "max")
    most = report["plans"][0]["bucket"][0]
    assert report["chosen"] == 0
    assert f"{most} frames are the most that fit" in report["notes"]
    longer = as_json(*own, "--num-frames", most + 4)
    assert longer["chosen"] is None or longer["plans"][0]["strategy"]["memory"]["quantization"] != "none"


def test_a_page_and_a_file_of_json_are_written(tmp_path: Path) -> None:
    page, file = tmp_path / "plan.html", tmp_path / "plan.json"
    said = planned(*SMALL, "--gpu", "rtx-4090", "--html", page, "--json", file).out
    assert said.startswith("fits:")
    assert "wan2.1-t2v-1.3b" in page.read_text()
    assert json.loads(file.read_text())["chosen"] == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "give a config, or --model"),
        ((*LARGE, "--gpu", "h100x"), "did you mean h100-sxm?"),
        ((*LARGE, "--num-frames", "80"), "take"),
        ((*LARGE, "--num-frames", "many"), 'write a whole number, or "max"'),
        ((*LARGE, "--size", "wide"), "WIDTHxHEIGHT"),
        ((*LARGE, "--size", "830x480"), "does not divide"),
        ((*LARGE, "--method", "qlora"), "use lora or full"),
        ((*LARGE, "--gpu", "rtx-3090", "--budget", "40GiB"), "lower it, or name another --gpu"),
        ((*LARGE, "--host-memory", "lots"), "--host-memory"),
        (("--model", "wan3-huge"), "wan3-huge"),
        ((*LARGE, "--gpus", "0"), "use 1 or more"),
        ((*LARGE, "--gpus", "3"), "4 clips a step do not come out even on 3 GPUs; use 6"),
        ((*LARGE, "--set", "parallel.sp=2"), "one GPU has nobody to share with; say how many there are with --gpus"),
        ((*LARGE, "--gpus", "2", "--training-strategy", "single"), "2 ranks under 'single'"),
        ((*LARGE, "--gpus", "48", "--set", "parallel.sp=48"), "48 ranks and 40 heads cannot be shared out 48 ways"),
        ((*LARGE, "--set", "parallel.offload=parameters"), "single does not keep it in host memory"),
        (
            (*LARGE, "--gpus", "2", "--training-strategy", "ddp", "--set", "parallel.dp_replicate=2"),
            "dp_replicate: ddp",
        ),
        ((*LARGE, "--set", "memory.block_swap=60"), "the model has 40 blocks; at most 40"),
        ((*LARGE, "--set", "memory.attention_head_groups=41"), "the model has 40 heads"),
        (
            (*LARGE, "--gpus", "2", "--training-strategy", "fsdp2", "--set", "memory.block_swap=40"),
            "memory.block_swap",
        ),
    ],
)
def test_a_wrong_question_is_one_line(arguments: tuple[str, ...], said: str) -> None:
    found = run("plan", *arguments)
    assert found.status == 2
    assert any(said in line for line in found.errors)


def test_full_fine_tuning_is_planned_without_an_adapter() -> None:
    report = as_json(*SMALL, "--gpu", "a100-80gb", "--method", "full")
    chosen = report["plans"][0]
    assert chosen["breakdown_bytes"]["adapters"] == 0
    assert chosen["breakdown_bytes"]["optimizer"] > 8 * 1.4e9


def test_each_bucket_of_a_curriculum_is_told_and_the_largest_decides(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        '[model]\nname = "wan2.1-t2v-1.3b"\n[data]\nsource = "clips"\nnum_frames = 33\nsize = [832, 480]\n'
        'frames_schedule = [[0, 5], [100, 17], [200, 33]]\n[lora]\n[output]\nrun = "runs/x"\n'
    )
    chosen = as_json(file, "--gpu", "rtx-4090")["plans"][0]
    assert chosen["bucket"] == [33, 480, 832]
    assert [each["bucket"][0] for each in chosen["buckets"]] == [33, 17, 5]
    assert chosen["strategy"]["memory"]["fallbacks"][-1]["slices"] == 16
    needs = [each["device_bytes"] for each in chosen["buckets"]]
    assert needs == sorted(needs, reverse=True)


def test_samples_while_training_are_planned_for_too(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    text = (
        '[model]\nname = "wan2.1-t2v-1.3b"\n[data]\nsource = "clips"\nnum_frames = 17\nsize = [832, 480]\n[lora]\n'
        '[output]\nrun = "runs/x"\n'
    )
    file.write_text(text)
    plain = as_json(file, "--gpu", "rtx-4090")
    file.write_text(text + '[validation]\nsamples = [{prompt = "a fox"}]\n')
    sampled = as_json(file, "--gpu", "rtx-4090")
    assert not any(each["stage"] == "sampling" for each in plain["plans"][0]["stages"])
    worst = max(each["device_bytes"] for each in sampled["plans"][0]["stages"] if each["stage"] == "sampling")
    assert sampled["plans"][0]["peak_bytes"]["device"] >= worst


def test_a_file_that_exists_is_not_replaced(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("mine")
    found = run("plan", *SMALL, "-o", file)
    assert (found.status, file.read_text()) == (2, "mine")
    assert "the file exists" in found.errors[0]


def test_without_a_config_clips_that_happen_to_be_here_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "clips").mkdir()
    monkeypatch.chdir(tmp_path)
    assert as_json(*SMALL, "--gpu", "rtx-4090")["plans"][0]["bucket"] == [17, 480, 832]


def test_what_is_assumed_is_said() -> None:
    notes = " ".join(as_json(*SMALL)["notes"])
    assert "there is no GPU here" in notes
    assert "host memory is taken to be" in notes


def test_nothing_fits_is_an_error_that_names_the_nearest(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        '[model]\nname = "tiny-t2v"\n[data]\nsource = "clips"\nnum_frames = 17\nsize = [160, 96]\n[lora]\n'
        '[memory]\nbudget = "20MiB"\n[output]\nrun = "runs/x"\n'
    )
    request, _ = request_of(load_config(file), Where())
    assert isinstance(request, Request)
    error = nothing_fits(plan(request))
    assert error.exit_status == 3
    assert "nothing fits 20.0 MiB" in error.problems[0].what


def test_a_plan_is_a_config(tmp_path: Path) -> None:
    file = tmp_path / "planned.toml"
    planned(*SMALL, "--gpu", "rtx-4090", "-o", file)
    table = tomllib.loads(file.read_text())
    assert set(table["memory"]) == set(MemoryStrategy.model_fields)
    assert file.read_text().startswith("# wan2.1-t2v-1.3b")


def test_a_plan_for_several_gpus_is_a_file_that_trains_on_them(on_four: tuple[dict[str, Any], Path]) -> None:
    report, file = on_four
    chosen, config = chosen_of(report), load_config(file)
    check(config, 4)
    assert config.parallel == ParallelConfig(**chosen["strategy"]["parallel"])
    assert config.memory == MemoryStrategy(**chosen["strategy"]["memory"]).model_copy(update={"budget": "8GiB"})
    assert config.training.micro_batch_size == chosen["micro_batch_size"]
    assert report["command"].startswith(f"longtake prepare {file} && longtake train {file} --gpus 4")
    assert "# longtake prepare planned.toml && longtake train planned.toml --gpus 4" in file.read_text()


def test_what_is_pinned_of_sharing_is_planned_and_told(on_four: tuple[dict[str, Any], Path]) -> None:
    for plan_ in on_four[0]["plans"]:
        parallel = plan_["strategy"]["parallel"]
        assert {**parallel, "strategy": "fsdp2", "sp": 2, "dp_replicate": 2, "offload": "none"} == parallel
        assert "fsdp2, 2 replicas, sp 2" in plan_["name"]
    assert any("none of it was measured on GPUs" in note for note in on_four[0]["notes"])


def test_what_a_plan_for_several_gpus_falls_back_to_goes_with_its_engine(others_on_eight: dict[str, Any]) -> None:
    chosen = chosen_of(others_on_eight)
    parallel = ParallelConfig(**chosen["strategy"]["parallel"])
    for memory in (chosen["strategy"]["memory"], *chosen["strategy"]["memory"]["fallbacks"]):
        strategy = MemoryStrategy(**memory)
        assert not [*sharing_conflicts(strategy, parallel, 8, 40)]


def test_one_gpu_is_told_that_zero_3_has_nobody_to_share_with(others_on_one: dict[str, Any]) -> None:
    (note,) = (note for note in others_on_one["notes"] if note.startswith("one GPU has nobody to share with"))
    assert 'with parallel.offload = "parameters" weights wait in host memory' in note
    assert chosen_of(others_on_one)["strategy"]["parallel"]["strategy"] == "deepspeed_stage_3"
    asked = others_on_one["references"][0]
    assert asked["name"] == "as your flags have it (checkpointing, all to host, deepspeed_stage_3)"
    assert asked["fits"]


def test_eight_gpus_share_under_the_engine_of_the_flags(others_on_eight: dict[str, Any]) -> None:
    assert {each["strategy"]["parallel"]["strategy"] for each in others_on_eight["plans"]} == {"deepspeed_stage_3"}
    asked = others_on_eight["references"][0]
    assert asked["name"].startswith("as your flags have it (checkpointing, all to host, deepspeed_stage_3")
    assert asked["peak_bytes"]["device"] < 30 * 2**30
    assert not any("nobody to share with" in note for note in others_on_eight["notes"])


@pytest.mark.long
def test_what_auto_would_choose_is_told_where_it_is_faster() -> None:
    asked = (*SMALL, "--method", "full", "--gpu", "rtx-3090", "--gpus", 2, "--training-strategy", "ddp")
    report = as_json(*asked)
    (note,) = (note for note in report["notes"] if "auto" in note)
    assert note.startswith('parallel.strategy = "auto" would choose')
    assert "fsdp2" in note or "deepspeed" in note
    assert chosen_of(report)["strategy"]["parallel"]["strategy"] == "ddp"


def test_where_an_engine_leaves_nothing_that_fits_the_advice_is_to_drop_it() -> None:
    found = planned(*SMALL, "--gpu", "rtx-3090", "--budget", "4GiB", "--training-strategy", "deepspeed_stage_3")
    assert found.status == 3
    assert "leave parallel.strategy to the planner" in found.out
