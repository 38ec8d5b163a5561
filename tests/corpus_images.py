"""Malformed stills: what they are called, how each is made, and with which code it is refused."""

import io
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

import clips
from corpus_videos import MARKUP, Malformed, bytes_of, made, noise
from pngs import black, chunk, png

DRAWING = b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg" width="64" height="48"/>\n'
HUFFMAN, START = b"\xff\xc4", b"\xff\xc0"
SHORT, LONG = 3, 4
SUBFILE = 254
ONE_STRIP = {256: (SHORT, 8), 257: (SHORT, 8), 258: (SHORT, 8), 259: (SHORT, 1), 262: (SHORT, 1), 273: (LONG, 8)}
ONE_STRIP |= {278: (SHORT, 8), 279: (LONG, 64)}


def picture(kind: str, **options: object) -> bytes:
    """One that is well."""
    found = io.BytesIO()
    Image.fromarray(noise(1)[0]).save(found, kind, **options)
    return found.getvalue()


def several(kind: str) -> bytes:
    """Three pictures in one file."""
    return picture(kind, save_all=True, append_images=[Image.fromarray(pixels) for pixels in noise(3)[1:]])


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def small(*between: bytes, width: int = 8, height: int = 8) -> bytes:
    """Eight lines of grey, whatever the header says, and the chunks `between` before them."""
    return png(width, height, black(8 * 9), *between)


def tiff(*nexts: int, tags: dict[int, tuple[int, int]] | None = None) -> bytes:
    """As many directories as there are `nexts`, each the number of the one that comes after it."""
    tags = ONE_STRIP | (tags or {})
    size = 2 + 12 * len(tags) + 4
    begin = [8 + 64 + number * size for number in range(len(nexts))]
    lines = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, (kind, value) in sorted(tags.items()))
    found = struct.pack("<2sHI", b"II", 42, begin[0]) + bytes(64)
    for after in nexts:
        found += struct.pack("<H", len(tags)) + lines + struct.pack("<I", begin[after])
    return found


def bmp(width: int, height: int) -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return struct.pack("<2sIHHI", b"BM", 54 + 192, 0, 0, 54) + head + bytes(192)


def with_huffman(content: bytes) -> bytes:
    """More codes of one length than that length has."""
    at = content.index(HUFFMAN) + 5
    return content[:at] + b"\xff" * 16 + content[at + 16 :]


def with_size(content: bytes, side: int) -> bytes:
    at = content.index(START) + 5
    return content[:at] + struct.pack(">HH", side, side) + content[at + 4 :]


def webp(side: int) -> bytes:
    """A lossless one whose header states `side` x `side` pixels."""
    body = b"VP8L" + struct.pack("<I", 6) + b"\x2f" + struct.pack("<I", (side - 1) | (side - 1) << 14) + b"\0"
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def write_floats(path: Path) -> None:
    Image.fromarray(np.zeros((48, 64), np.float32)).save(path)


def huge(side: int) -> Callable[[Path], object]:
    return lambda path: clips.write_huge_png(path, side)


def several_of_one(kind: str) -> bytes:
    """A TIFF with a smaller copy of its picture, or a JPEG with a phone's map of brightness."""
    small, found = Image.fromarray(noise(1)[0][::2, ::2]), io.BytesIO()
    if kind == "TIFF":
        small.encoderinfo = {"tiffinfo": {SUBFILE: 1}}
    Image.fromarray(noise(1)[0]).save(found, {"JPEG": "MPO"}.get(kind, kind), save_all=True, append_images=[small])
    return found.getvalue()


TEXT_BOMB, PROFILE_BOMB = b"zTXt", b"iCCP"

IMAGES = (
    Malformed("empty.png", "file-empty", Path.touch),
    Malformed("text.png", "file-text", bytes_of(b"a picture of a hill\n")),
    Malformed("page.jpg", "file-web-page", bytes_of(MARKUP)),
    Malformed("drawing.png", "file-other-format", bytes_of(DRAWING)),
    Malformed("animation.png", "file-other-format", made(lambda: several("GIF"))),
    Malformed("layers.png", "file-other-format", bytes_of(b"8BPS\0\1" + bytes(20))),
    Malformed("photo.jpg", "file-other-format", made(lambda: picture("AVIF"))),
    Malformed("magic.png", "image-damaged", bytes_of(b"\x89PNG\r\n\x1a\n")),
    Malformed("cut.png", "image-cut-off", made(lambda: half(picture("PNG")))),
    Malformed("cut.jpg", "image-cut-off", made(lambda: half(picture("JPEG"))), late=True),
    Malformed("cut.webp", "image-cut-off", made(lambda: half(picture("WEBP")))),
    Malformed("cut.bmp", "image-cut-off", made(lambda: half(picture("BMP"))), late=True),
    Malformed("cut.tif", "image-cut-off", made(lambda: half(picture("TIFF"))), late=True),
    Malformed("bomb.png", "image-too-large", huge(30_000)),
    Malformed("scan.png", "image-too-large", huge(9000)),
    Malformed("bomb.jpg", "image-too-large", made(lambda: with_size(picture("JPEG"), 65_500))),
    Malformed("bomb.webp", "image-too-large", made(lambda: webp(16_384))),
    Malformed("bomb.bmp", "image-too-large", made(lambda: bmp(100_000, 100_000))),
    Malformed("lines.bmp", "image-cut-off", made(lambda: bmp(8, -8000)), late=True),
    Malformed("negative.bmp", "image-too-large", made(lambda: bmp(-8, 8))),
    Malformed("nothing.bmp", "image-damaged", made(lambda: bmp(0, 0))),
    Malformed("nothing.png", "image-damaged", made(lambda: small(width=0))),
    Malformed(
        "checksum.png", "image-damaged", made(lambda: small().replace(b"\0\0\0\x08\0\0\0\x08", b"\0\0\0\x08\0\0\0\x07"))
    ),
    Malformed("huffman.jpg", "image-damaged", made(lambda: with_huffman(picture("JPEG"))), late=True),
    Malformed(
        "text-bomb.png", "image-metadata-too-large", made(lambda: small(chunk(TEXT_BOMB, b"a\0\0" + black(64 * 2**20))))
    ),
    Malformed(
        "profile-bomb.png",
        "image-metadata-too-large",
        made(lambda: small(chunk(PROFILE_BOMB, b"a\0\0" + black(64 * 2**20)))),
    ),
    Malformed(
        "texts.png", "image-metadata-too-large", made(lambda: small(*[chunk(b"tEXt", b"a\0" + bytes(2**20))] * 70))
    ),
    Malformed("loop.tif", "image-several", made(lambda: tiff(1, 0))),
    Malformed("pages.tif", "image-several", made(lambda: several("TIFF"))),
    Malformed("moves.png", "image-several", made(lambda: several("PNG"))),
    Malformed("moves.webp", "image-several", made(lambda: several("WEBP"))),
    Malformed("floats.tif", "image-depth", write_floats, late=True),
    Malformed("strip.tif", "image-cut-off", made(lambda: tiff(0, tags={273: (LONG, 2**31)})), late=True),
)
