"""What a clip's file is, found out from its content before it is decoded at length. Needs no torch."""

import hashlib
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BufferedReader
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import av
from PIL import Image

from longtake.errors import DataError, Problem

MAX_SIDE = 8192
MAX_PIXELS = 64 * 1024 * 1024
MAX_SECONDS = 24 * 3600.0

VIDEO_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi"
"""Containers that FFmpeg may open: playlists, `concat:` and the like reach other files."""
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")

_IMAGE_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM", b"II*\x00", b"MM\x00*")
_EXIF_ORIENTATION = 0x0112
_PQ = 16  # AVCOL_TRC_SMPTE2084
_REENCODE = "write it anew with ffmpeg as H.264 in mp4"


@dataclass(frozen=True)
class ClipInfo:
    """What a clip shows: pixels as displayed (after rotation and pixel aspect), seconds, frames a second.

    `frames` is the header's estimate, `rotation` the display matrix's degrees counter-clockwise. A still image has one
    frame, no duration and no fps. `codec` and `pixel_format` are for people to read.
    """

    width: int
    height: int
    duration: float
    fps: float
    frames: int
    rotation: int = 0
    is_image: bool = False
    codec: str = field(default="", compare=False)
    pixel_format: str = field(default="", compare=False)


@dataclass(frozen=True)
class Window:
    """`frames` frames at `fps` from `start` seconds after the clip's first picture."""

    start: float
    frames: int
    fps: float


