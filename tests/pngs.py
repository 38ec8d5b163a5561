"""PNG files that are made chunk by chunk: odd ones, and very large ones that take next to no time."""

import struct
import zlib

GREY, RGBA = 0, 6
_MEGABYTE = 2**20


def chunk(kind: bytes, data: bytes) -> bytes:
    """One chunk with its checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, data: bytes, *between: bytes, depth: int = 8, kind: int = GREY) -> bytes:
    """A file whose header states that size and whose compressed lines are `data`, with the chunks `between` them."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    return b"".join([b"\x89PNG\r\n\x1a\n", header, *between, chunk(b"IDAT", data), chunk(b"IEND", b"")])


def black(size: int) -> bytes:
    """At least `size` zeros, compressed: one megabyte of them is, and the rest repeats its bytes."""
    count = -(-size // _MEGABYTE)
    packer = zlib.compressobj(1, wbits=-15)
    block = packer.compress(bytes(_MEGABYTE)) + packer.flush(zlib.Z_FULL_FLUSH)
    checksum = (count * _MEGABYTE % 65521) << 16 | 1  # of Adler, whose lower half is the sum of the bytes and one
    return b"\x78\x01" + block * count + b"\x03\x00" + struct.pack(">I", checksum)
