"""Claims on work: how ranks that share a file system and nothing else divide it, and finish what a dead one left.

A claim is a small file that its owner makes, keeps fresh while it works and removes in the end. It saves work and
protects nothing: what is claimed is a function of its name and appears by renaming. Where two ranks make it after all
(one was stopped for a minute, and its claim taken over), the later file replaces the earlier one, and is as good.
"""

import contextlib
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from longtake.files import STAGED

CLAIM = ".claim"
"""How the name of a claim ends."""
STALE_SECONDS = 60.0
"""A claim that was not refreshed for so long is a dead rank's. Network file systems may show a refresh seconds late."""
REFRESH_SECONDS = 5.0
POLL_SECONDS = 0.5

T = TypeVar("T")


@dataclass(frozen=True)
class Claims:
    """What rank `rank` of `world` does of the work in `folder`; `say` tells for whom it has been waiting for long."""

    folder: Path
    rank: int
    world: int
    say: Callable[[str], None]
    stale_seconds: float = STALE_SECONDS
    refresh_seconds: float = REFRESH_SECONDS
    poll_seconds: float = POLL_SECONDS

    def turns(
        self, items: Sequence[T], name: Callable[[T], str], done: Callable[[T], bool]
    ) -> Generator[T, None, None]:
        """Yields what this rank has to do, its own share first, and ends when everything is done by whomever.

        An item, of which `name` is unique in the folder, is claimed until the next one is asked for, and has to be
        done by then. The generator is to be closed, so that an error releases the claim. One rank claims nothing.
        """
        if self.world == 1:
            yield from (item for item in items if not done(item))
            return
        left = [item for share in range(self.world) for item in items[(self.rank + share) % self.world :: self.world]]
        rounds = 0
        while left := (yield from self._round(left, name, done)):
            if rounds == round(self.stale_seconds / self.poll_seconds):
                self.say(f"waits for {name(left[0])}, which {self._owner(name(left[0]))} is at")
            rounds += 1
            time.sleep(self.poll_seconds)

    @contextlib.contextmanager
    def held(self, name: str, now: float) -> Iterator[bool]:
        """Whether the claim on `name` is this rank's, and inside the context stays so.

        `now` is the time by `clock`: a claim that is stale then is taken over.
        """
        path, owner = self._path(name), f"rank {self.rank} (process {os.getpid()} of {socket.gethostname()})"
        mark = f"{owner}\n{uuid.uuid4().hex}\n"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not (_made(path, mark) or (self._moved_away(path, now) and _made(path, mark))):
            yield False
            return
        released = threading.Event()
        refreshing = threading.Thread(target=self._refresh, args=(path, released), name="claim", daemon=True)
        refreshing.start()
        try:
            yield True
        finally:
            released.set()
            refreshing.join()
            _remove(path, mark)

    def _round(
        self, items: Sequence[T], name: Callable[[T], str], done: Callable[[T], bool]
    ) -> Generator[T, None, list[T]]:
        """Yields what can be claimed of what is not done, and returns what others have claimed."""
        now, others = clock(self.folder), []
        for item in items:
            if done(item):
                continue
            with self.held(name(item), now) as mine:
                if not mine:
                    others.append(item)
                elif not done(item):  # its last owner may have finished between the look and the claim
                    yield item
        return others

    def _moved_away(self, path: Path, now: float) -> bool:
        """Moves a stale claim aside, which of several ranks one can; False where it is not stale or not there."""
        aside = path.with_name(f"{path.name}{STAGED}{uuid.uuid4().hex[:12]}")
        with contextlib.suppress(FileNotFoundError):
            if not self._is_stale(path, now):
                return False
            path.rename(aside)
            if self._is_stale(aside, now):
                aside.unlink()
                return True
            aside.rename(path)  # another rank was faster, and this is its claim
        return False

    def _is_stale(self, path: Path, now: float) -> bool:
        with path.open("rb") as file:  # a file's age may come from a network file system's memory until it is opened
            return now - os.fstat(file.fileno()).st_mtime > self.stale_seconds

    def _refresh(self, path: Path, released: threading.Event) -> None:
        while not released.wait(self.refresh_seconds):
            with contextlib.suppress(OSError):  # a claim that is lost costs work at most
                os.utime(path)

    def _owner(self, name: str) -> str:
        with contextlib.suppress(OSError):
            return self._path(name).read_text(encoding="utf-8").partition("\n")[0]
        return "another rank"

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}{CLAIM}"


def clock(folder: Path) -> float:
    """The time at which a file made in `folder` now is dated: clocks of nodes differ, that of a file system is one."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"clock{STAGED}{uuid.uuid4().hex[:12]}"
    path.touch()
    try:
        return path.stat().st_mtime
    finally:
        path.unlink()


def _made(path: Path, mark: str) -> bool:
    """Whether the claim could be made: not where there is one."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(mark)
    except FileExistsError:
        return False
    return True


def _remove(path: Path, mark: str) -> None:
    """Removes the claim unless it has become another's."""
    with contextlib.suppress(FileNotFoundError):
        if path.read_text(encoding="utf-8") == mark:
            path.unlink()
