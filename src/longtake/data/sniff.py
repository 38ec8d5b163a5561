"""What a clip's file is, found out from its content before it is decoded at length. Runs in `decoding_child`."""

import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BufferedReader
from itertools import islice, pairwise
from typing import Any

import av
from PIL import Image

from longtake.data.foreign import refuse_foreign
from longtake.data.regular_files import refusal
from longtake.data.stills import check_single, damaged_image
from longtake.data.whole import check_index, check_openable, check_whole, is_container
from longtake.errors import DataError

MAX_SIDE = 8192
MAX_PIXELS = 64 * 1024 * 1024
MAX_SECONDS = 24 * 3600.0
MIN_FPS, MAX_FPS = 0.01, 1000.0
"""Beyond them it is the clock that is wrong: FFmpeg takes a clock of 0 Hz as one of 1 Hz."""

VIDEO_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi"
"""Containers that FFmpeg may open: playlists, `concat:` and the like reach other files."""
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")

_IMAGE_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM", b"II*\x00", b"MM\x00*")
_EXIF_ORIENTATION = 0x0112
_PQ = 16  # AVCOL_TRC_SMPTE2084
_CLOCK = re.compile(r"(\d+):(\d+):(\d+\.?\d*)")
_COPY = "copy it again, or leave it out"
_REENCODE = "write it anew with ffmpeg as H.264 in mp4"
_THREADS_BYTES = 256 * 2**20
"""Of pictures that the decoder's threads may have at once, each of them one."""


@dataclass(frozen=True)
class ClipInfo:
    """What a clip shows: pixels as displayed (after rotation and pixel aspect), seconds, frames a second.

    `frames` is the header's estimate, `rotation` the display matrix's degrees counter-clockwise. A still image has one
    frame, no duration and no fps. `codec` and `pixel_format` are for people to read. `fingerprint` tells this file's
    content from another's, well enough for `data.buckets` to draw windows by it.
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
    fingerprint: str = field(default="", compare=False)


@dataclass(frozen=True)
class Window:
    """`frames` frames at `fps` from `start` seconds after the clip's first picture."""

    start: float
    frames: int
    fps: float


@dataclass(frozen=True)
class Video:
    """An open clip: PyAV's container and the stream of its pictures; `decoded` is called after each picture."""

    container: Any
    stream: Any
    decoded: Callable[[], None]
    name: str

    def pictures(self) -> Iterator[Any]:
        """Pictures from here on, in the order in which they are shown; raises DataError at one that is damaged."""
        last = None
        try:
            for packet in self.container.demux(self.stream):
                if packet.has_sidedata("encryption_info"):
                    remedy = "give it without its protection"
                    raise refusal(f"{self.name} is encrypted", "", remedy, code="clip-encrypted")
                for last in packet.decode():
                    self.decoded()
                    yield last
        except av.FFmpegError as error:
            if isinstance(error, MemoryError):
                raise
            if last is None:
                raise _undecodable(self.name, f" ({error.strerror})") from None
            what = f"{self.name} is damaged after {last.time or 0:.2f} s ({error.strerror})"
            raise refusal(what, "", _COPY, code="clip-damaged-picture") from None

    def seek(self, timestamp: int) -> None:
        """Goes to a picture from which on can be decoded, at `timestamp` of the stream's clock or before."""
        self.container.seek(timestamp, stream=self.stream)


