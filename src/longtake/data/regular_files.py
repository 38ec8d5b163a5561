"""Opening a file of a data set: a regular one, nothing that waits, and no link anywhere on the way to it."""

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from longtake.errors import DataError, Problem

_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
_READ = os.O_RDONLY | _NO_LINK | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
# to go through a folder takes less permission than to list it
_FOLDER = _NO_LINK | getattr(os, "O_PATH", os.O_RDONLY) | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_CLOEXEC", 0)

_HEAD_BYTES = 64 * 1024


@contextmanager
def open_regular(path: Path, where: str) -> Iterator[BufferedReader]:
    """The file at `path`, absolute and resolved, which must be a regular file; raises DataError naming `where`.

    No folder of the path and no name at its end may have become a link since it was resolved.
    """
    try:
        _refuse_irregular(path.lstat().st_mode, path.name, where)
        # Between the two calls the name may have become a FIFO or a link: neither may be waited on or followed.
        descriptor = _opened(path)
    except FileNotFoundError:
        raise refusal(f"{path.name} does not exist", where, "correct the path", code="file-missing") from None
    except (OSError, ValueError) as error:
        what = f"{path.name!r} cannot be opened ({error})"
        raise refusal(what, where, "correct the path or its permissions", code="file-unreadable") from None
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        _refuse_irregular(status.st_mode, path.name, where)
        if status.st_size == 0:
            raise refusal(f"{path.name} is empty (0 bytes)", where, "copy it again or leave it out", code="file-empty")
        yield file


def content_hash(path: Path) -> str:
    """SHA-256 of the file's content in hex; raises DataError if it is no regular file."""
    with open_regular(path, str(path)) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(path: Path, where: str) -> str:
    """SHA-256 in hex of the file's first 64 KiB and its size; raises DataError, naming `where`, if it cannot be read.

    Windows are drawn by it, and nothing is found by it: an entry's key has the hash of the whole content. Of two files
    with the same header, first pictures and size it would say that they are one; they would begin at the same place in
    their length, or, with other captions, at places of their own, and both are as good as any. So it is read when a
    file is looked at, while its headers are still in memory, where hashing whole films would take hours.
    """
    with open_regular(path, where) as file:
        try:
            head, size = file.read(_HEAD_BYTES), os.fstat(file.fileno()).st_size
        except OSError as error:
            what = f"{path.name} cannot be read ({error.strerror})"
            raise refusal(what, where, "look at the disk that it is on", code="file-unreadable") from None
    return hashlib.sha256(head + size.to_bytes(8, "big")).hexdigest()


def refusal(what: str, where: str, remedy: str, *, code: str) -> DataError:
    """The DataError of one problem."""
    return DataError(Problem(what, where, remedy, code=code))


def _opened(path: Path) -> int:
    """A descriptor of `path`, opened folder by folder where the system can, so that no link is followed."""
    if os.open not in os.supports_dir_fd or not path.is_absolute():
        return os.open(path, _READ)
    folder = os.open(path.anchor, _FOLDER)
    try:
        for name in path.parent.parts[1:]:
            inner = os.open(name, _FOLDER, dir_fd=folder)
            os.close(folder)
            folder = inner
        return os.open(path.name, _READ, dir_fd=folder)
    finally:
        os.close(folder)


def _refuse_irregular(mode: int, name: str, where: str) -> None:
    if stat.S_ISREG(mode):
        return
    kind = "a folder" if stat.S_ISDIR(mode) else "a link" if stat.S_ISLNK(mode) else "a pipe or a device"
    raise refusal(f"{name} is {kind}, not a file", where, "name a regular file", code="file-irregular")
