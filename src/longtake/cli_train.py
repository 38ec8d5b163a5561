"""`longtake train`: in this process, as one of the ranks that torchrun started, or by starting ranks itself."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from longtake.config.conflicts import check
from longtake.config.flags import Flags, overrides
from longtake.config.load import load_config, parse_set
from longtake.errors import ConfigError, Problem

if TYPE_CHECKING:
    from longtake.config.schema import RunConfig
    from longtake.distributed.ranks import Ranks


@dataclass(frozen=True)
class Asked:
    """What the command line says; `gpus` is None where it says nothing of it."""

    config: Path
    resume: bool
    assignments: tuple[str, ...]
    gpus: int | None
    flags: Flags


def load(
    path: Path, assignments: Sequence[str], flags: Flags | None = None, ranks: int = 1, say: bool = True
) -> "RunConfig":
    """The config with flags and --set on top, each of which is printed; raises ConfigError where it cannot work."""
    given = parse_set(assignments)
    given += overrides(flags, path, given, ranks) if flags is not None else []
    config = load_config(path, given)
    for override in given if say else ():
        print(f"{override.key} = {override.value!r}  ({override.flag})", file=sys.stderr)  # noqa: T201
    if ranks > 1 and config.parallel.strategy == "auto":  # checked whole when the planner has said how ranks share
        from longtake.planner.candidates import open_conflicts

        if found := [*open_conflicts(config, ranks)]:
            raise ConfigError(found)
    else:
        check(config, ranks)
    return config


def train(asked: Asked, say: Callable[[str], None]) -> int:
    """Trains, and says where the result is; gives the exit status of the ranks that it started, else 0."""
    started = "WORLD_SIZE" in os.environ
    if started and asked.gpus is not None:
        what = f"torchrun has started {os.environ['WORLD_SIZE']} ranks already"
        raise ConfigError(
            Problem(what, "--gpus", "leave it out, or start longtake by itself", code="ranks-started-twice")
        )
    if asked.gpus is not None and asked.gpus != 1:
        return _launched(asked, asked.gpus)
    from longtake.distributed.launch import die_with_parent

    die_with_parent()
    # of one process at once, before torch is imported; of several where they can agree on what is wrong
    config = None if started else load(asked.config, asked.assignments, asked.flags)
    from longtake.distributed.ranks import joined

    with joined() as ranks:
        run = _as_rank(asked, config, ranks)
        if ranks.is_first:
            from longtake.web.report import write_report

            say(f"report:  {write_report(run)}")
            from longtake.training.outputs import results_of

            for path in results_of(run):
                say(f"result:  {path}")
    return 0


def _as_rank(asked: Asked, config: "RunConfig | None", ranks: "Ranks") -> Path:
    flags, world = asked.flags, ranks.world
    if config is None:
        config = ranks.each(lambda: load(asked.config, asked.assignments, flags, world, say=ranks.is_first))
    from longtake.models.libraries import quiet_libraries

    quiet_libraries()
    from longtake.distributed.start_checks import check_same
    from longtake.planner.request import needs_plan, planned_run
    from longtake.progress import Reporter
    from longtake.training.run import train as train_run
    from longtake.training.run_folder import goes_on

    check_same(ranks, config)  # a plan is the first rank's, with its config
    reporter = Reporter(quiet=not ranks.is_first)
    if ranks.is_first and (unused := _idle(ranks.local_world)):
        reporter.line(unused)
    resume = asked.resume or goes_on(Path(config.output.run), ranks)
    planned = None
    if needs_plan(config, world):
        asked_for = config
        config, planned = ranks.first(lambda: planned_run(asked_for, resume, world, ranks.local_world))
    return train_run(config, asked.resume, reporter, planned, ranks)


def _launched(asked: Asked, gpus: int) -> int:
    """Starts ranks on this machine; what is wrong with the config is said before, once."""
    from longtake.distributed.devices import VARIABLE, choose, installed
    from longtake.distributed.launch import launch, rank_environment

    chosen = choose(gpus, os.environ.get(VARIABLE), installed())
    load(asked.config, asked.assignments, asked.flags, gpus, say=False)
    return launch(sys.argv[1:], gpus, rank_environment(os.environ, gpus, bool(chosen)))


def _idle(used: int) -> str:
    from longtake.distributed.devices import VARIABLE, idle, installed, visible

    return idle(used, visible(os.environ.get(VARIABLE), installed()))
