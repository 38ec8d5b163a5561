"""Disks that are full, or take nothing: one line that says where and what is free, and all that was there stays."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from longtake import disk, files
from longtake.config.dump import to_toml
from longtake.config.schema import RunConfig
from longtake.data.cache import Cache
from longtake.distributed.pieces import Piece
from longtake.errors import RunError
from longtake.training.checkpoint import check_room, load_newest
from rank_threads import on_ranks
from refusals import Refusing, operations_of
from runs import Scene, assert_same_run
from saved import equal, numbered, read, save

SERVER = Path(__file__).with_name("small_disks.py")
PAGE = 4096
"""What a file on a tmpfs takes at least."""
LARGE = 2**26


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO])
def test_a_disk_that_refuses_any_operation_of_a_save_is_named_and_the_last_checkpoint_stays(
    tmp_path: Path, error: int
) -> None:
    save(tmp_path / "count", numbered(1), keep=1)
    count = operations_of(lambda: save(tmp_path / "count", numbered(2), keep=1))
    removing = 0
    for number in range(1, count + 1):
        run = tmp_path / str(number)
        save(run, numbered(1), keep=1)
        refusing = Refusing(number, error)
        with pytest.raises(RunError) as raised, disk.watched(refusing):
            save(run, numbered(2), keep=1)
        (problem,) = raised.value.problems
        assert raised.value.exit_status == 1
        assert problem.what == f"cannot write: {os.strerror(error)}"
        assert "checkpoints/step-0000000" in problem.where
        if error in (errno.ENOSPC, errno.EDQUOT):
            assert "are free there" in problem.remedy
        newest = load_newest(run, pytest.fail)
        assert newest is not None
        assert equal(read(newest.folder), numbered(newest.step))
        removing += newest.step == 2  # the new one was there, and the old one could not be removed
        files.remove_staged(run / "checkpoints")
        save(run, numbered(3), keep=1)
        assert names(run / "checkpoints") == ["step-00000003"]
    assert removing >= 3


def test_a_rank_that_has_no_room_ends_the_save_on_all_ranks_with_its_name(tmp_path: Path) -> None:
    on_ranks(2, lambda ranks: save(tmp_path, numbered(1), 1, ranks))

    def refuse(operation: disk.Operation, done: bool) -> None:
        if not done and operation.path.name.endswith("-00002-of-00002.safetensors"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def saved(ranks: Any) -> str:
        with pytest.raises(RunError) as raised:
            save(tmp_path, numbered(2), 1, ranks)
        return str(raised.value)

    with disk.watched(refuse):
        lines = on_ranks(2, saved)
    assert all("No space left on device" in line and "rank 1" in line for line in lines)
    assert names(tmp_path / "checkpoints") == ["step-00000001"]


def test_what_a_checkpoint_needs_and_what_is_free_is_said(tmp_path: Path) -> None:
    full = Refusing(4, errno.ENOSPC)
    (tmp_path / "checkpoints").mkdir()
    line = r"; [89]\d\d B are needed, \d.* are free there; make room \[disk-full\]$"
    with pytest.raises(RunError, match=line), disk.watched(full):
        save(tmp_path, numbered(1), keep=1)


def test_a_full_disk_leaves_no_entry_in_the_cache(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    write = lambda key: cache.write("latents", key, {"latents": torch.ones(1000)})  # noqa: E731
    write("first")  # makes the folders
    for number in range(1, operations_of(lambda: write("counted")) + 1):
        said = r"No space left on device; 3\.9 KiB are needed"
        with pytest.raises(RunError, match=said), disk.watched(Refusing(number, errno.ENOSPC)):
            write(f"key-{number}")
        if cache.has("latents", f"key-{number}"):  # refused when its folder was synced
            assert len(cache.read("latents", f"key-{number}")["latents"]) == 1000
    assert not [*tmp_path.rglob("*.staged-*")]


def test_a_disk_without_room_for_one_checkpoint_is_said_before_the_first_step(tmp_path: Path) -> None:
    large = [Piece("a", (2**52,), 0, torch.empty(2**52, device="meta"))]
    with pytest.raises(RunError, match=r"a checkpoint takes 16384\.0 TiB and .* are free there; make room, then"):
        check_room(tmp_path, {"trained": large}, 3, pytest.fail)
    check_room(tmp_path, {"trained": [replace(large[0], saved=False)]}, 3, pytest.fail)


def test_a_disk_without_room_for_all_checkpoints_that_are_kept_is_said(tmp_path: Path) -> None:
    small = {"trained": [Piece("a", (4,), 0, torch.ones(4))]}
    said: list[str] = []
    check_room(tmp_path, small, 2**58, said.append)
    (line,) = said
    assert "the disk may become full: there are to be 288230376151711745 checkpoints of 117 B and" in line
    check_room(tmp_path, small, 3, pytest.fail)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write where nobody may")
def test_a_run_folder_that_may_not_be_written_is_named(tmp_path: Path) -> None:
    save(tmp_path, numbered(1), keep=2)
    (tmp_path / "checkpoints").chmod(0o555)
    try:
        with pytest.raises(RunError, match="Permission denied; make it writable, or give another place"):
            save(tmp_path, numbered(2), keep=2)
    finally:
        (tmp_path / "checkpoints").chmod(0o755)


@dataclass(frozen=True)
class SmallDisks:
    """Asks the process of `small_disks.py`, the only one that has the disks."""

    server: subprocess.Popen[str]
    folder: Path

    def run(self, size: int, config: Path, resume: bool) -> tuple[int, str]:
        """(exit status, output) of `longtake train` on a disk of `size` bytes, the one that is there or a new one."""
        arguments = ["train", str(config), *(["--resume"] if resume else [])]
        return self.ask(size, arguments)["status"], self.output.read_text()

    def ask(self, size: int | None, arguments: Sequence[str] = ()) -> dict[str, Any]:
        """The server's answer."""
        assert self.server.stdin is not None
        request = {"folder": str(self.folder), "bytes": size, "arguments": arguments, "output": str(self.output)}
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return self.answer()

    def answer(self) -> Any:
        """The next line."""
        assert self.server.stdout is not None
        line = self.server.stdout.readline()
        assert line, "the server has ended"
        return json.loads(line)

    @property
    def output(self) -> Path:
        """What the command line printed last."""
        return self.folder.parent / "output.txt"

    def seen(self, path: Path) -> Path:
        """A path on the disk as this process can read it."""
        return Path(f"/proc/{self.server.pid}/root{path}")


