"""The folder of a run: made once, continued only when asked or restarted, used by one process at a time."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from longtake import disk, files
from longtake.config.dump import to_toml
from longtake.config.load import changed_keys, load_config
from longtake.config.schema import RunConfig
from longtake.distributed.ranks import Ranks, job, restarted
from longtake.errors import ConfigError, Problem
from longtake.training.checkpoint import FOLDER as CHECKPOINTS
from longtake.training.run_events import FILE as EVENTS

CONFIG = "config.toml"
LOCK = ".lock"
SCRATCH = "scratch"
"""Where a memory strategy keeps on disk what it moves there."""
JOB = ".job"
"""Torchrun's name of the job that began or continued the run."""
FREE_TO_CHANGE = (
    "output.",
    "validation.",
    "memory.",
    "parallel.",
    "training.steps",
    "training.micro_batch_size",
    "data.cache",
    "data.workers",
)
"""Keys that a resumed run may change: they do not decide what a step computes, but for `steps`, which is said."""


def check_run(config: RunConfig, resume: bool, say: Callable[[str], None]) -> None:
    """Raises ConfigError where the run's folder is there without `resume`, or was made by another config."""
    run = Path(config.output.run)
    stored = run / CONFIG
    if not resume and _holds_something(run):
        remedy = "add --resume to continue it, or set another output.run"
        raise ConfigError(Problem("the run folder is not empty", str(run), remedy, code="run-folder-not-empty"))
    if resume and not stored.is_file():
        raise ConfigError(
            Problem("there is no run to resume", str(run), "leave out --resume", code="run-nothing-to-resume")
        )
    if resume:
        _compare(load_config(stored), config, say)


@contextmanager
def open_run(config: RunConfig, resume: bool, say: Callable[[str], None]) -> Iterator[Path]:
    """The run's folder, held against other processes, without what a killed one left half written.

    Raises ConfigError as `check_run` does, and where the folder is in use or cannot be made.
    """
    check_run(config, resume, say)
    run = Path(config.output.run)
    try:
        disk.make(run)
    except OSError as error:
        what = f"the run folder cannot be made ({error.strerror})"
        raise ConfigError(Problem(what, str(run), "set another output.run", code="run-folder-not-made")) from None
    with _held(run):
        for folder in (run, run / CHECKPOINTS, run / "samples"):
            files.remove_staged(folder)
        yield run


def goes_on(run: Path, ranks: Ranks) -> bool:
    """Whether a launcher has started `ranks` again to continue what they had begun in `run`."""
    begun_by = ranks.first(lambda: _begun_by(run))
    return begun_by is not None and ranks.any(restarted(begun_by))


def record_config(config: RunConfig, run: Path) -> None:
    """Writes the resolved config; from then on the run has begun and is continued only with `resume`."""
    files.write_text(run / JOB, job())
    files.write_text(run / CONFIG, to_toml(config))


def _begun_by(run: Path) -> str | None:
    """The job's name, which may be empty; None where no run has begun."""
    if not (run / CONFIG).is_file():
        return None
    path = run / JOB
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _holds_something(run: Path) -> bool:
    """Whether anything is in the folder but what a process killed before it began leaves there."""
    left = (LOCK, JOB, SCRATCH, EVENTS)
    return run.exists() and any(path.name not in left and files.STAGED not in path.name for path in run.iterdir())


def _compare(before: RunConfig, after: RunConfig, say: Callable[[str], None]) -> None:
    problems = []
    for key, (old, new) in changed_keys(before, after).items():
        if key.startswith(FREE_TO_CHANGE):
            say(f"resumed with another {key}: {new!r} instead of {old!r}")
        else:
            remedy = "start a new run with it, or change it back"
            problems.append(
                Problem(f"the run was started with {old!r}, not {new!r}", key, remedy, code="run-settings-changed")
            )
    if problems:
        raise ConfigError(problems)


@contextmanager
def _held(run: Path) -> Iterator[None]:
    if os.name == "nt":  # no flock there; two runs in one folder are then the user's to avoid
        yield
        return
    import fcntl

    with (run / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                Problem("another process trains in this folder", str(run), "wait for it", code="run-in-use")
            ) from None
        yield
