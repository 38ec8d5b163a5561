"""Ranks that are threads of one process, for what ranks say to each other on the host."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from longtake.distributed.ranks import Ranks

Said = TypeVar("Said")
SECONDS = 60.0


class _Table:
    """Where each rank lays down what it has, and all take what is there when all have."""

    def __init__(self, world: int) -> None:
        self.barrier = threading.Barrier(world, timeout=SECONDS)
        self.laid: dict[int, Any] = {}

    def gathered(self, rank: int, value: Any) -> list[Any]:
        self.laid[rank] = value
        self.barrier.wait()
        found = [value for _, value in sorted(self.laid.items())]
        self.barrier.wait()  # nobody lays down the next before all have taken this
        return found


@dataclass(frozen=True)
class RankThread(Ranks):
    """This thread among `world`."""

    table: _Table | None = None

    def gathered(self, value: Said) -> list[Said]:
        """What every rank has, by rank."""
        assert self.table is not None
        return self.table.gathered(self.rank, value)

    def shared(self, value: Said) -> Said:
        """What the first rank has."""
        return self.gathered(value)[0]

    def summed(self, *values: float) -> list[float]:
        """Sums over all ranks."""
        return [sum(of_all) for of_all in zip(*self.gathered(values), strict=True)]


def on_ranks(world: int, run: Callable[[Ranks], Said]) -> list[Said]:
    """What `run` gives on each of `world` ranks; raises what the first that raises raised."""
    table = _Table(world)
    with ThreadPoolExecutor(world) as pool:
        started = [pool.submit(run, RankThread(rank, world, rank, world, table)) for rank in range(world)]
    return [each.result() for each in started]
