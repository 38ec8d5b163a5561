"""Malformed videos: what they are called, how each is made, and with which code it is refused."""

import io
import os
import struct
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import av
import numpy as np

import boxes
import clips
import pngs
from corpus_odd import add_tone, film

PQ = 16
ENCRYPTION = {"encryption_scheme": "cenc-aes-ctr", "encryption_key": "0f" * 16, "encryption_kid": "01" * 16}
MATROSKA_KIND = b"\x42\x82"
DUPLICATES = (0, 40, 40, 40, 80, 120, 160, 200)
MARKUP = b"<!DOCTYPE html>\n<html><head><title>404</title></head><body>No such clip</body></html>\n"
PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"
SESSION = b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n"


@dataclass(frozen=True)
class Malformed:
    """A file to be refused with `code`, written by `make`; `late` where only decoding all of it can tell."""

    name: str
    code: str
    make: Callable[[Path], object]
    late: bool = False


def noise(count: int, width: int = 64, height: int = 48) -> np.ndarray:
    """Pictures that no encoder makes small."""
    return np.random.default_rng(0).integers(0, 255, (count, height, width, 3), np.uint8)


@cache
def sound(suffix: str = ".mp4", movflags: str = "faststart", codec: str = "libx264") -> bytes:
    """A clip that is well, of 24 pictures."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"sound{suffix}"
        return clips.write(path, noise(24), movflags=movflags, codec=codec).read_bytes()


def bytes_of(content: bytes) -> Callable[[Path], object]:
    """Writes `content`."""
    return lambda path: path.write_bytes(content)


def made(content: Callable[[], bytes]) -> Callable[[Path], object]:
    """Writes `content`, which is made when it is wanted."""
    return lambda path: path.write_bytes(content())


def cut(share: float, *kind: str) -> Callable[[Path], object]:
    """The first part of a clip that is well."""
    return lambda path: path.write_bytes((whole := sound(*kind))[: int(len(whole) * share)])


def patched(kind: bytes, offset: int, form: str, *values: object) -> Callable[[Path], object]:
    """A clip that is well but for the numbers `values` in its boxes of one kind."""

    def make(path: Path) -> None:
        path.write_bytes(sound())
        boxes.patch(path, kind, offset, form, *values)

    return make


def edited(*changes: Callable[[Path], object]) -> Callable[[Path], object]:
    """A clip that is well until the `changes`."""

    def make(path: Path) -> None:
        path.write_bytes(sound())
        for change in changes:
            change(path)

    return make


def drawn(count: int, size: tuple[int, int] = (64, 48), **options: Any) -> Callable[[Path], object]:
    """So many pictures as `clips.write` writes them."""
    return lambda path: clips.write(path, clips.levels(count, *size), **options)


def muxed(path: Path, packets: Sequence[tuple[bytes, int]], size: tuple[int, int], codec: str, **options: Any) -> None:
    """A file of `packets`, each with its time at 24 a second, of which nothing but the header says what they are."""
    with av.open(str(path), "w", **options) as container:
        stream = container.add_mux_stream(codec, rate=24, width=size[0], height=size[1])
        stream.time_base = Fraction(1, 24)
        for content, time in packets:
            packet = av.Packet(content)
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, time, time, Fraction(1, 24)
            packet.duration, packet.is_keyframe = 1, True
            container.mux(packet)


def still(width: int, height: int, codec: str = "mjpeg") -> bytes:
    """One black picture as `codec` has it."""
    context = av.CodecContext.create(codec, "w")
    context.width, context.height, context.time_base = width, height, Fraction(1, 24)
    context.pix_fmt = {"mjpeg": "yuvj420p", "png": "rgb24"}.get(codec, "yuv420p")
    picture = av.VideoFrame(width, height, context.pix_fmt)
    for plane in picture.planes:
        plane.update(bytes(plane.buffer_size))
    return b"".join(bytes(packet) for packet in [*context.encode(picture), *context.encode(None)])


def write_resized(path: Path) -> None:
    packets = [(still(64, 48), time) for time in range(8)] + [(still(96, 80), time) for time in range(8, 16)]
    muxed(path, packets, (64, 48), "mjpeg")


def write_understated(path: Path) -> None:
    """Small pictures by the container's header, 16384 wide ones by their own."""
    muxed(path, [(still(16384, 16, "png"), time) for time in range(4)], (64, 48), "png")