@contextmanager
def small_disks(first: Path, folder: Path) -> Iterator[SmallDisks]:
    """Disks at `folder`; skips the test where the system allows no mounts. `first` is a run to warm up with."""
    own = ["unshare", "-rm"]
    trial = [*own, "mount", "-t", "tmpfs", "tmpfs", str(folder)]
    if shutil.which("unshare") is None or subprocess.run(trial, capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here (unshare -rm)")
    command = [*own, sys.executable, str(SERVER), str(first)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, **pipes) as server:
        disks = SmallDisks(server, folder)
        assert disks.answer() == "ready"
        yield disks
        assert server.stdin is not None
        server.stdin.close()


def config_in(scene: Scene, run: Path) -> RunConfig:
    return scene.config(run, training={"ema": 0.5, "steps": 3}, output={"keep": 9, "formats": ("comfyui", "kohya")})


def written(config: RunConfig, path: Path) -> Path:
    path.write_text(to_toml(config))
    return path


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("count", [8, pytest.param(30, marks=pytest.mark.slow)])
def test_a_run_on_a_disk_that_becomes_full_ends_with_a_line_and_goes_on_to_the_bit_when_there_is_room(
    scenes: Callable[[str], Scene], tmp_path: Path, count: int
) -> None:
    scene, folder = scenes("tiny-t2v"), tmp_path / "disk"
    folder.mkdir()
    whole = tmp_path / "whole"
    with small_disks(written(config_in(scene, whole), tmp_path / "whole.toml"), folder) as disks:
        config = written(config_in(scene, folder / "run"), tmp_path / "trial.toml")
        status, output = disks.run(LARGE, config, False)
        assert status == 0, output
        most = disks.ask(LARGE, ["--help"])["used_bytes"]
        disks.ask(None)
        # none for a checkpoint, then for some of what is written, to the last of it
        sizes = [PAGE, most // 6, *range(most // 4, most - 6 * PAGE, most * 3 // 4 // (count - 4) + 1)]
        ended = {check_one(disks, config, whole, size) for size in (*sizes, most - 5 * PAGE, most - 2 * PAGE)}
        assert len(ended) >= 4, "the sizes make runs end at several places"


def check_one(disks: SmallDisks, config: Path, whole: Path, size: int) -> str:
    """A run on a disk of `size` bytes fails as it should, and goes on on a larger one; gives where it failed."""
    run = disks.folder / "run"
    status, output = disks.run(size, config, False)
    assert status == 1, output
    assert "Traceback" not in output
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert str(run) in line
    assert "free" in line
    newest = load_newest(disks.seen(run), pytest.fail)
    assert newest is None or newest.step <= 3
    begun = disks.seen(run / "config.toml").exists()
    status, output = disks.run(LARGE, config, begun)
    assert status == 0, output
    assert_same_run(whole, disks.seen(run), step=3)
    assert not [*disks.seen(run).rglob("*.staged-*")]
    disks.ask(None)
    return line.removeprefix(f"error: {run}").split(":")[0]
