"""The command line in this process: what it prints, and its exit status."""

import io
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomlkit

from longtake.cli import main

Table = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Outcome:
    """One run of the command line."""

    status: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """What follows `error: ` on each such line; nothing else may be on stderr that looks like a failure."""
        assert "Traceback" not in self.err
        return [line.removeprefix("error: ") for line in self.err.splitlines() if line.startswith("error: ")]


def wrong(outcome: Outcome, *lines: str, status: int = 2) -> list[str]:
    """What is not as it should be: the status, an error for each of `lines`, which it contains, nothing on stdout."""
    pairs = zip(outcome.errors, lines, strict=False)
    found = [f"{line!r} is not in {error!r}" for error, line in pairs if line not in error]
    if outcome.status != status or len(outcome.errors) != len(lines):
        found.append(f"status {outcome.status}: {outcome.err}")
    return [*found, *([f"on stdout: {outcome.out}"] if outcome.out else [])]


def run(*arguments: object) -> Outcome:
    """Runs `longtake` with `arguments`."""
    out, err = io.StringIO(), io.StringIO()
    with _argv(["longtake", *map(str, arguments)]), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as left:
            status = left.code
    assert isinstance(status, int | None)
    return Outcome(status or 0, out.getvalue(), err.getvalue())


def succeed(*arguments: object) -> Outcome:
    """Runs `longtake` with `arguments`, which must work."""
    outcome = run(*arguments)
    assert outcome.status == 0, outcome.err
    return outcome


def write_config(path: Path, table: Table, changes: Table | None = None) -> Path:
    """Writes `table` with the keys of `changes` in it as TOML; a section that is None is left out."""
    merged = dict(table)
    for section, keys in (changes or {}).items():
        merged[section] = keys if keys is None else {**(table.get(section) or {}), **keys}
    path.write_text(tomlkit.dumps({name: keys for name, keys in merged.items() if keys is not None}))
    return path


def small_run(root: Path, source: Path, folder: Path) -> Table:
    """The table of a run of the tiny model in `root` that takes seconds: 5 frames of 32x32, two steps."""
    return {
        "model": {"path": str(root), "dtype": "fp32"},
        "data": {
            "source": str(source),
            "cache": str(folder / "cache"),
            "num_frames": 5,
            "size": [32, 32],
            "validation": 0,
        },
        "lora": {"rank": 2, "alpha": 2.0},
        "training": {"steps": 2, "global_batch_size": 1, "precision": "fp32", "warmup_steps": 0},
        "output": {"run": str(folder / "run"), "save_every": 1},
    }


def ranks_started(text: str) -> int:
    """How many ranks the command in a recipe's header starts."""
    if found := re.search(r"longtake train run\.toml --gpus (\d+)", text):
        return int(found[1])
    machines = re.search(r"torchrun --nnodes (\d+) --nproc-per-node (\d+) ", text)
    return int(machines[1]) * int(machines[2]) if machines else 1


@contextmanager
def _argv(arguments: Sequence[str]) -> Iterator[None]:
    before, sys.argv = sys.argv, list(arguments)
    try:
        yield
    finally:
        sys.argv = before