def probe(path: Path, where: str) -> ClipInfo:
    """What the clip or image at `path` shows; raises DataError, naming `where`, if it cannot be trained on.

    Reads headers, the first pictures and the last packets.
    """
    with open_regular(path, where) as file:
        if sniff_image(file):
            with open_image(file, path.name, where) as image:
                width, height = image.size
                turned = image.getexif().get(_EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
                shown = (height, width) if turned else (width, height)
                return ClipInfo(*shown, 0.0, 0.0, 1, 0, True, image.format or "", image.mode)
        with open_video(file, path.name, where) as (container, stream):
            return _video_info(container, stream, path.name, where)


def content_hash(path: Path) -> str:
    """SHA-256 of the file's content in hex; raises DataError if it is no regular file."""
    with open_regular(path, str(path)) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def open_regular(path: Path, where: str) -> Iterator[BufferedReader]:
    """The file at `path`, which must be a regular file and no link; raises DataError naming `where`."""
    try:
        _refuse_irregular(path.lstat().st_mode, path.name, where)
        # Between the two calls the name may have become a FIFO or a link: neither may be waited on or followed.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise refusal(f"{path.name} does not exist", where, "correct the path") from None
    except (OSError, ValueError) as error:
        raise refusal(
            f"{path.name!r} cannot be opened ({error})", where, "correct the path or its permissions"
        ) from None
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        _refuse_irregular(status.st_mode, path.name, where)
        if status.st_size == 0:
            raise refusal(f"{path.name} is empty (0 bytes)", where, "copy it again or leave it out")
        yield file


def sniff_image(file: BufferedReader) -> bool:
    """Whether the content begins like a still image; leaves `file` at its start."""
    head = file.read(16)
    file.seek(0)
    return head.startswith(_IMAGE_MAGIC) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


@contextmanager
def open_image(file: BufferedReader, name: str, where: str) -> Iterator[Image.Image]:
    """The image in `file`, its size checked before anything is decoded; damage, then or later, raises DataError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(file, formats=IMAGE_FORMATS)
        with image:
            check_pixels(image.width, image.height, name, where)
            yield image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise refusal(f"{name} has more than {MAX_PIXELS} pixels", where, "make it smaller") from None
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise refusal(f"{name} is a damaged image ({error})", where, "write it anew as PNG") from None


@contextmanager
def open_video(file: BufferedReader, name: str, where: str) -> Iterator[tuple[Any, Any]]:
    """PyAV's container and picture stream of `file`, limits checked; damage, then or later, raises DataError.

    FFmpeg gets a Python file and a list of containers: given a path it would follow playlists and URLs.
    """
    try:
        options = {"format_whitelist": VIDEO_FORMATS}
        with av.open(file, options=options, metadata_errors="replace") as container:
            # Cover art is a video stream of one picture, and the picture of a song is no clip.
            streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
            if not streams:
                raise refusal(f"{name} has no pictures, only sound or data", where, "leave it out")
            stream = streams[0]
            if stream.codec_context is None:
                raise refusal(f"{name} has a codec that is not built in", where, _REENCODE)
            check_pixels(stream.width, stream.height, name, where)
            stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
            stream.thread_type = "AUTO"
            yield container, stream
    except av.FFmpegError as error:
        what = f"{name} is not a video that can be read, or is damaged ({error.strerror})"
        raise refusal(what, where, "give an intact mp4, mov, mkv, webm or avi, or a PNG or JPEG") from None


def check_pixels(width: int, height: int, name: str, where: str) -> None:
    """Raises DataError where a picture is empty, or so large that decoding it is an attack on memory."""
    if width < 1 or height < 1:
        raise refusal(f"{name} has pictures of {width}x{height}", where, _REENCODE)
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        limit = f"at most {MAX_SIDE} a side and {MAX_PIXELS} pixels"
        raise refusal(
            f"{name} has pictures of {width}x{height}, more than the limit", where, f"scale it down to {limit}"
        )


def display_size(stream: Any) -> tuple[int, int]:
    """Width and height that show `stream`'s pictures with square pixels, before rotation; no side shrinks."""
    aspect = stream.sample_aspect_ratio or 1
    if aspect >= 1:
        return round(stream.width * aspect), stream.height
    return stream.width, round(stream.height / aspect)


def refusal(what: str, where: str, remedy: str) -> DataError:
    """The DataError of one problem."""
    return DataError(Problem(what, where, remedy))


def _refuse_irregular(mode: int, name: str, where: str) -> None:
    if stat.S_ISREG(mode):
        return
    kind = "a folder" if stat.S_ISDIR(mode) else "a link" if stat.S_ISLNK(mode) else "a pipe or a device"
    raise refusal(f"{name} is {kind}, not a file", where, "name a regular file")


def _video_info(container: Any, stream: Any, name: str, where: str) -> ClipInfo:
    first = _first_picture(container, stream, name, where)
    width, height = display_size(stream)
    check_pixels(width, height, name, where)
    duration = _end(container, stream) - first.time
    fps = float(stream.average_rate or stream.guessed_rate or 0) or 1 / max(duration, 1e-3)
    _check_duration(duration, stream, fps, name, where)
    if round(first.rotation / 90) % 2:
        width, height = height, width
    frames = stream.frames or max(1, round(duration * fps))
    codec, pixel_format = stream.codec_context.name, first.format.name
    return ClipInfo(width, height, duration, fps, frames, first.rotation, False, codec, pixel_format)


def _first_picture(container: Any, stream: Any, name: str, where: str) -> Any:
    pictures = list(islice(container.decode(stream), 6))
    if not pictures:
        raise refusal(f"no picture of {name} can be decoded", where, "leave it out or copy it again")
    times = [picture.time for picture in pictures]
    if None in times or any(late <= early for early, late in pairwise(times)):
        # An AVI file with B-frames stores the order of decoding: training would see its frames shuffled.
        raise refusal(f"{name} does not say when its pictures are shown", where, _REENCODE)
    if pictures[0].color_trc == _PQ:
        raise refusal(f"{name} is HDR (PQ)", where, "convert it to SDR: its colours would come out grey")
    return pictures[0]


def _check_duration(duration: float, stream: Any, fps: float, name: str, where: str) -> None:
    stated = float(stream.duration * stream.time_base) if stream.duration else duration
    if duration < stated - max(0.05 * stated, 2 / fps):
        what = f"{name} is cut off: it states {stated:.2f} s and has {duration:.2f} s"
        raise refusal(what, where, "copy it again")
    if not 0 < duration <= MAX_SECONDS:
        raise refusal(f"{name} states a duration of {duration:.0f} s", where, f"cut it to at most {MAX_SECONDS:.0f} s")


def _end(container: Any, stream: Any) -> float:
    """Seconds at which the last picture's time is over, from the last packets: headers may tell the sound's length."""
    stated = stream.duration * stream.time_base if stream.duration else (container.duration or 0) / 1_000_000
    start = stream.start_time or 0
    for seconds in (stated, 0):
        container.seek(start + int(seconds / stream.time_base), stream=stream)
        packets = (p for p in container.demux(stream) if p.pts is not None and not p.is_corrupt)
        ends = [packet.pts + (packet.duration or 0) for packet in packets]
        if ends:
            return float(max(ends) * stream.time_base)
    return 0.0
