"""The processes of a run: who this one is, what they say to each other beside the training, and what one's end means.

What is said goes through the host (gloo), never through the device, and waits for nobody's copies or kernels.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as processes
from torch.distributed.rendezvous import rendezvous

from longtake.errors import ConfigError, LongtakeError, Problem, RunError, agreed

Said = TypeVar("Said")
TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for another that is alive; one that has died is noticed at once, by its closed connection."""
JOIN_TIMEOUT = timedelta(minutes=5)
"""How long a rank waits at the start for those that have not come yet."""
_LOST = re.compile(
    r"connection (closed|reset|refused)|broken pipe|socket closed|remote process|no route|failed to recv|"
    r"recvvalue failed|nccl communicator was aborted|unhandled system error|timed out waiting",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Ranks:
    """This process among `world`, `local_world` of them on this machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this one writes what all have in common."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """The CUDA device of this process among the visible ones, or the CPU."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", self.local_rank)

    def gathered(self, value: Said) -> list[Said]:
        """What every rank has, by rank."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        processes.all_gather_object(found, value)
        return found

    def shared(self, value: Said) -> Said:
        """What the first rank has."""
        if self.world == 1:
            return value
        found = [value]
        processes.broadcast_object_list(found, 0)
        return found[0]

    def summed(self, *values: float) -> list[float]:
        """Sums over all ranks, in float64."""
        if self.world == 1:
            return [*values]
        total = torch.tensor(values, dtype=torch.float64)
        processes.all_reduce(total)
        return total.tolist()

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on a rank."""
        return self.summed(float(flag))[0] > 0

    def each(self, run: Callable[[], Said]) -> Said:
        """What `run` gives on this rank; raises on all ranks what it raises on one, with that one named."""
        if self.world == 1:
            return run()
        given: Any = None
        failure: tuple[type[LongtakeError], tuple[Problem, ...]] | None = None
        try:
            given = run()
        except LongtakeError as error:
            failure = type(error), error.problems
        failures = {rank: found for rank, found in enumerate(self.gathered(failure)) if found is not None}
        if failures:
            raise _agreed(failures, self.world)
        return given

    def together(self, run: Callable[[], Said]) -> list[Said]:
        """What `run` gives on each rank; raises as `each`."""
        return self.gathered(self.each(run))

    def first(self, run: Callable[[], Said]) -> Said:
        """What `run` gives on the first rank, where alone it runs; raises on all ranks what it raises there."""
        return self.shared(self.each(lambda: run() if self.is_first else None))  # type: ignore[return-value]

    def one_by_machine(self, run: Callable[[], Said]) -> Said:
        """What `run` gives on this rank, after one rank of each machine has done it: what that fetched is there."""
        given = self.each(lambda: run() if self.local_rank == 0 else None)
        return self.each(lambda: run() if self.local_rank != 0 else given)  # type: ignore[return-value]


ALONE = Ranks()


def ranks_of_environment() -> Ranks:
    """As torchrun's variables have it; one process without them. Raises ConfigError where they make no sense."""
    names = {"rank": "RANK", "world": "WORLD_SIZE", "local_rank": "LOCAL_RANK", "local_world": "LOCAL_WORLD_SIZE"}
    given, problems = {}, []
    for field, name in names.items():
        text = os.environ.get(name, "")
        if text and not text.isdigit():
            problems.append(
                Problem(f"{text!r} is no number", name, "start the ranks with torchrun", code="rank-variables-wrong")
            )
        elif text:
            given[field] = int(text)
    if problems:
        raise ConfigError(problems)
    ranks = replace(ALONE, **given)
    if ranks.rank >= ranks.world:
        what = f"rank {ranks.rank} of {ranks.world}"
        raise ConfigError(Problem(what, "RANK", "start the ranks with torchrun", code="rank-variables-wrong"))
    return ranks


