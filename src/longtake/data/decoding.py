"""Pictures out of an open file: a clip's by their time, a still's; uint8, upright, with square pixels."""

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from io import BufferedReader
from itertools import chain
from typing import Any, TypeVar

import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageOps

from longtake.data.regular_files import refusal
from longtake.data.sniff import Video, Window, display_size, open_image, open_video

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
"""uint8 [height, width, 3], RGB."""

LENGTH = struct.Struct(">I")
"""What goes before each message between `decoder` and `decoding_child`."""

SLACK_SECONDS = 1.1e-3
"""Matroska rounds timestamps to a millisecond, so a picture may be stamped that much after its time."""

_SEEK_FROM_SECONDS = 2.0
_SEEK_BACK_SECONDS = (0.0, 1.0, 4.0, 16.0, 64.0)
# Bicubic, with chroma at full width. Without accurate rounding swscale has a shortcut for the commonest formats, which
# repeats each sample of chroma: edges of colour are off by 30 levels and half a pixel.
SWS_FLAGS = 4 | 0x2000 | 0x40000
BT709, _BT601 = 1, 5
_FULL_RANGE = 2  # AVCOL_RANGE_JPEG
_UNSPECIFIED = 2  # AVCOL_SPC_UNSPECIFIED

T = TypeVar("T")


def clip_pictures(
    file: BufferedReader, name: str, window: Window, decoded: Callable[[], None]
) -> Iterator[Pixels | None]:
    """The pixels of the window's frames one after another; None for one that shows the same picture as the last.

    Frame i is the picture shown `start + i / fps` seconds after the first one, whatever the clip's own rate. Raises
    DataError where the clip is damaged or ends before the window does.
    """
    times = [window.start + index / window.fps for index in range(window.frames)]
    done, last = 0, None
    scaler = VideoReformatter()  # a picture's own would start threads for each, which stay until they are collected
    with open_video(file, name, decoded) as video:
        for picture in pick_by_time(_timed(video, window.start), times):
            yield None if picture is last else _rgb(picture, scaler, video.stream, name)
            done, last = done + 1, picture
    if done < window.frames:
        what = f"{name} ends before {times[done]:.3f} s, and the window goes on to {times[-1]:.3f} s"
        raise refusal(what, "", "move or shorten the window, or copy the clip again", code="clip-ends-early")


def image_pixels(file: BufferedReader, name: str) -> Pixels:
    """The still's pixels: the camera's orientation is honoured, transparent parts are laid over black."""
    with open_image(file, name) as image:
        return np.array(_to_rgb(ImageOps.exif_transpose(image), name))


def pick_by_time(pictures: Iterable[tuple[float, float, T]], times: Sequence[float]) -> Iterator[T]:
    """For each of the rising `times` the picture shown then, from (seconds, duration, picture) in order of time.

    That is the last one that begins at or before it. Yields fewer where the pictures end before the times do.
    """
    done, shown, until = 0, None, 0.0
    for seconds, duration, picture in pictures:
        while shown is not None and done < len(times) and times[done] + SLACK_SECONDS < seconds:
            yield shown
            done += 1
        if done == len(times):
            return
        shown, until = picture, max(seconds + SLACK_SECONDS, seconds + duration - SLACK_SECONDS)
    while shown is not None and done < len(times) and times[done] < until:
        yield shown
        done += 1


def _timed(video: Video, start: float) -> Iterator[tuple[float, float, Any]]:
    """(seconds since the first picture, duration, picture) from at or before `start` to the end."""
    decoded = video.pictures()
    first = next(decoded, None)
    if first is None or first.time is None:
        return
    origin, stream = first.time, video.stream
    pictures: Iterator[Any] = chain([first], decoded)
    if start > _SEEK_FROM_SECONDS:
        pictures = _sought(video, origin, start) or _from_start(video)
    pause = 1 / float(stream.average_rate or stream.guessed_rate or 25)
    for picture in pictures:
        duration = float(picture.duration * stream.time_base) if picture.duration else pause
        if picture.time is not None:
            yield picture.time - origin, duration, picture


def _sought(video: Video, origin: float, start: float) -> Iterator[Any] | None:
    # A seek may land after its target (open groups of pictures, no index): go further back until it does not.
    for back in _SEEK_BACK_SECONDS:
        seconds = origin + start - back
        if seconds <= origin:
            return None
        video.seek(int(seconds / video.stream.time_base))
        decoded = video.pictures()
        picture = next(decoded, None)
        if picture is not None and picture.time is not None and picture.time - origin <= start + SLACK_SECONDS:
            return chain([picture], decoded)
    return None


def _from_start(video: Video) -> Iterator[Any]:
    video.seek(video.stream.start_time or 0)
    return video.pictures()


def _rgb(picture: Any, scaler: Any, stream: Any, name: str) -> Pixels:
    """The decoded picture's pixels, square and the right way up."""
    if picture.is_corrupt:
        # FFmpeg paints over what it cannot decode, and goes on.
        what = f"{name} is damaged at {picture.time:.2f} s"
        raise refusal(what, "", "copy it again or leave it out", code="clip-damaged-picture")
    if (picture.width, picture.height) != (stream.width, stream.height):
        what = f"{name} changes its size at {picture.time:.2f} s"
        raise refusal(what, "", "cut the clip there", code="clip-changes-size")
    width, height = display_size(stream)
    # Untagged video is BT.709 from HD upwards and BT.601 below, as players take it.
    guess = BT709 if width >= 1280 or height > 576 else _BT601
    colorspace = guess if picture.colorspace == _UNSPECIFIED else None
    rgb = scaler.reformat(
        picture,
        width,
        height,
        "rgb24",
        src_colorspace=colorspace,
        interpolation=SWS_FLAGS,
        dst_color_range=_FULL_RANGE,
        threads=1,
    )
    plane = rgb.planes[0]
    lines = np.frombuffer(plane, np.uint8).reshape(height, plane.line_size)  # a copy of a large picture would count
    return _upright(lines[:, : width * 3].reshape(height, width, 3), picture)


def _upright(pixels: Pixels, picture: Any) -> Pixels:
    """Applies the display matrix, which PyAV leaves to us: (x, y) goes to (a x + c y, b x + d y)."""
    entry = picture.side_data.get("DISPLAYMATRIX")
    if entry is None:
        return pixels
    a, b, _, c, d = (int(number) for number in np.frombuffer(bytes(entry), dtype=np.int32)[:5])
    turned = abs(b) > abs(a)
    if turned:
        pixels = pixels.transpose(1, 0, 2)
    x, y = (c, b) if turned else (a, d)
    return pixels[:: -1 if y < 0 else 1, :: -1 if x < 0 else 1]


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I;16"):
        # Pillow would clip 16 bits to white.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        what = f"{name} has pixels of 32 bits"
        raise refusal(what, "", "write it anew with 8 bits a channel", code="image-depth")
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, (0, 0, 0, 255))
        return Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")
