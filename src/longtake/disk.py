"""The operations that change what a disk holds, each of which can be watched: refused, recorded, or the last one.

Windows has no way to sync a folder: there a name that was just given may be lost with the power, a file's content not.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias


@dataclass(frozen=True)
class Operation:
    """One change: a folder made, a file or a new folder's files written, synced, renamed to `target`, or removed."""

    kind: Literal["make", "write", "sync", "rename", "remove"]
    path: Path
    target: Path | None = None


Watcher: TypeAlias = Callable[[Operation, bool], None]
"""Is told of an operation before it is made (False), where it may refuse it by an OSError, and when it is (True)."""

_watchers: list[Watcher] = []


@contextmanager
def watched(watch: Watcher) -> Iterator[None]:
    """Inside the context `watch` is told of every operation of this process."""
    _watchers.append(watch)
    try:
        yield
    finally:
        _watchers.remove(watch)


def make(folder: Path) -> None:
    """The folder and those above it that are missing; each is on the disk afterwards, not only in memory."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        with _operation("make", path):
            path.mkdir(exist_ok=True)  # another process may have been faster
        sync(path.parent)


def make_new(folder: Path) -> None:
    """The folder, which must not exist, in one that does."""
    with _operation("make", folder):
        folder.mkdir()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What is written to the file or into the new folder `path` inside the context is one operation."""
    with _operation("write", path):
        yield


def sync(path: Path) -> None:
    """Flushes a file or a folder to the disk; nothing for a folder on Windows."""
    if os.name == "nt" and path.is_dir():
        return
    with _operation("sync", path):
        # Windows flushes only what was opened for writing
        descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def rename(path: Path, target: Path) -> None:
    """A file in place of another, or a folder to a name that is free, in one move."""
    with _operation("rename", path, target):
        if path.is_dir():
            path.rename(target)
        else:
            path.replace(target)


def remove(path: Path) -> None:
    """The file, or the folder with all that is in it, as far as the system lets it; nothing where it is not there."""
    with _operation("remove", path):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def _operation(
    kind: Literal["make", "write", "sync", "rename", "remove"], path: Path, target: Path | None = None
) -> Iterator[None]:
    operation = Operation(kind, path, target)
    for watch in [*_watchers]:
        watch(operation, False)
    yield
    for watch in [*_watchers]:
        watch(operation, True)
