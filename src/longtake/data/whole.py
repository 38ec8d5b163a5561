"""Whether a clip's file has all of what its container states, told by the sizes in its headers."""

import os
import struct
from collections.abc import Iterator
from io import BufferedReader
from typing import Any

from longtake.data.regular_files import refusal

_COPY = "copy it again"
_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"styp", b"sidx", b"moof", b"uuid", b"emsg")
"""With which an mp4 or mov begins; any other file has other letters there."""
_MOST_BOXES = 500_000
"""That are looked at, which takes a second or two; a day in fragments has fewer."""
_NEEDED = (b"moov", b"moof")
_STILL_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1")
_EBML, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"


def is_container(file: BufferedReader) -> bool:
    """Whether the file begins like a container of the kinds that are read."""
    head = _at(file, 0, 12)
    return head[4:8] in _BOXES or head[:4] == _EBML or (head[:4] == b"RIFF" and head[8:12] == b"AVI ")


def check_whole(file: BufferedReader, name: str) -> None:
    """Raises DataError where the container states more than the file has, or is a still's; leaves it at its start."""
    head = _at(file, 0, 12)
    if head[4:8] in _BOXES:
        if head[4:8] == b"ftyp" and head[8:12] in _STILL_BRANDS:
            what = f"{name} is a still image in a format that is not read (HEIF or AVIF)"
            raise refusal(what, "", "convert it to PNG", code="file-other-format")
        _check_boxes(file, name)
    elif head[:4] == _EBML:
        _check_segment(file, name)
    file.seek(0)


def check_openable(file: BufferedReader, name: str) -> None:
    """Raises DataError where an mp4 that FFmpeg cannot open lacks its index."""
    if _at(file, 4, 4) in _BOXES and not {kind for kind, _, _ in _boxes(file)} & set(_NEEDED):
        what = f"{name} has no index of its pictures (moov)"
        remedy = "copy it again; a recording that broke off may be mended with untrunc"
        raise refusal(what, "", remedy, code="clip-without-index")


def check_index(file: BufferedReader, stream: Any, name: str) -> None:
    """Raises DataError where the index of an open mp4 names data that the file does not have."""
    # FFmpeg relies on the place in `file` at which it left it: only what ends here may go elsewhere
    last = max((entry.pos + entry.size for entry in stream.index_entries), default=0)
    if stream.frames and not last:
        what = f"{name} states {stream.frames} pictures and does not say where they are"
    elif last > _size(file):
        if max((end for _, _, end in _boxes(file)), default=0) > _size(file):
            raise _cut_off(name)
        what = f"the index of {name} names places that the file does not have"
    else:
        return
    raise refusal(what, "", f"{_COPY}, or write it anew with ffmpeg", code="clip-index-damaged")


def _check_boxes(file: BufferedReader, name: str) -> None:
    seen: set[bytes] = set()
    size = _size(file)
    for kind, _, end in _boxes(file):
        # pictures may be whole where the end of the sound is missing, which an index would tell
        if end > size and (kind in _NEEDED or b"moof" in seen or b"moov" not in seen):
            raise _cut_off(name)
        seen.add(kind)


def _boxes(file: BufferedReader) -> Iterator[tuple[bytes, int, int]]:
    """(kind, begin, end) of the boxes that are not in another one, until what follows is none."""
    at, nbytes = 0, _size(file)
    for _ in range(_MOST_BOXES):
        if at >= nbytes:
            return
        head = _at(file, at, 16)
        if len(head) < 8 or not all(32 <= byte < 127 or byte == 0xA9 for byte in head[4:8]):
            return
        (size,) = struct.unpack_from(">I", head)
        if size == 1 and len(head) == 16:
            (size,) = struct.unpack_from(">Q", head, 8)
        end = at + size if size else nbytes
        if end < at + 8:
            return
        yield head[4:8], at, end
        at = end


def _check_segment(file: BufferedReader, name: str) -> None:
    at = 4
    length, size = _number(_at(file, at, 8))
    at += length + size
    if _at(file, at, 4) != _SEGMENT:
        return
    length, size = _number(_at(file, at + 4, 8))
    unknown = (1 << 7 * length) - 1  # of a recording that was written without going back
    if length and size != unknown and at + 4 + length + size > _size(file):
        raise _cut_off(name)


def _number(content: bytes) -> tuple[int, int]:
    """Length and value of one of EBML's numbers, which begin with as many zero bits as bytes follow the first."""
    length = 9 - content[0].bit_length() if content and content[0] else 0
    if not length or length > len(content):
        return 0, 0
    return length, int.from_bytes(content[:length], "big") & ((1 << 7 * length) - 1)


def _cut_off(name: str) -> Exception:
    return refusal(f"{name} is cut off: it has less than its header states", "", _COPY, code="clip-cut-off")


def _size(file: BufferedReader) -> int:
    return os.fstat(file.fileno()).st_size


def _at(file: BufferedReader, place: int, count: int) -> bytes:
    file.seek(place)
    return file.read(count)
