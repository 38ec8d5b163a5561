"""Writing files so that a kill at any moment leaves the old or the new, never a half: staged, synced, renamed."""

import errno
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from longtake import disk
from longtake.errors import Problem, RunError
from longtake.units import format_bytes

STAGED = ".staged-"
"""Infix of the names of files and folders that are being written."""
MANIFEST = "manifest.json"

# safetensors raises its own error where the disk refuses a write
_REFUSALS = (OSError, SafetensorError)
_NO_ROOM = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
_NOT_ALLOWED = {errno.EACCES, errno.EPERM, errno.EROFS}


def write_file(path: Path, write: Callable[[Path], None], needed_bytes: int = 0) -> None:
    """Calls `write` with a temporary name beside `path`, syncs what it made and renames it to `path`.

    Raises RunError where the disk refuses, which says how many bytes were needed where they are given.
    """
    staged = staged_name(path)
    with refusals(path, needed_bytes), removed_on_failure([staged]):
        disk.make(path.parent)
        with disk.writing(staged):
            write(staged)
        disk.sync(staged)
        disk.rename(staged, path)
        disk.sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """`text` to `path`, atomically."""
    write_file(path, lambda staged: _write_text(staged, text), len(text.encode()))


def write_json(path: Path, value: Any) -> None:
    """`value` as JSON to `path`, atomically."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Calls `write` with a temporary folder, adds a manifest of hashes, syncs everything and renames it to `path`.

    `path` must not exist. Raises RunError where the disk refuses.
    """
    staged = begin_folder(path)
    with removed_on_failure([staged]):
        with refusals(path):
            with disk.writing(staged):
                write(staged)
            manifest = described(sorted(staged.iterdir()))
        finish_folder(staged, path, manifest)


def replace_folder(path: Path, write: Callable[[Path], None]) -> None:
    """As `write_folder`, but another folder may be there: it keeps its name until the new one is on the disk.

    No system renames a folder onto another, so that a kill between two renames leaves neither with the name, and both
    beside it.
    """
    latest, previous = (path.with_name(f"{path.name}{STAGED}{age}") for age in ("latest", "previous"))
    with refusals(path):
        disk.remove(latest)
    write_folder(latest, write)
    with refusals(path):
        if path.exists():
            disk.remove(previous)
            disk.rename(path, previous)
        disk.rename(latest, path)
        disk.sync(path.parent)
        disk.remove(previous)


def begin_folder(path: Path) -> Path:
    """A temporary folder that `finish_folder` makes `path` of; raises RunError where the disk refuses."""
    staged = staged_name(path)
    with refusals(path):
        disk.make(path.parent)
        disk.make_new(staged)
    return staged


def described(written: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """What the manifest says of files, which are on the disk afterwards."""
    manifest = {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in written}
    for file in written:
        disk.sync(file)
    return manifest


def finish_folder(staged: Path, path: Path, manifest: Mapping[str, Any]) -> None:
    """Writes the manifest of all files in `staged` and renames it to `path`; raises RunError where the disk refuses."""
    with refusals(path):
        with disk.writing(staged / MANIFEST):
            _write_text(staged / MANIFEST, json.dumps(dict(sorted(manifest.items())), indent=1))
        disk.sync(staged / MANIFEST)
        disk.sync(staged)
        disk.rename(staged, path)
        disk.sync(path.parent)


def discard_folder(path: Path) -> None:
    """Removes a folder; at no moment, kills and power included, a part of it has its name. Raises RunError."""
    gone = path.with_name(f"{path.name}{STAGED}removed")
    with refusals(path):
        disk.remove(gone)  # what a kill has left of one of the same name
        disk.rename(path, gone)
        disk.sync(path.parent)
        disk.remove(gone)


class Appended:
    """A file that grows by what `write` is given: all of it, or a RunError. What was refused is not tried again.

    A kill, or the power, may leave a part of what came last.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with refusals(path):
            self.file = path.open("ab", buffering=0)

    def write(self, content: bytes) -> None:
        """At the end."""
        with refusals(self.path, len(content)):
            while content:  # a disk that becomes full takes a part first
                content = content[self.file.write(content) :]

    def sync(self) -> None:
        """Has all of it on the disk."""
        with refusals(self.path):
            disk.sync(self.path)

    def close(self) -> None:
        """Ends the file."""
        self.file.close()


@contextmanager
def refusals(path: Path, needed_bytes: int = 0) -> Iterator[None]:
    """What the disk refuses in the context becomes a RunError that names `path`, what is needed and what is free."""
    try:
        yield
    except _REFUSALS as error:
        raise _refused(path, error, needed_bytes) from error


@contextmanager
def removed_on_failure(paths: Sequence[Path]) -> Iterator[None]:
    """Files and folders that go where the context fails; `paths` may grow inside."""
    try:
        yield
    except BaseException:
        for path in paths:
            with suppress(OSError):
                disk.remove(path)
        raise


def damage(folder: Path) -> str | None:
    """What is wrong with a folder that `write_folder` made, by its manifest; None where nothing is.

    Of files that were added the hidden ones, which systems leave, are nobody's.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, expected in manifest.items():
            file = folder / name
            if file.stat().st_size != expected["bytes"]:
                return f"{name} has {file.stat().st_size} bytes instead of {expected['bytes']}"
            if sha256(file) != expected["sha256"]:
                return f"{name} has changed since it was written"
        found = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
        if added := sorted(found - {MANIFEST, *manifest}):
            return f"{added[0]} is not in its manifest"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        return f"its manifest cannot be read ({type(error).__name__})"
    return None


def remove_staged(folder: Path) -> None:
    """Removes what killed writers left in `folder`."""
    for path in folder.glob(f"*{STAGED}*"):
        disk.remove(path)


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def free_bytes(path: Path) -> int:
    """What the disk has left where `path` is or will be; raises OSError."""
    existing = next(place for place in (path, *path.absolute().parents) if place.exists())
    return shutil.disk_usage(existing).free


def staged_name(path: Path) -> Path:
    """Another name beside `path` each time."""
    return path.with_name(f"{path.name}{STAGED}{uuid.uuid4().hex[:12]}")


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _refused(path: Path, error: OSError | SafetensorError, needed_bytes: int) -> RunError:
    blocking = next((parent for parent in path.parents if parent.exists() and not parent.is_dir()), None)
    if blocking is not None:
        return RunError(
            Problem(
                f"cannot write: {blocking} is no folder", str(path), "give another place", code="disk-place-blocked"
            )
        )
    number = _number(error)
    reason = os.strerror(number) if number is not None else error
    return RunError(
        Problem(f"cannot write: {reason}", str(path), _remedy(path, number, needed_bytes), code=_code(number))
    )


def _number(error: OSError | SafetensorError) -> int | None:
    """The system's number of the error, which safetensors has in its text."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else None


def _code(number: int | None) -> str:
    if number in _NOT_ALLOWED:
        return "disk-not-writable"
    return "disk-full" if number in _NO_ROOM else "disk-write-failed"


def _remedy(path: Path, number: int | None, needed_bytes: int) -> str:
    if number in _NOT_ALLOWED:
        return "make it writable, or give another place"
    if number not in _NO_ROOM:
        return ""
    needed = f"{format_bytes(needed_bytes)} are needed, " if needed_bytes else ""
    try:
        return f"{needed}{format_bytes(free_bytes(path))} are free there; make room"
    except OSError:
        return f"{needed}make room"
