"""The recipes: each is what the plan in its header finds, with the numbers that the header has."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from command_line import succeed
from longtake.config.conflicts import conflicts
from longtake.config.load import load_config
from longtake.models.wan.variants import VARIANTS

RECIPES = {
    path: path.read_text(encoding="utf-8").split("\n\n")[0]
    for path in sorted((Path(__file__).parents[2] / "recipes").glob("*x*gb.toml"))
}
ALONE = {
    path: path.read_text(encoding="utf-8").split("\n\n")[0]
    for path in sorted((Path(__file__).parents[2] / "recipes").glob("*-lora-??gb.toml"))
    if "longtake plan" in path.read_text(encoding="utf-8")
}
every_recipe = pytest.mark.parametrize(("path", "header"), RECIPES.items(), ids=[path.name for path in RECIPES])
MACHINE = ("--gpu", "--gpus", "--budget", "--host-memory")
NEARLY = 0.03
"""Relative; a header is written once, and a planner counts a little otherwise now and then."""


def ranks(header: str) -> int:
    if alone := re.search(r"longtake train run\.toml --gpus (\d+)", header):
        return int(alone[1])
    machines = re.search(r"torchrun --nnodes (\d+) --nproc-per-node (\d+) ", header)
    assert machines is not None
    return int(machines[1]) * int(machines[2])


def number(header: str, pattern: str) -> float:
    found = re.search(pattern, header)
    assert found is not None, pattern
    return float(found[1])


def command(header: str) -> list[str]:
    """The arguments of `longtake plan` in a header."""
    found = re.search(r"longtake plan (.+)", header)
    assert found is not None
    return shlex.split(found[1])


def chosen(*arguments: object) -> tuple[dict[str, Any], dict[str, Any]]:
    """A report, and its chosen plan."""
    report: dict[str, Any] = json.loads(succeed("plan", *arguments, "--json", "-").out)
    return report, report["plans"][report["chosen"]]


def test_there_are_recipes_for_one_machine_and_for_two() -> None:
    assert sorted(ranks(header) for header in RECIPES.values()) == [8, 8, 16]


@every_recipe
def test_a_recipe_works_on_the_ranks_that_its_header_starts(path: Path, header: str) -> None:
    assert not [*conflicts(load_config(path), ranks(header))]


@pytest.mark.long
@every_recipe
def test_a_recipe_needs_what_its_header_says(path: Path, header: str) -> None:
    own = command(header)
    machine = [own[at + step] for flag in MACHINE if flag in own for at in [own.index(flag)] for step in (0, 1)]
    _, plan = chosen(path, *machine)
    told = {
        r"# Peak: ([\d.]+) GiB on each GPU": plan["peak_bytes"]["device"] / 2**30,
        r", ([\d.]+) GiB of host memory in all": plan["peak_bytes"]["host"] / 2**30,
        r"# Time: ([\d.]+) s a step": plan["step_seconds"],
        r"a step of (\d+) clips": load_config(path).training.global_batch_size,
    }
    for pattern, value in told.items():
        assert number(header, pattern) == pytest.approx(value, rel=NEARLY), pattern


def test_there_is_a_recipe_for_every_published_model_and_class_of_card() -> None:
    names = {path.name for path in ALONE}
    wanted = {
        f"{name}-lora-{card}gb.toml" for name, model in VARIANTS.items() if model.hub_id for card in (16, 24, 48, 80)
    }
    assert wanted <= names


@pytest.mark.slow
@pytest.mark.parametrize(("path", "header"), ALONE.items(), ids=[path.name for path in ALONE])
def test_a_recipe_for_one_gpu_is_what_the_planner_chooses_and_needs_what_its_header_says(
    path: Path, header: str
) -> None:
    config = load_config(path)
    _, plan = chosen(*command(header))
    of_any = {"budget": None, "fallbacks": None}
    assert config.memory.model_dump(mode="json") | of_any == plan["strategy"]["memory"] | of_any
    assert config.training.micro_batch_size == plan["micro_batch_size"]
    assert_told(header, plan)


@pytest.mark.long
@pytest.mark.parametrize("card", [16, 80])
def test_the_smallest_and_the_largest_recipe_of_a_model_need_what_they_say(card: int) -> None:
    """Of one model; `make bench` asks for all."""
    path, header = next((path, header) for path, header in ALONE.items() if f"1.3b-lora-{card}gb" in path.name)
    own = command(header)
    machine = [own[at + step] for flag in MACHINE if flag in own for at in [own.index(flag)] for step in (0, 1)]
    _, plan = chosen(path, *machine)
    assert_told(header, plan)


def assert_told(header: str, plan: dict[str, Any]) -> None:
    """The header's numbers are the plan's."""
    told = {
        r"# Peak: ([\d.]+) GiB on the GPU": plan["peak_bytes"]["device"] / 2**30,
        r"on the GPU, ([\d.]+) GiB of host memory": plan["peak_bytes"]["host"] / 2**30,
        r"# Time: ([\d.]+) s a step": plan["step_seconds"],
    }
    for pattern, value in told.items():
        assert number(header, pattern) == pytest.approx(value, rel=NEARLY), pattern


@pytest.mark.slow
@every_recipe
def test_a_recipe_is_what_the_plan_of_its_header_chooses(path: Path, header: str) -> None:
    config = load_config(path)
    report, plan = chosen(*command(header))
    frames, height, width = report["bucket"]
    assert (report["model"], report["gpus"]) == (config.model.name, ranks(header))
    assert (frames, (width, height)) == (config.data.num_frames, config.data.size)
    assert report["method"] == ("full" if config.lora is None else "lora")
    of_any = {"budget": None, "fallbacks": None}
    assert config.memory.model_dump(mode="json") | of_any == plan["strategy"]["memory"] | of_any
    assert config.parallel.model_dump() == plan["strategy"]["parallel"]
    assert config.training.micro_batch_size == plan["micro_batch_size"]
    assert f"a step is {config.training.global_batch_size} clips" in " ".join(report["notes"])
