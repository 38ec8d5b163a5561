"""The commands that train a plan."""

from dataclasses import replace

import pytest

from longtake.planner.words import command_of, training_command
from planner.reports import realistic_report


def test_another_plans_settings_come_before_what_is_remarked_of_the_command() -> None:
    report = replace(realistic_report(), command="longtake train run.toml  # with data.source set in it")
    command = command_of(report, report.plans[1])
    assert command.startswith("longtake train run.toml --set memory.")
    assert command.endswith("  # with data.source set in it")


@pytest.mark.parametrize(
    ("gpus", "train"),
    [
        (1, "longtake train run.toml"),
        (8, "longtake train run.toml --gpus 8"),
        (16, "torchrun --nnodes 2 --nproc-per-node 8 "),
        (12, "torchrun --nnodes 2 --nproc-per-node 6 "),
        (11, "torchrun --nnodes 11 --nproc-per-node 1 "),
    ],
)
def test_more_gpus_than_a_machine_has_are_started_by_torchrun_on_each(gpus: int, train: str) -> None:
    command = training_command("run.toml", gpus)
    assert command.startswith("longtake prepare run.toml && ")
    assert train in command
    assert ("--rdzv-endpoint host0:29500 -m longtake train run.toml" in command) == (gpus > 8)
