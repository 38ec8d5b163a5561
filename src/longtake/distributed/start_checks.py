"""What must be the same on all ranks before the first step, and what an engine must really be."""

import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version

from longtake.config.load import flatten
from longtake.config.schema import ParallelConfig, RunConfig
from longtake.distributed.backend import Backend
from longtake.distributed.ranks import Ranks
from longtake.errors import ConfigError, Problem, agreed

LIBRARIES = ("longtake", "torch", "diffusers", "peft", "deepspeed")
SEEN_WITHIN = 10.0
"""Seconds after which what one machine has written must be seen by another: network file systems cache names."""
CLASSES = {"single": "SingleDevice", "ddp": "DataParallel", "fsdp2": "FullyShardedData"}


def versions() -> dict[str, str]:
    """Of what takes part in the computation, as installed in this process's environment."""
    found = {"python": python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


def check_same(ranks: Ranks, config: RunConfig) -> None:
    """Raises ConfigError on every rank where a library or a key of `config` is not the first rank's on each."""
    told = {key: str(value) for key, value in flatten(config.model_dump())}
    check_equal(ranks, {**versions(), **told}, "give all ranks the same")


def check_equal(ranks: Ranks, own: Mapping[str, str], remedy: str) -> None:
    """Raises ConfigError on every rank where a value of `own` is not the first rank's on each, one line a value."""
    if found := [*differences(ranks.gathered(dict(own)), remedy)]:
        raise agreed(ConfigError(found))


def differences(all_ranks: list[dict[str, str]], remedy: str) -> Iterator[Problem]:
    """What some ranks have otherwise than the first, by key."""
    first = all_ranks[0]
    for key in dict.fromkeys(key for each in all_ranks for key in each):
        others: dict[str | None, list[int]] = {}
        for rank, each in enumerate(all_ranks):
            if each.get(key) != first.get(key):
                others.setdefault(each.get(key), []).append(rank)
        for value, where in others.items():
            names = f"rank {where[0]} has" if len(where) == 1 else f"ranks {', '.join(map(str, where))} have"
            yield Problem(f"{names} {value}, rank 0 has {first.get(key)}", key, remedy, code="rank-differs")


def check_shared(
    ranks: Ranks, folder: Path, seconds: Callable[[], float] = time.monotonic, wait: float = SEEN_WITHIN
) -> None:
    """Raises ConfigError on every rank that does not see what the first rank writes into `folder`, which must exist."""
    if ranks.world == 1:
        return
    name = ranks.first(lambda: _left(folder))

    def look() -> None:
        until = seconds() + wait
        while not (folder / name).exists():
            if seconds() > until:
                what = "the folder is not the one that rank 0 writes to"
                raise ConfigError(
                    Problem(
                        what,
                        str(folder),
                        "put it on a file system that all machines share",
                        code="run-folder-not-shared",
                    )
                )
            time.sleep(0.1)

    try:
        ranks.each(look)
    finally:
        if ranks.is_first:
            (folder / name).unlink(missing_ok=True)


def check_engine(backend: Backend, parallel: ParallelConfig, ranks: Ranks) -> None:
    """Raises ConfigError on every rank where one has another engine than the config's, or another number of ranks."""

    def look() -> None:
        wanted = CLASSES.get(parallel.strategy, "ZeRO")
        found = type(backend).__name__
        size = group_size(backend)
        if found != wanted or size != ranks.world:
            what = f"the engine in force is {found} over {size} ranks, not {wanted} over {ranks.world}"
            raise ConfigError(
                Problem(what, "parallel.strategy", "start the ranks with torchrun or --gpus", code="engine-differs")
            )

    ranks.each(look)


def group_size(backend: Backend) -> int:
    """How many ranks the engine itself counts."""
    module = backend.module
    if hasattr(module, "dp_world_size"):  # DeepSpeed's
        return int(module.dp_world_size)
    if hasattr(module, "process_group"):  # DDP's
        return int(module.process_group.size())
    mesh = getattr(next(iter(backend.parameters.values())), "device_mesh", None)
    return int(mesh.size()) if mesh is not None else 1


def _left(folder: Path) -> str:
    name = f".seen-{uuid.uuid4().hex[:12]}"
    (folder / name).touch()
    return name
