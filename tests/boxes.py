"""The boxes of an mp4, found and changed: a clip that is sound in all but one number of its header."""

import struct
from collections.abc import Callable, Iterator
from pathlib import Path

HOLDERS = {b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf", b"edts", b"mvex"}


def boxes(content: bytes, start: int = 0, end: int | None = None) -> Iterator[tuple[bytes, int, int]]:
    """(kind, where it begins, where it ends) of every box, those inside of others too."""
    at, end = start, len(content) if end is None else end
    while at + 8 <= end:
        size, kind = struct.unpack_from(">I4s", content, at)
        yield kind, at, at + size
        if kind in HOLDERS:
            yield from boxes(content, at + 8, at + size)
        at += size


def box(content: bytes, kind: bytes, number: int = 0) -> tuple[int, int]:
    """Where the box of that kind begins and ends."""
    return [(start, end) for found, start, end in boxes(content) if found == kind][number]


def of(kind: bytes, content: bytes) -> bytes:
    """A box."""
    return struct.pack(">I4s", len(content) + 8, kind) + content


def endless(kind: bytes) -> bytes:
    """The head of a box that is larger than any file."""
    return struct.pack(">I4sQ", 1, kind, 2**64 - 1)


def patch(path: Path, kind: bytes, offset: int, form: str, *values: object) -> Path:
    """Writes `values` at `offset` bytes into each box of that kind, its head included."""

    def change(content: bytes) -> bytes:
        found = bytearray(content)
        for start in [start for each, start, _ in boxes(content) if each == kind]:
            struct.pack_into(form, found, start + offset, *values)
        return bytes(found)

    return changed(path, change)


def replace(path: Path, kind: bytes, new: bytes) -> Path:
    """Puts the bytes `new` in place of the first box of that kind, and mends the sizes of those that hold it."""

    def change(content: bytes) -> bytes:
        start, end = box(content, kind)
        found = bytearray(content)
        for holder, first, last in boxes(content):
            if holder in HOLDERS and first < start and end <= last:
                struct.pack_into(">I", found, first, last - first + len(new) - (end - start))
        return bytes(found[:start] + new + found[end:])

    return changed(path, change)


def changed(path: Path, change: Callable[[bytes], bytes]) -> Path:
    """Writes the file anew with its content changed."""
    path.write_bytes(change(path.read_bytes()))
    return path