def look(file: BufferedReader, name: str, decoded: Callable[[], None]) -> ClipInfo:
    """What the clip or image in `file` shows; raises DataError if it cannot be trained on.

    Reads headers, the first pictures and the last packets.
    """
    if sniff_image(file):
        with open_image(file, name) as image:
            width, height = image.size
            turned = image.getexif().get(_EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
            shown = (height, width) if turned else (width, height)
            return ClipInfo(*shown, 0.0, 0.0, 1, 0, True, image.format or "", image.mode)
    with open_video(file, name, decoded) as video:
        return _video_info(video, name)


def sniff_image(file: BufferedReader) -> bool:
    """Whether the content begins like a still image; leaves `file` at its start."""
    head = file.read(16)
    file.seek(0)
    return head.startswith(_IMAGE_MAGIC) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


@contextmanager
def open_image(file: BufferedReader, name: str) -> Iterator[Image.Image]:
    """The image in `file`, its size checked before anything is decoded; damage, then or later, raises DataError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(file, formats=IMAGE_FORMATS)
        with image:
            if max(image.size) > MAX_SIDE or image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            check_single(image, name)
            yield image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        what = f"{name} has more than {MAX_PIXELS} pixels, or more than {MAX_SIDE} a side"
        raise refusal(what, "", "make it smaller", code="image-too-large") from None
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise damaged_image(file, name, error) from None


@contextmanager
def open_video(file: BufferedReader, name: str, decoded: Callable[[], None]) -> Iterator[Video]:
    """The clip in `file`, limits checked; damage, then or later, raises DataError.

    FFmpeg gets a Python file and a list of containers: given a path it would follow playlists and URLs.
    """
    check_whole(file, name)
    try:
        options = {"format_whitelist": VIDEO_FORMATS}
        with av.open(file, options=options, metadata_errors="replace") as container:
            # Cover art is a video stream of one picture, and the picture of a song is no clip.
            streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
            if not streams:
                what = f"{name} has no pictures, only sound or data"
                raise refusal(what, "", "leave it out", code="clip-without-pictures")
            stream = streams[0]
            if stream.codec_context is None:
                what = f"{name} has a codec that is not built in"
                raise refusal(what, "", _REENCODE, code="clip-codec-unknown")
            check_pixels(stream.width, stream.height, name)
            _check_aspect(stream, name)
            if container.format.name.startswith("mov"):
                check_index(file, stream, name)
            stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
            stream.thread_type = "AUTO"
            at_once = _THREADS_BYTES // (3 * stream.width * stream.height)
            stream.codec_context.thread_count = max(1, min(os.cpu_count() or 1, at_once))
            yield Video(container, stream, decoded, name)
    except av.FFmpegError as error:
        if isinstance(error, MemoryError):
            raise
        if not is_container(file):
            refuse_foreign(file, name)
        check_openable(file, name)
        what = f"{name} is a damaged video ({error.strerror})"
        remedy = "give an intact mp4, mov, mkv, webm or avi, or a PNG or JPEG"
        raise refusal(what, "", remedy, code="clip-damaged") from None


def check_pixels(width: int, height: int, name: str) -> None:
    """Raises DataError where a picture is empty, or so large that decoding it is an attack on memory."""
    if width < 1 or height < 1:
        what = f"{name} has pictures of {width}x{height}"
        raise refusal(what, "", _REENCODE, code="picture-without-size")
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        what = f"{name} has pictures of {width}x{height}, more than the limit"
        remedy = f"scale it down to at most {MAX_SIDE} a side and {MAX_PIXELS} pixels"
        raise refusal(what, "", remedy, code="picture-too-large")


def _check_aspect(stream: Any, name: str) -> None:
    width, height = display_size(stream)
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        aspect = stream.sample_aspect_ratio
        what = f"{name} states pixels of {aspect.numerator}:{aspect.denominator}, which make pictures of"
        what = f"{what} {width}x{height}, more than the limit"
        raise refusal(what, "", _REENCODE, code="picture-aspect")


def _undecodable(name: str, why: str = "") -> DataError:
    return refusal(f"no picture of {name} can be decoded{why}", "", _COPY, code="clip-undecodable")


def display_size(stream: Any) -> tuple[int, int]:
    """Width and height that show `stream`'s pictures with square pixels, before rotation; no side shrinks."""
    aspect = stream.sample_aspect_ratio or 1
    if aspect >= 1:
        return round(stream.width * aspect), stream.height
    return stream.width, round(stream.height / aspect)


def _video_info(video: Video, name: str) -> ClipInfo:
    first, stream = _first_picture(video, name), video.stream
    width, height = display_size(stream)
    duration = _end(video) - first.time
    fps = float(stream.average_rate or stream.guessed_rate or 0) or 1 / max(duration, 1e-3)
    _check_duration(duration, _stated(video, first.time) or duration, fps, name)
    _check_rate(fps, name)
    if round(first.rotation / 90) % 2:
        width, height = height, width
    frames = max(1, round(duration * fps))
    frames = min(frames, stream.frames or frames)  # the header counts those too that an edit list skips
    codec, pixel_format = stream.codec_context.name, first.format.name
    return ClipInfo(width, height, duration, fps, frames, first.rotation, False, codec, pixel_format)


def _first_picture(video: Video, name: str) -> Any:
    pictures = video.pictures()
    first = next(pictures, None)
    if first is None:
        entries = list(video.stream.index_entries)
        if entries and all(entry.is_discard for entry in entries):
            what = f"the edit list of {name} skips all of its pictures"
            raise refusal(what, "", _REENCODE, code="clip-edited-away")
        raise _undecodable(name)
    times = [first.time, *(picture.time for picture in islice(pictures, 5))]  # of which one alone is kept
    if None in times or any(late <= early for early, late in pairwise(times)):
        # An AVI file with B-frames stores the order of decoding: training would see its frames shuffled.
        what = f"{name} does not say when its pictures are shown"
        raise refusal(what, "", _REENCODE, code="clip-without-times")
    if first.color_trc == _PQ:
        remedy = "convert it to SDR: its colours would come out grey"
        raise refusal(f"{name} is HDR (PQ)", "", remedy, code="clip-hdr")
    return first


def _stated(video: Video, begin: float) -> float:
    """Seconds of pictures that the header states; 0 where it states none."""
    container, stream = video.container, video.stream
    if stream.duration:
        return float(stream.duration * stream.time_base)
    # Matroska's own duration is that of the longest track; a tag has each track's, and may be older than a cut.
    tag = _CLOCK.fullmatch(stream.metadata.get("DURATION", ""))
    if tag is None or not container.duration:
        return 0.0
    hours, minutes, seconds = (float(number) for number in tag.groups())
    return min(hours * 3600 + minutes * 60 + seconds, container.duration / 1_000_000) - begin


def _check_duration(duration: float, stated: float, fps: float, name: str) -> None:
    if duration < stated - max(0.05 * stated, 2 / fps):
        what = f"{name} is cut off: it states {stated:.2f} s and has {duration:.2f} s"
        raise refusal(what, "", "copy it again", code="clip-cut-off")
    if not 0 < duration <= MAX_SECONDS:
        remedy = f"cut it to at most {MAX_SECONDS:.0f} s"
        raise refusal(f"{name} states a duration of {duration:.0f} s", "", remedy, code="clip-duration")


def _check_rate(fps: float, name: str) -> None:
    if not MIN_FPS <= fps <= MAX_FPS:
        what = f"{name} states {fps:.3g} pictures a second"
        raise refusal(what, "", _REENCODE, code="clip-rate")


def _end(video: Video) -> float:
    """Seconds at which the last picture's time is over, from the last packets: headers may tell the sound's length."""
    container, stream = video.container, video.stream
    stated = stream.duration * stream.time_base if stream.duration else (container.duration or 0) / 1_000_000
    start = stream.start_time or 0
    for seconds in (stated, 0):
        video.seek(start + int(seconds / stream.time_base))
        packets = (p for p in container.demux(stream) if p.pts is not None and not (p.is_corrupt or p.is_discard))
        ends = [packet.pts + (packet.duration or 0) for packet in packets]
        if ends:
            return float(max(ends) * stream.time_base)
    return 0.0
