"""Rules of the whole repository: sizes, forbidden calls, shipped recipes, and a command line that answers at once."""

import ast
import importlib.util
import os
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Iterator
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
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal"}


def forbidden(source: str) -> Iterator[str]:
    """What in a module's source can run code from data, by name and line; torch.load as `torch.load`."""
    for node in ast.walk(ast.parse(source)):
        line = getattr(node, "lineno", 0)
        for name in _forbidden_in(node):
            yield f"{name} at line {line}"


def _forbidden_in(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name.split(".")[0] in PICKLES)
    elif isinstance(node, ast.ImportFrom):
        module = node.module or ""
        if module.split(".")[0] in PICKLES:
            yield module
        yield from (f"{module}.load" for alias in node.names if module in ("torch", "yaml") and alias.name == "load")
    elif isinstance(node, ast.Attribute):
        dotted = ast.unparse(node)
        if dotted in (
            "torch.load",
            "yaml.load",
            "yaml.unsafe_load",
            "os.system",
            "os.popen",
            "builtins.eval",
            "builtins.exec",
        ):
            yield dotted
    elif isinstance(node, ast.Call):
        yield from _forbidden_call(node)


def _forbidden_call(call: ast.Call) -> Iterator[str]:
    if isinstance(call.func, ast.Name) and call.func.id in ("eval", "exec", "__import__"):
        yield call.func.id
    for keyword in call.keywords:
        allowed = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
        if keyword.arg in ("shell", "trust_remote_code", "allow_pickle") and not allowed:
            yield str(keyword.arg)


@pytest.mark.parametrize("path", [*SOURCES, *SCRIPTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {node.name: (node.end_lineno or node.lineno) - node.lineno + 1 for node in functions}
    assert {name: length for name, length in lengths.items() if length > MOST_LINES_OF_A_FUNCTION} == {}


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("eval('1')", "eval"),
        ("exec('1')", "exec"),
        ("import pickle", "pickle"),
        ("from pickle import loads", "pickle"),
        ("import torch\ntorch.load('a', weights_only=True)", "torch.load"),
        ("from torch import load", "torch.load"),
        ("import yaml\nyaml.load('a')", "yaml.load"),
        ("import os\nos.system('ls')", "os.system"),
        ("import subprocess\nsubprocess.run('ls', shell=True)", "shell"),
        ("import numpy\nnumpy.load('a', allow_pickle=True)", "allow_pickle"),
        ("AutoModel.from_pretrained('a', trust_remote_code=flag)", "trust_remote_code"),
    ],
)
def test_the_rule_sees_each_forbidden_call(source: str, name: str) -> None:
    assert [found.split(" at ")[0] for found in forbidden(source)] == [name]


def test_the_rule_lets_evaluation_mode_and_safe_settings_pass() -> None:
    assert list(forbidden("model.eval()\nsubprocess.run(['ls'], shell=False)\njson.load(file)")) == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_no_source_can_run_code_from_data(path: Path) -> None:
    found = list(forbidden(path.read_text(encoding="utf-8")))
    assert [use for use in found if not use.startswith("torch.load ")] == []


def test_torch_load_has_at_most_one_caller_and_reads_only_weights() -> None:
    calls = [
        (path.name, ast.unparse(node))
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    ]
    uses = [
        use for path in SOURCES for use in forbidden(path.read_text(encoding="utf-8")) if use.startswith("torch.load ")
    ]
    assert len(uses) == len(calls) <= 1
    assert all("weights_only=True" in call for _, call in calls)


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