def job() -> str:
    """What torchrun calls its job, the same for all that it starts again; empty where it was given no name."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return "" if name == "none" else name


def restarted(begun_by: str) -> bool:
    """Whether a launcher has started this process again, and not the user for the first time, for a run of that job.

    Torchrun's count alone would not do: it starts ranks again that were refused, for which there was another run in
    their folder, and does not count where it does so because a machine has come.
    """
    if _is_positive("SLURM_RESTART_COUNT"):
        return True
    return job() == begun_by if job() else _is_positive("TORCHELASTIC_RESTART_COUNT")


def _is_positive(name: str) -> bool:
    count = os.environ.get(name, "0")
    return count.isdigit() and int(count) > 0


@contextmanager
def joined() -> Iterator[Ranks]:
    """Inside the context the ranks of torchrun's environment are connected; one process needs no connection.

    Raises ConfigError where they cannot meet, RunError where another rank has gone.
    """
    ranks = ranks_of_environment()
    if ranks.world == 1:
        try:
            yield ranks
        finally:
            leave()
        return
    _meet(ranks)
    try:
        yield ranks
    except RuntimeError as error:
        if is_lost(error):
            what = "lost another rank, whose own message says why"
            remedy = "the run goes on from its last checkpoint with --resume"
            raise RunError(Problem(what, "", remedy, code="rank-lost")) from error
        raise
    # not after an error: others may wait for what this one will not send, and its end tells them
    leave()


def connect_alone() -> None:
    """A group of this one process, for engines that ask for one."""
    if not processes.is_initialized():
        store = processes.HashStore()  # type: ignore[attr-defined]  # public, and not declared so
        processes.init_process_group(_transport(), store=store, rank=0, world_size=1)


def leave() -> None:
    """Ends the connection, if there is one."""
    if processes.is_initialized():
        processes.destroy_process_group()


def is_lost(error: BaseException) -> bool:
    """Whether an operation failed because another process has gone."""
    return isinstance(error, RuntimeError) and bool(_LOST.search(str(error)))


def _meet(ranks: Ranks) -> None:
    where = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
    if torch.cuda.is_available():
        if ranks.local_rank >= torch.cuda.device_count():
            given = os.environ.get("CUDA_VISIBLE_DEVICES")
            what = f"there is no GPU for it: {torch.cuda.device_count()} are visible to {ranks.local_world} ranks"
            place = "CUDA_VISIBLE_DEVICES" + (f"={given}" if given is not None else "")
            raise ConfigError(Problem(what, place, "start as many ranks as there are GPUs", code="rank-without-gpu"))
        torch.cuda.set_device(ranks.device)
    try:
        store, rank, world = next(rendezvous("env://", ranks.rank, ranks.world, timeout=JOIN_TIMEOUT))
        store.set_timeout(TIMEOUT)
        store = processes.PrefixStore("ranks", store)  # type: ignore[attr-defined]  # public, and not declared so
        processes.init_process_group(_transport(), store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        remedy = "set MASTER_ADDR and MASTER_PORT to a free port that all ranks reach, or start them with torchrun"
        raise ConfigError(
            Problem(
                f"cannot meet the other ranks, {ranks.world} in all ({reason})",
                where,
                remedy,
                code="rank-meeting-failed",
            )
        ) from error
    assert (processes.get_rank(), processes.get_world_size()) == (ranks.rank, ranks.world)


def _transport() -> str:
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def _agreed(failures: Mapping[int, tuple[type[LongtakeError], tuple[Problem, ...]]], world: int) -> LongtakeError:
    """One error of what ranks failed with: what all say once, what some say with their rank."""
    said: dict[Problem, list[int]] = {}
    for rank, (_, problems) in failures.items():
        for problem in problems:
            said.setdefault(problem, []).append(rank)
    found = [
        problem if len(ranks) == world or ranks == [0] else replace(problem, where=_on(ranks, problem.where))
        for problem, ranks in said.items()
    ]
    kind = max((kind for kind, _ in failures.values()), key=lambda each: each.exit_status)
    return agreed(kind(found))


def _on(ranks: Sequence[int], where: str) -> str:
    names = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
    return f"{names}: {where}" if where else names
