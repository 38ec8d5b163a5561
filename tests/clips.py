"""Small clips and images drawn for tests, sound and odd ones."""

import struct
import zlib
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

STEP = 8
"""Grey levels between one frame's brightness and the next's in `levels`."""


def levels(count: int, width: int = 64, height: int = 48) -> np.ndarray:
    """Frames [count, height, width, 3] of one grey each: frame i is 16 + STEP * i, wrapped below 224."""
    grey = 16 + (np.arange(count) * STEP) % 208
    return np.broadcast_to(grey[:, None, None, None], (count, height, width, 3)).astype(np.uint8)


def quadrants(count: int, width: int = 64, height: int = 48) -> np.ndarray:
    """Frames whose corners are red (top left), green (top right), blue (bottom left) and white."""
    frame = np.zeros((height, width, 3), np.uint8)
    frame[: height // 2, : width // 2] = (200, 30, 30)
    frame[: height // 2, width // 2 :] = (30, 200, 30)
    frame[height // 2 :, : width // 2] = (30, 30, 200)
    frame[height // 2 :, width // 2 :] = (220, 220, 220)
    return np.broadcast_to(frame, (count, height, width, 3))


def write(
    path: Path,
    frames: np.ndarray,
    fps: int = 24,
    milliseconds: Sequence[int] | None = None,
    degrees: int = 0,
    mirrored: bool = False,
    aspect: tuple[int, int] = (1, 1),
    codec: str = "libx264",
    tone: int = 0,
    movflags: str = "",
) -> Path:
    """Writes `frames` [count, height, width, 3]; `milliseconds` are their times, else `fps` gives them.

    `degrees` and `mirrored` go into the display matrix, `aspect` is that of a pixel, `tone` seconds of sound.
    """
    with av.open(str(path), "w", options={"movflags": movflags} if movflags else {}) as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(*aspect)
        if codec == "libx264":
            stream.options = {"crf": "4", "g": "12"}
            stream.codec_context.thread_count = 1  # the same bytes each time: windows are drawn by them
        base = Fraction(1, 1000) if milliseconds else Fraction(1, fps)
        stream.time_base = stream.codec_context.time_base = base
        if degrees or mirrored:
            stream.set_display_rotation(degrees, hflip=mirrored)
        sound = container.add_stream("aac", rate=8000, layout="mono") if tone else None
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts, frame.time_base = (milliseconds[index] if milliseconds else index), base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound is not None:
            _write_tone(container, sound, tone)
    return path


def write_sound_only(path: Path) -> Path:
    """An m4a without pictures, under whatever name."""
    with av.open(str(path), "w", format="mp4") as container:
        _write_tone(container, container.add_stream("aac", rate=8000, layout="mono"), 1)
    return path


def write_truncated(path: Path, source: Path, share: float = 0.6) -> Path:
    """The first part of `source`."""
    content = source.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


def write_huge_png(path: Path, side: int = 30_000) -> Path:
    """A PNG whose header states `side` x `side` pixels, with next to no data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    return path


def _write_tone(container: av.container.OutputContainer, stream: av.AudioStream, seconds: int) -> None:
    for index in range(seconds * 8):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1000), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 8000, index * 1000, Fraction(1, 8000)
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))
