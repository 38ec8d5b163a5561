"""The conditioning cache: safetensors entries keyed by what made them, and manifests that list a data set's entries."""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from longtake import files
from longtake.data.claims import CLAIM, clock
from longtake.errors import CacheError, Problem

FORMAT = 2
STALE_SECONDS = 3600.0
CONTENT = "content"
"""Key under which an entry and a manifest carry the hash of what else they hold."""
Kind = Literal["latents", "images", "texts"]


@dataclass(frozen=True)
class Entry:
    """One clip in one bucket: the keys of its cached tensors and where it came from.

    `clip` identifies the clip whatever its bucket; `bucket` is (frames, height, width); `stages` are the frame counts
    of the curriculum that it serves; `split` says which of the sources it is of.
    """

    latents: str
    image: str
    text: str
    bucket: tuple[int, int, int]
    stages: tuple[int, ...]
    clip: str
    prompt: str
    where: str
    split: Literal["train", "validation"]


@dataclass(frozen=True)
class Manifest:
    """What `prepare` found and cached under one set of settings."""

    settings: dict[str, Any]
    entries: tuple[Entry, ...]
    empty_text: str


def digest(value: Any) -> str:
    """Key of a JSON value: the first 40 hexadecimal digits of the SHA-256 of its canonical form."""
    canonical = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:40]


class Cache:
    """A folder of entries `<kind>/<key>.safetensors` and of `manifests/<key>.json`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, kind: Kind, key: str) -> Path:
        """Where the entry is, or would be."""
        return self.folder / kind / f"{key}.safetensors"

    def has(self, kind: Kind, key: str) -> bool:
        """Whether the entry exists (it is complete if it does: entries appear by renaming)."""
        return self.path(kind, key).is_file()

    def write(self, kind: Kind, key: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Stores finite `tensors` under `key`, atomically; raises CacheError where a value is not finite."""
        for name, tensor in tensors.items():
            if not bool(torch.isfinite(tensor).all()):
                what = f"{name} has values that are not finite"
                raise CacheError(Problem(what, f"{kind}/{key}", "look at the clip", code="cache-not-finite"))
        metadata = {CONTENT: _content(tensors)}  # one key: the library writes several in any order
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        needed = sum(tensor.nbytes for tensor in contiguous.values())
        files.write_file(self.path(kind, key), lambda path: save_file(contiguous, path, metadata), needed)

    def read(self, kind: Kind, key: str) -> dict[str, torch.Tensor]:
        """The tensors of an entry; raises CacheError where it is missing or has changed since it was written."""
        path = self.path(kind, key)
        try:
            # not mapped: a page that a disk does not give would stop all threads, and one that is gone end the process
            content = path.read_bytes()
            tensors, expected = load(content), _metadata(content).get(CONTENT)
        except (OSError, SafetensorError, KeyError) as error:
            remedy = "delete it and run `longtake prepare` again"
            what = f"the entry cannot be read ({error.strerror if isinstance(error, OSError) else error})"
            raise CacheError(Problem(what, str(path), remedy, code="cache-entry-unreadable")) from None
        if _content(tensors) != expected:
            remedy = "delete it and run `longtake prepare` again"
            what = "the entry has changed since it was written"
            raise CacheError(Problem(what, str(path), remedy, code="cache-entry-changed"))
        return tensors

    def reject(self, kind: Kind, key: str, problem: Problem) -> None:
        """Notes why the entry cannot be made, for the other ranks."""
        files.write_json(
            self._rejection(kind, key), {name: getattr(problem, name) for name in ("what", "remedy", "code")}
        )

    def rejection(self, kind: Kind, key: str) -> Problem | None:
        """Why an entry that is not there could not be made; None where nobody noted anything that can be read."""
        if self.has(kind, key) or not self._rejection(kind, key).is_file():
            return None
        try:
            noted = json.loads(self._rejection(kind, key).read_text(encoding="utf-8"))
            code = str(noted.get("code", ""))
            return Problem(str(noted["what"]), "", str(noted["remedy"]), code=code)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None  # a note only: the entry is tried again, and why it fails noted anew

    def write_manifest(self, manifest: Manifest) -> Path:
        """Stores the list of a data set's entries under the key of its settings, with a hash of it."""
        path, table = self._manifest(manifest.settings), asdict(manifest)
        files.write_json(path, {**table, CONTENT: digest(table)})
        return path

    def read_manifest(self, settings: dict[str, Any]) -> Manifest:
        """The manifest of `settings`; raises CacheError that names what differs from the nearest one there is.

        And where it was changed since it was written, by its hash, which those of earlier versions lack, or its name.
        """
        path = self._manifest(settings)
        if not path.is_file():
            raise CacheError(self._missing(settings))
        manifest = _manifest_of(path)
        if absent := self.missing(manifest):
            what = f"{absent} of {len({*_keys(manifest)})} entries are missing"
            remedy = "run `longtake prepare` again"
            raise CacheError(Problem(what, str(self.folder), remedy, code="cache-entries-missing"))
        return manifest

    def missing(self, manifest: Manifest) -> int:
        """How many of the entries that the manifest names are not there."""
        return sum(not self.has(kind, key) for kind, key in {*_keys(manifest)})

    def remove_staged(self) -> None:
        """Removes what killed ranks left an hour ago or earlier: what is younger may be another rank's work."""
        found = [path for pattern in (f"*{files.STAGED}*", f"*{CLAIM}") for path in self.folder.rglob(pattern)]
        now = clock(self.folder) if found else 0.0
        for path in found:
            with contextlib.suppress(FileNotFoundError):  # its writer, or another rank, was faster
                if now - path.stat().st_mtime > STALE_SECONDS:
                    path.unlink()

    def _missing(self, settings: dict[str, Any]) -> Problem:
        others = [_manifest_of(path) for path in sorted(self.folder.glob("manifests/*.json"))]
        remedy = "run `longtake prepare` with this config"
        if not others:
            return Problem("the cache has not been prepared", str(self.folder), remedy, code="cache-not-prepared")
        differences = [_differences(other.settings, settings) for other in others]
        what = f"the cache was prepared with other settings: {min(differences, key=len)}"
        return Problem(what, str(self.folder), remedy, code="cache-other-settings")

    def _rejection(self, kind: Kind, key: str) -> Path:
        return self.folder / kind / f"{key}.rejected.json"

    def _manifest(self, settings: dict[str, Any]) -> Path:
        return self.folder / "manifests" / f"{digest(settings)}.json"


