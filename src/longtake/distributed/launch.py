"""Processes for `--gpus N`: started and watched by torch's elastic agent, as torchrun does, and ended with one status.

The agent runs in this process: the command line of torchrun makes every status 1, ends with a traceback and a table of
its own, and lets nobody see how each rank ended.
"""

import logging
import os
import signal
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from longtake.errors import InputError, NothingFits, Problem, RunError

if TYPE_CHECKING:
    from torch.distributed.launcher.api import LaunchConfig

STATUS_FILE = "LONGTAKE_STATUS_FILE"
"""The variable that names the file in which ranks leave their exit statuses."""
LAUNCHER = "LONGTAKE_LAUNCHER"
"""The variable with the process id of the launcher, which is the parent of the ranks."""
SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")
LEAVE_SECONDS = 24 * 3600
"""For ranks that a signal asked to stop: they end their step and save, however long. A second one ends them at once,
but for one that comes while the agent is still handing on the first: it is taken for the same."""
RESUME = "continue with --resume from the last checkpoint"
_SET_PARENT_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of prctl(2)."""


@dataclass(frozen=True)
class Ended:
    """A rank that did not leave with 0: `code` is its exit status, or minus a signal; noticed at that time."""

    rank: int
    code: int
    noticed_seconds: int


def launch(arguments: Sequence[str], processes: int, environment: Mapping[str, str], module: str = "longtake") -> int:
    """Runs `python -m <module> <arguments without --gpus>` as ranks on this machine; returns their exit status.

    `environment` is set for the ranks on top of this process's; see `rank_environment`. What ranks say is theirs alone.
    A signal that is not ignored is passed on, and the ranks leave in their own way. Raises RunError where a rank was
    killed. To be called from the main thread, which is the only one that signals reach.
    """
    with TemporaryDirectory(prefix="longtake-") as folder:
        statuses = Path(folder) / "statuses"
        own = {STATUS_FILE: str(statuses), LAUNCHER: str(os.getpid())}
        with _environment({**environment, **own}):
            return _run(["-P", "-m", module, *without_gpus(arguments)], processes, statuses)


def without_gpus(arguments: Sequence[str]) -> list[str]:
    """The arguments of a command line without `--gpus N` and `--gpus=N`."""
    kept, left = list[str](), iter(arguments)
    for argument in left:
        if argument == "--gpus":
            next(left, None)
        elif not argument.startswith("--gpus="):
            kept.append(argument)
    return kept


def rank_environment(environment: Mapping[str, str], processes: int, on_gpus: bool) -> dict[str, str]:
    """What ranks need beside torchrun's variables; none of it where `environment`, the user's, has its own value."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = {
        "OMP_NUM_THREADS": str(max(1, cores // processes)),
        # a store shared with the agent is gone, with what it knew, when the agent starts ranks anew
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # or each rank warns, with a stack of C++ frames, that another one has gone
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(LEAVE_SECONDS),  # the agent's, in place of 30, heeded from torch 2.12 on
    }
    if not on_gpus:
        wanted["DS_ACCELERATOR"] = "cpu"
    return {name: value for name, value in wanted.items() if name not in environment}


def leave_status(status: int) -> None:
    """Tells the launcher, if there is one, with which status this rank is about to leave: the last thing before."""
    path = os.environ.get(STATUS_FILE)
    if path:
        with open(path, "a", encoding="utf-8") as file:  # one short write at the end of it, whole among other ranks'
            file.write(f"{os.environ['RANK']} {status}\n")


def die_with_parent() -> None:
    """Has the system kill this process when torchrun, its parent, dies; nothing without torchrun, or outside Linux.

    To be called at a rank's start. Raises RunError where the parent has gone already.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or sys.platform != "linux":
        return
    import ctypes

    parent = int(os.environ.get(LAUNCHER, os.getppid()))
    if ctypes.CDLL(None, use_errno=True).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), "prctl")
    if os.getppid() != parent:
        raise RunError(
            Problem("the process that started it has gone", f"rank {os.environ.get('RANK', '?')}", code="launcher-gone")
        )


def verdict(ended: Sequence[Ended]) -> int:
    """The exit status of ranks of which `ended`, in the order of notice, did not leave with 0.

    Wrong input (2) and nothing that fits (3) are causes, 1 is what other ranks make of them. Raises RunError that names
    the ranks that were killed: those noticed first, since the agent itself then ends the rest, with SIGTERM and, 30
    seconds later, with SIGKILL.
    """
    told = [each.code for each in ended if each.code in (InputError.exit_status, NothingFits.exit_status)]
    if told:
        return told[0]
    first = ended[0]
    together = [each for each in ended if each.noticed_seconds <= first.noticed_seconds + 1]
    killed = [each for each in together if each.code < 0 and (each is first or each.code != -signal.SIGTERM)]
    if killed:
        raise RunError([_killed(each) for each in killed])
    return RunError.exit_status


def _run(command: Sequence[str], processes: int, statuses: Path) -> int:
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import launch_agent

    verbatim = [argument.replace("$", "$$") for argument in command]  # the agent puts values in for ${local_rank}
    try:
        with _signals() as heeded, _silent():
            launch_agent(_config(processes, heeded), sys.executable, verbatim)
    except ChildFailedError as error:
        ended = [Ended(rank, failure.exitcode, failure.timestamp) for rank, failure in error.failures.items()]
        return _settled(ended, processes, statuses)
    except SignalException as error:
        return _stopped(signal.Signals(error.sigval).name, processes, statuses)
    return 0


def _config(processes: int, heeded: str) -> "LaunchConfig":
    """As `torchrun --standalone`, but by an address that needs no name to be resolved, and without folders of logs."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig

    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
        signals_to_handle=heeded,
    )


