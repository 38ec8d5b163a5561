"""Hashes of the clips' contents, and the file that remembers them by path, size and time of change."""

import json
from collections.abc import Collection, Mapping
from contextlib import closing
from pathlib import Path

from longtake import files
from longtake.data.cache import digest
from longtake.data.claims import Claims
from longtake.data.metadata import ClipRecord
from longtake.data.video import content_hash

NAME = "hashes.json"
BLOCKS = 8
"""Into so many parts a rank divides its share: what it has hashed is remembered after each."""


def content_hashes(paths: Collection[Path], claims: Claims) -> dict[Path, str]:
    """SHA-256 of each file in hex, computed by one of the ranks; raises DataError where one is no regular file."""
    names = {path: _name(path) for path in sorted(paths)}
    memory = _Memory(claims.folder / NAME)
    count = BLOCKS * claims.world
    blocks = [[*names][block::count] for block in range(count)]

    def missing(block: int) -> list[Path]:
        known = memory.known()
        return [path for path in blocks[block] if names[path] not in known]

    turns = claims.turns(range(count), lambda block: f"hashes-{block}", lambda block: not missing(block))
    with closing(turns):
        for block in turns:
            memory.add({names[path]: content_hash(path) for path in missing(block)})
    known = memory.known()
    return {path: known[name] for path, name in names.items()}


def clip_key(content: str, record: ClipRecord) -> str:
    """What identifies a clip whatever its bucket: the hash of its content and the part of it that is used."""
    return digest([content, record.start, record.frames, record.fps])


class _Memory:
    """The file's hashes by name, and what this process has added.

    Where two ranks add at once, the file keeps what one of them did. The other's is missed by whoever looks for it
    there, and computed again: no rank ends before it has seen everything, so the last to write leaves it whole.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seen: tuple[int, int] | None = None
        self.hashes: dict[str, str] = {}

    def known(self) -> Mapping[str, str]:
        """The hashes that this process has read or added, read anew where the file has changed."""
        if self.path.is_file():
            status = self.path.stat()
            if self.seen != (status.st_ino, status.st_mtime_ns):
                self.seen = status.st_ino, status.st_mtime_ns
                self.hashes |= self._read()
        return self.hashes

    def add(self, found: Mapping[str, str]) -> None:
        """Remembers `found`."""
        self.hashes |= {**self.known(), **found}
        files.write_json(self.path, dict(sorted(self.hashes.items())))

    def _read(self) -> dict[str, str]:
        try:
            table = dict(json.loads(self.path.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            return {}  # a memory only: what cannot be read is computed again
        return {name: known for name, known in table.items() if isinstance(known, str) and known}


def _name(path: Path) -> str:
    status = path.stat()
    return f"{path.resolve()}:{status.st_size}:{status.st_mtime_ns}"
