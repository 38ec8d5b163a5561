"""Starts that are refused: one line each, on the first rank, that names the rank; nothing is written before."""

import json
import re
import shutil
import socket
import sys
from collections.abc import Callable
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from hosts import free_port
from launched import launched
from longtake.cli_train import Asked, train
from longtake.config.dump import to_toml
from longtake.config.flags import Flags
from longtake.distributed import ranks
from longtake.distributed.ranks import joined
from longtake.errors import ConfigError
from longtake.training.run_folder import LOCK
from runs import Scene, scene

SCRIPT = Path(__file__).with_name("refused_starts.py")
HERE = Path("/proc/self/cwd")
"""A path that is the same on all ranks and leads each to a folder of its own, as that of a disk of its own does."""
ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has /proc")
SAME = "give all ranks the same"


class Starts:
    """What two ranks start from, each in a folder of its own."""

    def __init__(self, where: Scene, folder: Path) -> None:
        self.where = where
        self.folder = folder

    def add(self, name: str, both: dict[str, Any] | None = None, second: dict[str, Any] | None = None) -> Path:
        """A run with changes to its sections on both ranks, and to others on the second one, whose folder it gives."""
        for rank, sections in enumerate((both or {}, {**(both or {}), **(second or {})})):
            host = self.folder / name / f"host-{rank}"
            host.mkdir(parents=True)
            (host / "run.toml").write_text(to_toml(self.where.config(HERE / "run", **sections)), encoding="utf-8")
        return host

    def add_with_caches(self, name: str) -> Path:
        """As `add`; each has a cache of its own, of which it gives the second one's."""
        second = self.add(name, {"data": {"cache": str(HERE / "cache")}})
        for host in self.folder.glob(f"{name}/host-*"):
            shutil.copytree(self.where.cache, host / "cache")
        return second / "cache"


@pytest.fixture
def starts(tiny_root: Callable[[str], Path], tmp_path: Path) -> Starts:
    """Over clips that are prepared."""
    where = scene("tiny-t2v", tiny_root("tiny-t2v"), tmp_path / "scene")
    where.prepare(where.config(HERE / "run"))
    return Starts(where, tmp_path / "starts")


@pytest.mark.long
@ON_LINUX
def test_what_ranks_do_not_have_in_common_is_one_line_that_names_the_rank_and_nothing_is_written(
    starts: Starts,
) -> None:
    add_all(starts)
    ended = launched(2, SCRIPT, *sorted(starts.folder.iterdir()))
    assert ended.returncode == 0, ended.stderr
    said = re.sub(r" \[[a-z-]+\]\n", "\n", ended.stdout)  # without the codes
    assert re.sub("[0-9a-f]{40}", "...", said).splitlines() == [
        "batch: 2 training.global_batch_size: 3 is no multiple of 2 ranks x micro-batch 1; "
        "the nearest that work: 2 or 4",
        f"config: 2 lora.rank: rank 1 has 4, rank 0 has 2; {SAME}",
        f"config: 2 training.seed: rank 1 has 7, rank 0 has 0; {SAME}",
        f"library: 2 deepspeed: rank 1 has 0.0.1, rank 0 has {version('deepspeed')}; {SAME}",
        "no config: 2 rank 1: run.toml: there is no such file; make one with `longtake init`",
        "older cache: 2 data.cache: rank 1 has ..., rank 0 has ...; put the cache where all ranks see it",
        f"part of a cache: 2 rank 1: {HERE}/cache: 1 of 9 entries are missing; run `longtake prepare` again",
        f"run folder: 2 rank 1: {HERE}/run: the folder is not the one that rank 0 writes to; "
        "put it on a file system that all machines share",
        "ways: 2 parallel.sp: 2 ranks cannot be shared out 3 ways; use one of 1, 2",
    ]
    assert {path.name for path in starts.folder.glob("*/host-*/run/*")} <= {LOCK}


def add_all(starts: Starts) -> None:
    """One start for each thing that ranks must have in common, and two that cannot work on so many of them."""
    library = starts.add("library") / "libraries" / "deepspeed-0.0.1.dist-info"
    library.mkdir(parents=True)
    (library / "METADATA").write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.0.1\n", encoding="utf-8")
    starts.add("config", second={"lora": {"rank": 4}, "training": {"seed": 7}})
    (starts.add("no config") / "run.toml").unlink()
    (manifest,) = (starts.add_with_caches("older cache") / "manifests").iterdir()
    table = json.loads(manifest.read_text(encoding="utf-8"))
    del table["content"]  # its hash, which an older version did not write
    manifest.write_text(json.dumps(table | {"entries": table["entries"][1:]}), encoding="utf-8")
    next((starts.add_with_caches("part of a cache") / "latents").iterdir()).unlink()
    starts.add("run folder")
    starts.add("batch", {"training": {"global_batch_size": 3}})
    starts.add("ways", {"parallel": {"sp": 3}})


@pytest.mark.long
@ON_LINUX
def test_the_command_line_says_it_once_for_all_ranks(starts: Starts) -> None:
    starts.add("config", second={"lora": {"rank": 4}, "training": {"seed": 7}})
    one = 'cd "$0/host-$RANK" && exec "$1" -m longtake train run.toml'
    ended = launched(2, "--no-python", "sh", "-c", one, starts.folder / "config", sys.executable)
    assert ended.returncode == 1  # torchrun's, whatever ranks leave with
    assert ended.stderr.count("exitcode  : 2") == 2
    assert [line for line in ended.stderr.splitlines() if line.startswith("error: ")] == [
        f"error: lora.rank: rank 1 has 4, rank 0 has 2; {SAME} [rank-differs]",
        f"error: training.seed: rank 1 has 7, rank 0 has 0; {SAME} [rank-differs]",
    ]


def alone_of_two(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    """Makes this process the first of two ranks, of which the other one does not come."""
    variables = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_a_port_that_is_in_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        alone_of_two(monkeypatch, port)
        said = f"^127.0.0.1:{port}: cannot meet the other ranks, 2 in all .*address already in use"
        with pytest.raises(ConfigError, match=said), joined():
            pass


def test_a_rank_that_does_not_come_is_waited_for_no_longer_than_one_that_starts_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ranks, "JOIN_TIMEOUT", timedelta(seconds=1))
    alone_of_two(monkeypatch, free_port())
    with pytest.raises(ConfigError, match="1/2 clients joined"), joined():
        pass


def test_ranks_that_torchrun_has_started_are_not_started_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    asked = Asked(tmp_path / "run.toml", resume=False, assignments=(), gpus=4, flags=Flags())
    with pytest.raises(ConfigError, match="--gpus: torchrun has started 2 ranks already"):
        train(asked, print)