def _keys(manifest: Manifest) -> Iterator[tuple[Kind, str]]:
    yield "texts", manifest.empty_text
    for entry in manifest.entries:
        yield "latents", entry.latents
        yield "texts", entry.text
        if entry.image:
            yield "images", entry.image


def _manifest_of(path: Path) -> Manifest:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        written = table.pop(CONTENT, None)
        entries = tuple(_entry(row) for row in table["entries"])
        manifest = Manifest(table["settings"], entries, table["empty_text"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        remedy = "delete it and run `longtake prepare` again"
        what = f"the manifest cannot be read ({error})"
        raise CacheError(Problem(what, str(path), remedy, code="cache-manifest-unreadable")) from None
    if path.stem != digest(manifest.settings) or written not in (None, digest(table)):
        what, remedy = "the manifest has changed since it was written", "delete it and run `longtake prepare` again"
        raise CacheError(Problem(what, str(path), remedy, code="cache-manifest-changed"))
    return manifest


def _entry(row: dict[str, Any]) -> Entry:
    return Entry(**(row | {"bucket": tuple(row["bucket"]), "stages": tuple(row["stages"])}))


def _differences(there: dict[str, Any], here: dict[str, Any]) -> str:
    changed = [key for key in {**there, **here} if there.get(key) != here.get(key)]
    return ", ".join(f"{key} {there.get(key)!r} instead of {here.get(key)!r}" for key in changed)


def _metadata(content: bytes) -> Mapping[str, str]:
    """Of a safetensors file that is sound: the header, JSON behind its length in eight bytes, has it."""
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return header.get("__metadata__", {})


def _content(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes."""
    state = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        state.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        state.update(tensor.view(torch.uint8).numpy().tobytes())
    return state.hexdigest()
