"""What README and docs promise: links resolve, configs load, commands and flags exist, both languages say the same."""

import re
import shlex
import tomllib
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from command_line import ranks_started
from longtake.cli import app
from longtake.config.conflicts import conflicts
from longtake.config.load import load_config
from longtake.config.schema import RunConfig
from longtake.models.wan.variants import VARIANTS

ROOT = Path(__file__).parents[1]
READMES = (ROOT / "README.md", ROOT / "README.zh-CN.md")
PAGES = (*READMES, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
PLANNED: set[str] = set()
"""Commands that the pages name only to say that they are not there yet."""

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\[[^\]\n]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^(#+) (.+)$", re.MULTILINE)
_TOOLS = re.compile(r"^(longtake|make|pip|python|tensorboard|torchrun) ", re.MULTILINE)


def named(paths: Sequence[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=lambda path: str(path.relative_to(ROOT)))


def fences(path: Path, language: str) -> list[str]:
    """The fenced blocks of one language, without the fences."""
    return [body for found, body in _FENCE.findall(path.read_text(encoding="utf-8")) if found == language]


def prose(path: Path) -> str:
    """The page without its fenced blocks."""
    return _FENCE.sub("", path.read_text(encoding="utf-8"))


def headings(path: Path) -> list[tuple[int, str]]:
    return [(len(marks), text) for marks, text in _HEADING.findall(prose(path))]


def anchor(heading: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def invocations(text: str) -> Iterator[tuple[str, list[str]]]:
    """(subcommand, flags) of every `longtake ...` in fences and inline code."""
    blocks = [body for _, body in _FENCE.findall(text)]
    lines = [line for body in blocks for line in body.replace("\\\n", " ").splitlines()]
    for code in (*lines, *_CODE.findall(_FENCE.sub("", text))):
        if match := re.search(r"(?:^|\s)longtake (\w+)\b(.*)", code.strip().removeprefix("# ")):
            words = shlex.split(match[2], comments=True)
            yield match[1], [word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)]


@cache
def command_line() -> dict[str, set[str]]:
    """Each subcommand and its flags, in all spellings."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]  # a group, since there are several
    return {
        name: {flag for parameter in command.params for flag in parameter.opts} for name, command in commands.items()
    }


@named(PAGES)
def test_relative_links_resolve_to_files_and_headings(path: Path) -> None:
    broken = []
    for link in _LINK.findall(prose(path)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, fragment = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.exists() or (fragment and fragment not in {anchor(text) for _, text in headings(target)}):
            broken.append(link)
    assert broken == []


@named(PAGES)
def test_every_toml_block_is_a_config_or_completes_one(path: Path) -> None:
    smallest: dict[str, dict[str, Any]] = {
        "model": {"name": "tiny-i2v"},
        "data": {"source": "x"},
        "output": {"run": "r"},
    }
    for block in fences(path, "toml"):
        table = tomllib.loads(block)
        parts = {name: smallest.get(name, {}) | table.get(name, {}) for name in {**smallest, **table}}
        assert not [*conflicts(RunConfig.model_validate(parts))]


@named(PAGES)
def test_every_command_and_flag_exists(path: Path) -> None:
    unknown = []
    for command, flags in invocations(path.read_text(encoding="utf-8")):
        known = command_line().get(command)
        if known is None and not (command in PLANNED and not flags):
            unknown.append(command)
        unknown += [f"{command} {flag}" for flag in flags if known is not None and flag not in known]
    assert unknown == []


@named(PAGES)
def test_every_flag_named_alone_belongs_to_some_command(path: Path) -> None:
    flags = {code.split()[0] for code in _CODE.findall(prose(path)) if re.match(r"--\w", code)}
    assert flags - set().union(*command_line().values()) == set()


def test_commands_that_the_pages_miss_are_missing() -> None:
    assert set(command_line()) & PLANNED == set()


@named(READMES)
def test_the_readme_names_every_model(path: Path) -> None:
    assert [name for name in VARIANTS if f"`{name}`" not in prose(path)] == []


@named(READMES)
def test_the_first_screen_has_the_numbers_and_the_commands(path: Path) -> None:
    first = path.read_text(encoding="utf-8").split("\n## ")[0]
    assert len(first.splitlines()) <= 45
    for part in ("69.0", "make demo", "longtake init", "longtake prepare", "longtake train"):
        assert part in first


def test_both_readmes_have_the_same_headings_tables_and_links() -> None:
    english, chinese = READMES
    assert [level for level, _ in headings(english)] == [level for level, _ in headings(chinese)]
    rows, links = (
        [*map(pattern.findall, map(prose, READMES))] for pattern in (re.compile(r"^\|", re.MULTILINE), _LINK)
    )
    assert len(rows[0]) == len(rows[1])
    swapped = {"README.zh-CN.md": "README.md"}
    assert sorted(swapped.get(link, link) for link in links[0]) == sorted(links[1])


def test_both_readmes_have_the_same_commands_and_configs() -> None:
    english, chinese = READMES
    assert fences(english, "bash") == fences(chinese, "bash")
    assert [tomllib.loads(block) for block in fences(english, "toml")] == [
        tomllib.loads(block) for block in fences(chinese, "toml")
    ]


def test_both_readmes_have_the_same_numbers_in_the_memory_table() -> None:
    first_screens = [path.read_text(encoding="utf-8").split("```")[0] for path in READMES]
    english, chinese = (re.findall(r"(?<=\| )[*+\d.]+(?= \|)", text) for text in first_screens)
    assert english == chinese
    assert {"**69.0**", "232", "+13"} < set(english)


@named(PAGES)
def test_shell_blocks_start_with_known_tools(path: Path) -> None:
    for block in fences(path, "bash"):
        for line in block.splitlines():
            assert _TOOLS.match(re.sub(r"^(\w+=\S+ )+", "", line)), line


@named(RECIPES)
def test_every_recipe_can_run_and_says_how_on_what_and_what_was_measured(path: Path) -> None:
    header = path.read_text(encoding="utf-8").split("\n\n")[0]
    assert not [*conflicts(load_config(path), ranks_started(header))]
    assert f"cp recipes/{path.name} run.toml" in header
    assert "longtake prepare run.toml" in header
    assert "longtake train run.toml" in header
    assert "# Hardware: " in header
    assert "measured" in header
