"""Writing files so that a kill at any moment leaves the old or the new, never a half: staged, synced, renamed."""

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from longtake.errors import Problem, RunError
from longtake.units import format_bytes

STAGED = ".staged-"
"""Infix of the names of files and folders that are being written."""

# safetensors raises its own error where the disk refuses a write
_REFUSALS = (OSError, SafetensorError)


def write_file(path: Path, write: Callable[[Path], None]) -> None:
    """Calls `write` with a temporary name beside `path`, syncs what it made and renames it to `path`.

    Raises RunError where the disk refuses.
    """
    staged = path.with_name(f"{path.name}{STAGED}{uuid.uuid4().hex[:12]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(staged)
        sync(staged)
        staged.replace(path)
        sync(path.parent)
    except _REFUSALS as error:
        raise _refused(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            staged.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """`text` to `path`, atomically."""
    write_file(path, lambda staged: _write_text(staged, text))


def write_json(path: Path, value: Any) -> None:
    """`value` as JSON to `path`, atomically."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Calls `write` with a temporary folder, adds a manifest of hashes, syncs everything and renames it to `path`.

    `path` must not exist. Raises RunError where the disk refuses.
    """
    staged = begin_folder(path)
    try:
        with refusals(path):
            write(staged)
            manifest = described(sorted(staged.iterdir()))
        finish_folder(staged, path, manifest)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def begin_folder(path: Path) -> Path:
    """A temporary folder that `finish_folder` makes `path` of; raises RunError where the disk refuses."""
    staged = path.with_name(f"{path.name}{STAGED}{uuid.uuid4().hex[:12]}")
    with refusals(path):
        staged.mkdir(parents=True)
    return staged


def described(written: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """What the manifest says of files, which are on the disk afterwards."""
    manifest = {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in written}
    for file in written:
        sync(file)
    return manifest


def finish_folder(staged: Path, path: Path, manifest: Mapping[str, Any]) -> None:
    """Writes the manifest of all files in `staged` and renames it to `path`; raises RunError where the disk refuses."""
    with refusals(path):
        _write_text(staged / "manifest.json", json.dumps(dict(sorted(manifest.items())), indent=1))
        sync(staged / "manifest.json")
        sync(staged)
        staged.rename(path)
        sync(path.parent)


@contextlib.contextmanager
def refusals(path: Path) -> Iterator[None]:
    """What the disk refuses in the context becomes a RunError that names `path` and what is free there."""
    try:
        yield
    except _REFUSALS as error:
        raise _refused(path, error) from error


def damage(folder: Path) -> str | None:
    """What is wrong with a folder that `write_folder` made, by its manifest; None where nothing is."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        for name, expected in manifest.items():
            file = folder / name
            if file.stat().st_size != expected["bytes"]:
                return f"{name} has {file.stat().st_size} bytes instead of {expected['bytes']}"
            if sha256(file) != expected["sha256"]:
                return f"{name} has changed since it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"its manifest cannot be read ({type(error).__name__})"
    return None


def remove_staged(folder: Path) -> None:
    """Removes what killed writers left in `folder`."""
    for path in folder.glob(f"*{STAGED}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Flushes a file or a folder to the disk; folders are skipped where the system cannot open them (Windows)."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _refused(path: Path, error: OSError | SafetensorError) -> RunError:
    blocking = next((parent for parent in path.parents if parent.exists() and not parent.is_dir()), None)
    if blocking is not None:
        return RunError(Problem(f"cannot write: {blocking} is no folder", str(path), "give another place"))
    try:
        free = f"{format_bytes(shutil.disk_usage(path.parent).free)} are free there"
    except OSError:
        free = ""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    return RunError(Problem(f"cannot write: {reason}", str(path), free))
