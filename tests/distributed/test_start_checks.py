"""What must be the same on all ranks: named rank by rank, value by value; an engine that is not the one asked for."""

from pathlib import Path

import pytest
import torch
from torch import nn

from longtake.config.schema import ParallelConfig
from longtake.distributed import engines
from longtake.distributed.backend import SingleDevice
from longtake.distributed.ranks import ALONE, Ranks, _agreed, ranks_of_environment, restarted
from longtake.distributed.start_checks import check_engine, check_equal, check_shared, differences, versions
from longtake.errors import ConfigError, DataError, Problem


def said(*ranks: dict[str, str]) -> list[str]:
    return [str(problem) for problem in differences([*ranks], "give all ranks the same")]


def test_ranks_that_differ_are_named_by_what_they_have() -> None:
    first = {"torch": "2.13.0", "lora.rank": "32"}
    assert said(first, first, first) == []
    assert said(first, first | {"torch": "2.12.0"}, first, first | {"torch": "2.12.0", "lora.rank": "16"}) == [
        "torch: ranks 1, 3 have 2.12.0, rank 0 has 2.13.0; give all ranks the same [rank-differs]",
        "lora.rank: rank 3 has 16, rank 0 has 32; give all ranks the same [rank-differs]",
    ]


def test_what_a_rank_lacks_is_named_too() -> None:
    assert said({"deepspeed": "0.19.8"}, {}) == [
        "deepspeed: rank 1 has None, rank 0 has 0.19.8; give all ranks the same [rank-differs]"
    ]


def test_a_process_alone_agrees_with_itself(tmp_path: Path) -> None:
    check_equal(ALONE, versions(), "")
    check_shared(ALONE, tmp_path)
    assert {"python", "longtake", "torch", "diffusers", "peft", "deepspeed"} == versions().keys()


def test_an_engine_that_is_not_the_one_asked_for_is_refused() -> None:
    weight = nn.Parameter(torch.ones(1))
    backend = SingleDevice(nn.ParameterList([weight]), {"w": weight}, torch.optim.SGD([weight]), fp16=False)
    check_engine(backend, ParallelConfig(strategy="single"), ALONE)
    with pytest.raises(ConfigError, match="the engine in force is SingleDevice over 1 ranks, not DataParallel over 1"):
        check_engine(backend, ParallelConfig(strategy="ddp"), ALONE)


def test_an_engine_that_is_not_installed_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match="deepspeed is not installed; pip install"):
        engines.require(ParallelConfig(strategy="deepspeed_stage_2"))
    engines.require(ParallelConfig(strategy="fsdp2"))


def test_without_a_plan_auto_is_the_simplest_engine() -> None:
    auto = ParallelConfig(strategy="auto")
    assert engines.chosen(auto, ALONE).strategy == "single"
    assert engines.chosen(auto, Ranks(0, 4, 0, 4)).strategy == "ddp"
    assert engines.chosen(ParallelConfig(strategy="fsdp2"), ALONE).strategy == "fsdp2"


def test_what_all_ranks_fail_with_is_said_once_and_what_one_fails_with_by_its_name() -> None:
    everyone, one = Problem("no such file", "run.toml"), Problem("cannot be read", "clip.mp4", "look at it")
    error = _agreed({0: (ConfigError, (everyone,)), 1: (ConfigError, (everyone, one))}, world=2)
    assert error.agreed
    assert error.exit_status == 2
    assert [str(problem) for problem in error.problems] == [
        "run.toml: no such file",
        "rank 1: clip.mp4: cannot be read; look at it",
    ]
    several = _agreed({1: (DataError, (one,)), 3: (DataError, (one,))}, world=4)
    assert str(several) == "ranks 1, 3: clip.mp4: cannot be read; look at it"


def test_ranks_are_those_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert ranks_of_environment() == ALONE
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert ranks_of_environment() == Ranks(5, 8, 1, 4)
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(ConfigError, match="'first' is no number"):
        ranks_of_environment()
    monkeypatch.setenv("RANK", "8")
    with pytest.raises(ConfigError, match="rank 8 of 8"):
        ranks_of_environment()


@pytest.mark.parametrize(
    ("variables", "begun_by", "again"),
    [
        ({}, "", False),
        ({"TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_RUN_ID": "job"}, "job", True),  # a machine has come
        ({"TORCHELASTIC_RESTART_COUNT": "1", "TORCHELASTIC_RUN_ID": "job"}, "job", True),
        ({"TORCHELASTIC_RESTART_COUNT": "1", "TORCHELASTIC_RUN_ID": "job"}, "another", False),  # refused before
        ({"TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_RUN_ID": "none"}, "", False),
        ({"TORCHELASTIC_RESTART_COUNT": "1", "TORCHELASTIC_RUN_ID": "none"}, "", True),
        ({"SLURM_RESTART_COUNT": "1", "TORCHELASTIC_RUN_ID": "job"}, "another", True),
    ],
)
def test_a_process_that_a_launcher_started_again_for_its_own_run_knows_it(
    variables: dict[str, str], begun_by: str, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_RUN_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert restarted(begun_by) is again
