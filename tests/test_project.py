"""Rules of the whole repository: sizes, shipped recipes, and a command line that answers at once."""

import ast
import importlib.util
import os
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError

from checked_types import CheckedLoader
from command_line import ranks_started

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
SCRIPTS = sorted(path for folder in ("tests", "scripts", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))

MOST_LINES = 300
MOST_LINES_OF_A_FUNCTION = 60
HELP_CPU_SECONDS = 0.3
SHAPED = """
from __future__ import annotations
from dataclasses import dataclass
from typing import TYPE_CHECKING
from torch import Tensor
if TYPE_CHECKING:
    from jaxtyping import Float

@dataclass
class Held:
    value: Float[Tensor, "batch"]

def add(rows: Float[Tensor, "batch dim"], row: Float[Tensor, "dim"]) -> Float[Tensor, "batch dim"]:
    return rows + row
"""


@pytest.mark.parametrize("path", [*SOURCES, *SCRIPTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {node.name: (node.end_lineno or node.lineno) - node.lineno + 1 for node in functions}
    assert {name: length for name, length in lengths.items() if length > MOST_LINES_OF_A_FUNCTION} == {}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_is_a_valid_config(path: Path) -> None:
    from longtake.config.conflicts import conflicts
    from longtake.config.schema import RunConfig

    text = path.read_text(encoding="utf-8")
    assert not [*conflicts(RunConfig.model_validate(tomllib.loads(text)), ranks_started(text))]


def test_tests_check_the_shapes_of_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "shaped.py"
    path.write_text(SHAPED, encoding="utf-8")
    loader = CheckedLoader("shaped", str(path))
    spec = importlib.util.spec_from_file_location("shaped", path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "shaped", module)
    loader.exec_module(module)
    assert module.add(torch.ones(2, 3), torch.ones(3)).shape == (2, 3)
    with pytest.raises(TypeCheckError, match="add"):
        module.add(torch.ones(2, 3), torch.ones(2))
    with pytest.raises(TypeCheckError, match="Held"):
        module.Held(torch.ones(2, 3))


def _help(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *flags, "-m", "longtake", "--help"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)


def test_help_takes_less_than_three_tenths_of_a_second_of_cpu() -> None:
    _help()  # writes the bytecode that an installed package has
    seconds = []
    for _ in range(5):
        before = os.times()
        _help()
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert statistics.median(seconds) < HELP_CPU_SECONDS, seconds


def test_help_imports_neither_torch_nor_pydantic() -> None:
    imported = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in _help("-X", "importtime").stderr.splitlines()}
    assert imported & {"torch", "pydantic", "diffusers", "transformers", "numpy"} == set()
    assert "longtake" in imported