def _settled(ended: Sequence[Ended], processes: int, statuses: Path) -> int:
    """The status after a failure: what a rank has told counts, and not that it crashed in leaving, as torch's can."""
    told = _told(statuses)
    if len(told) == processes:
        return _worst(told)
    return verdict([Ended(each.rank, told.get(each.rank, 0) or each.code, each.noticed_seconds) for each in ended])


def _stopped(name: str, processes: int, statuses: Path) -> int:
    """The status after a signal, when the agent does not tell how ranks ended."""
    told = _told(statuses)
    missing = [rank for rank in range(processes) if rank not in told]
    if missing:
        where = f"rank{'s' if missing[1:] else ''} {', '.join(map(str, missing))}"
        raise RunError(Problem(f"ended after {name} without a word", where, RESUME, code="rank-silent"))
    return _worst(told)


def _told(statuses: Path) -> dict[int, int]:
    """What ranks have told with `leave_status`."""
    lines = statuses.read_text(encoding="utf-8").splitlines() if statuses.exists() else []
    return {int(rank): int(status) for rank, status in map(str.split, lines)}


def _worst(told: Mapping[int, int]) -> int:
    failed = [Ended(rank, status, 0) for rank, status in told.items() if status != 0]
    return verdict(failed) if failed else 0


def _killed(ended: Ended) -> Problem:
    names = {number.value: number.name for number in signal.Signals}
    what = f"killed by {names.get(-ended.code, f'signal {-ended.code}')}"
    if ended.code == -signal.SIGKILL:
        what += ", as the system does where host memory runs out"
    return Problem(what, f"rank {ended.rank}", RESUME, code="rank-killed")


@contextmanager
def _environment(additions: Mapping[str, str]) -> Iterator[None]:
    """Inside, this process's environment, which the agent hands on, has `additions`."""
    before = dict(os.environ)
    os.environ.update(additions)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _signals() -> Iterator[str]:
    """Gives the names of the signals to pass on, all but ignored ones; restores the handlers that the agent replaces.

    Under nohup SIGHUP is ignored by launcher and ranks alike: an agent that took it would stop and then kill them.
    """
    handlers = {name: signal.getsignal(getattr(signal, name)) for name in SIGNALS if hasattr(signal, name)}
    heeded = {name: handler for name, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}
    try:
        yield ",".join(heeded)
    finally:
        for name, handler in heeded.items():
            signal.signal(getattr(signal, name), handler)


@contextmanager
def _silent() -> Iterator[None]:
    """Inside, nothing is logged: the agent would repeat in its own words what ranks have said."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