def write_wide(path: Path) -> None:
    muxed(path, [(still(16384, 16, "png"), time) for time in range(4)], (16384, 16), "png")


def write_large(path: Path, depth: int = 16, kind: int = pngs.RGBA) -> None:
    """17 black pictures of 8192x8192, each channel of `depth` bits; the file is a few megabytes."""
    channels = 4 if kind == pngs.RGBA else 1
    picture = pngs.png(8192, 8192, pngs.black(8192 * (8192 * channels * depth // 8 + 1)), depth=depth, kind=kind)
    muxed(path, [(picture, time) for time in range(17)], (8192, 8192), "png")


def write_cover_only(path: Path) -> None:
    """A song with its picture."""
    with av.open(str(path), "w", format="mp4") as container:
        tone, cover = container.add_stream("aac", rate=8000, layout="mono"), container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 48, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        packet = av.Packet(still(64, 48))
        packet.stream, packet.pts, packet.dts = cover, 0, 0
        container.mux(packet)
        add_tone(container, tone)


def damaged_within(content: bytes) -> bytes:
    """Twenty bytes in the middle changed."""
    found = np.frombuffer(content, np.uint8).copy()
    found[np.random.default_rng(1).integers(len(found) // 4, len(found) * 3 // 4, 20)] ^= 0x55
    return found.tobytes()


def without_data(path: Path) -> None:
    """Pictures that are nothing but zeros."""
    start, end = boxes.box(path.read_bytes(), b"mdat")
    boxes.changed(path, lambda content: content[: start + 8] + bytes(end - start - 8) + content[end:])


def with_long_kind(content: bytes) -> bytes:
    """The text by which a Matroska file says that it is one is larger than any file."""
    at = content.index(MATROSKA_KIND) + 2
    return content[:at] + b"\x01" + b"\xfe" * 7 + content[at + 8 :]


def unfilled(content: bytes) -> bytes:
    """Of a download that made room for all of it and broke off half-way."""
    half = len(content) // 2
    return content[:half] + bytes(len(content) - half)


def without_size(content: bytes) -> bytes:
    """The pictures of an AVI file are of 0x0."""
    return content.replace(struct.pack("<II", 64, 48), bytes(8))


def zipped(name: str = "clip.mp4") -> bytes:
    found = io.BytesIO()
    with zipfile.ZipFile(found, "w") as archive:
        archive.writestr(name, sound())
    return found.getvalue()


def in_tar() -> bytes:
    found = io.BytesIO()
    with tarfile.open(fileobj=found, mode="w") as archive:
        member = tarfile.TarInfo("clip.mp4")
        member.size = len(sound())
        archive.addfile(member, io.BytesIO(sound()))
    return found.getvalue()


VIDEOS = (
    Malformed("empty.mp4", "file-empty", Path.touch),
    Malformed("folder.mp4", "file-irregular", Path.mkdir),
    Malformed("pipe.mp4", "file-irregular", os.mkfifo),
    Malformed("text.mp4", "file-text", bytes_of("nur ein Stück Text\n".encode() * 50)),
    Malformed("text-16.mp4", "file-text", bytes_of(("\ufeff" + "just text\n" * 50).encode("utf-16"))),
    Malformed("page.mp4", "file-web-page", bytes_of(b"\xef\xbb\xbf\n" + MARKUP)),
    Malformed("pointer.mp4", "file-pointer", bytes_of(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n")),
    Malformed("playlist.mp4", "file-playlist", bytes_of(PLAYLIST)),
    Malformed("concat.mp4", "file-playlist", bytes_of(b"ffconcat version 1.0\nfile secret.mp4\n")),
    Malformed("session.mp4", "file-playlist", bytes_of(SESSION)),
    Malformed("archive.mp4", "file-archive", made(zipped)),
    Malformed("tar.mp4", "file-archive", made(in_tar)),
    Malformed("zeros.mp4", "file-zeros", bytes_of(bytes(5000))),
    Malformed("random.mp4", "file-unknown", made(lambda: np.random.default_rng(0).bytes(5000))),
    Malformed("document.mp4", "file-other-format", bytes_of(b"%PDF-1.7\n" + bytes(range(256)))),
    Malformed("stream.mp4", "file-other-format", made(lambda: sound(".ts", ""))),
    Malformed("flash.mp4", "file-other-format", made(lambda: sound(".flv", "", "flv"))),
    Malformed("song.mp4", "clip-without-pictures", clips.write_sound_only),
    Malformed("cover.mp4", "clip-without-pictures", write_cover_only),
    Malformed("cut-in-head.mp4", "clip-cut-off", cut(0.005)),
    Malformed("cut-at-40.mp4", "clip-cut-off", cut(0.4)),
    Malformed("cut-at-99.mp4", "clip-cut-off", cut(0.99)),
    Malformed("cut-in-index.mp4", "clip-cut-off", cut(0.995, ".mp4", "")),
    Malformed("without-index.mp4", "clip-without-index", edited(lambda path: boxes.replace(path, b"moov", b""))),
    Malformed("cut-in-data.mp4", "clip-cut-off", cut(0.6, ".mp4", "")),
    Malformed("endless.mp4", "clip-cut-off", made(lambda: sound()[:32] + boxes.endless(b"mdat"))),
    Malformed("cut.webm", "clip-cut-off", cut(0.6, ".webm", "", "libvpx")),
    Malformed("cut.mkv", "clip-cut-off", cut(0.6, ".mkv", "")),
    Malformed("cut.avi", "clip-cut-off", cut(0.6, ".avi", "", "mpeg4")),
    Malformed("cut-fragments.mp4", "clip-cut-off", cut(0.6, ".mp4", "frag_keyframe+empty_moov")),
    Malformed("far-chunk.mp4", "clip-index-damaged", patched(b"stco", 16, ">I", 2**31)),
    Malformed("large-samples.mp4", "clip-index-damaged", patched(b"stsz", 20, ">6I", *[2**31 - 1] * 6)),
    Malformed("many-samples.mp4", "clip-index-damaged", patched(b"stsz", 12, ">II", 1, 2**32 - 2)),
    Malformed("no-clock.mp4", "clip-rate", patched(b"mdhd", 20, ">I", 0)),
    Malformed("long.mp4", "clip-duration", edited(lambda path: boxes.patch(path, b"stts", 16, ">II", 24, 2**30))),
    Malformed("back.mp4", "clip-rate", edited(lambda path: boxes.patch(path, b"stts", 16, ">Ii", 24, -512))),
    Malformed("skipped.mp4", "clip-edited-away", patched(b"elst", 16, ">Ii", 1000, 2**30)),
    Malformed("no-tracks.mp4", "clip-without-pictures", made(lambda: sound()[:32] + boxes.of(b"moov", b""))),
    Malformed("size-0.avi", "picture-without-size", made(lambda: without_size(sound(".avi", "", "ffv1")))),
    Malformed("wide.mov", "picture-too-large", write_wide),
    Malformed("understated.mov", "picture-too-large", write_understated),
    Malformed("stretched.mp4", "picture-aspect", drawn(8, (512, 256), aspect=(200, 1))),
    Malformed("resized.mkv", "clip-changes-size", write_resized, late=True),
    Malformed("damaged.mp4", "clip-damaged-picture", made(lambda: damaged_within(sound())), late=True),
    Malformed("damaged.mkv", "clip-damaged-picture", made(lambda: damaged_within(sound(".mkv", ""))), late=True),
    Malformed("zeroed.mp4", "clip-undecodable", edited(without_data)),
    Malformed("codec.mp4", "clip-codec-unknown", patched(b"stsd", 20, ">4s", b"zzzz")),
    Malformed("long-kind.mkv", "clip-damaged", made(lambda: with_long_kind(sound(".mkv", "")))),
    Malformed("unfilled.mkv", "clip-cut-off", made(lambda: unfilled(sound(".mkv", "")))),
    Malformed("unfilled.mp4", "clip-damaged-picture", made(lambda: unfilled(sound())), late=True),
    Malformed("order.avi", "clip-without-times", drawn(24)),
    Malformed("duplicates.mkv", "clip-without-times", drawn(8, milliseconds=DUPLICATES)),
    Malformed("pq.mp4", "clip-hdr", film(tags={"color_trc": PQ})),
    Malformed("one.mp4", "clip-too-short", drawn(1)),
    Malformed("encrypted.mp4", "clip-encrypted", film(container=ENCRYPTION)),
    Malformed("large.mov", "decode-memory", write_large),
)
