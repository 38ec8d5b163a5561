# ruff: noqa: F722
"""Pictures in and out: a window of a clip or a still image as uint8 tensors, and tensors as an mp4."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import av
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from longtake.data.sniff import (
    ClipInfo,
    Window,
    content_hash,
    display_size,
    open_image,
    open_regular,
    open_video,
    probe,
    refusal,
)
from longtake.errors import Problem, RunError

if TYPE_CHECKING:
    from jaxtyping import UInt8

__all__ = [
    "ClipInfo",
    "Window",
    "content_hash",
    "cover_and_crop",
    "covering",
    "pick_by_time",
    "probe",
    "read_clip",
    "read_image",
    "write_clip",
]

SLACK_SECONDS = 1.1e-3
"""Matroska rounds timestamps to a millisecond, so a picture may be stamped that much after its time."""

_SEEK_FROM_SECONDS = 2.0
_SEEK_BACK_SECONDS = (0.0, 1.0, 4.0, 16.0, 64.0)
# swscale's defaults for speed darken by one or two grey levels: bicubic, with chroma at full width.
_SWS_FLAGS = 4 | 0x2000
_FULL_RANGE = 2  # AVCOL_RANGE_JPEG
_UNSPECIFIED = 2  # AVCOL_SPC_UNSPECIFIED
_BT709, _BT601 = 1, 5

T = TypeVar("T")


def read_clip(path: Path, window: Window, size: tuple[int, int]) -> UInt8[Tensor, "frames 3 height width"]:
    """The window's frames as uint8 [frames, 3, height, width], scaled to cover `size` (width, height) and cropped.

    Frame i is the picture shown `start + i / fps` seconds after the first one, whatever the clip's own rate. Raises
    DataError that names the clip where it is damaged or ends before the window does.
    """
    where = str(path)
    times = [window.start + index / window.fps for index in range(window.frames)]
    frames = torch.empty(window.frames, 3, size[1], size[0], dtype=torch.uint8)
    with open_regular(path, where) as file, open_video(file, path.name, where) as (container, stream):
        done, last = 0, None
        for picture in pick_by_time(_timed(container, stream, window.start), times):
            if picture is last:
                frames[done] = frames[done - 1]
            else:
                frames[done] = cover_and_crop(_rgb(picture, stream, path)[None], size)[0]
            done, last = done + 1, picture
    if done < window.frames:
        what = f"{path.name} ends before {times[done]:.3f} s, and the window goes on to {times[-1]:.3f} s"
        raise refusal(what, where, "move or shorten the window, or copy the clip again")
    return frames


def read_image(path: Path, size: tuple[int, int]) -> UInt8[Tensor, "3 height width"]:
    """The still image as uint8 [3, height, width], scaled and cropped exactly as a clip's frames are.

    The camera's orientation is honoured; transparent parts are laid over black. Raises DataError naming the image.
    """
    where = str(path)
    with open_regular(path, where) as file, open_image(file, path.name, where) as image:
        pixels = torch.from_numpy(np.array(_to_rgb(ImageOps.exif_transpose(image), path)))
    return cover_and_crop(pixels.permute(2, 0, 1)[None], size)[0]


def cover_and_crop(
    frames: UInt8[Tensor, "frames 3 given_height given_width"], size: tuple[int, int]
) -> UInt8[Tensor, "frames 3 height width"]:
    """uint8 [frames, 3, H, W] scaled (antialiased, bicubic) to cover `size` (width, height), the centre cut out.

    Clips, still images and conditioning images all go through here, so that a clip's first frame given as an image
    gives the same bytes.
    """
    width, height = size
    columns, rows = covering((frames.shape[3], frames.shape[2]), size)
    if (rows, columns) != tuple(frames.shape[2:]):
        scaled = torch.nn.functional.interpolate(frames.float(), (rows, columns), mode="bicubic", antialias=True)
        frames = scaled.round_().clamp_(0, 255).to(torch.uint8)
    top, left = (rows - height) // 2, (columns - width) // 2
    return frames[:, :, top : top + height, left : left + width].contiguous()


def covering(given: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Width and height to which a picture of `given` is scaled to cover `size`, all of them (width, height)."""
    scale = max(size[0] / given[0], size[1] / given[1])
    return max(size[0], round(given[0] * scale)), max(size[1], round(given[1] * scale))


def write_clip(frames: UInt8[Tensor, "frames 3 height width"], path: Path, fps: float) -> None:
    """Writes uint8 [frames, 3, height, width], sides even, as H.264 in mp4; raises RunError where that fails."""
    count, _, height, width = frames.shape
    if not count or height % 2 or width % 2:
        raise refusal(f"cannot write {count} frames of {width}x{height} as mp4", str(path), "give even sides")
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        with av.open(str(unfinished), "w", format="mp4") as container:
            _encode(container, frames, Fraction(fps).limit_denominator(1001))
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise RunError(Problem(f"cannot write the video ({error.strerror})", str(path), "free space there")) from error


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


def _timed(container: Any, stream: Any, start: float) -> Iterator[tuple[float, float, Any]]:
    """(seconds since the first picture, duration, picture) from at or before `start` to the end."""
    decoded = container.decode(stream)
    first = next(decoded, None)
    if first is None or first.time is None:
        return
    origin = first.time
    pictures: Iterator[Any] = chain([first], decoded)
    if start > _SEEK_FROM_SECONDS:
        pictures = _sought(container, stream, origin, start) or _from_start(container, stream)
    pause = 1 / float(stream.average_rate or stream.guessed_rate or 25)
    for picture in pictures:
        duration = float(picture.duration * stream.time_base) if picture.duration else pause
        if picture.time is not None:
            yield picture.time - origin, duration, picture


def _sought(container: Any, stream: Any, origin: float, start: float) -> Iterator[Any] | None:
    # A seek may land after its target (open groups of pictures, no index): go further back until it does not.
    for back in _SEEK_BACK_SECONDS:
        seconds = origin + start - back
        if seconds <= origin:
            return None
        container.seek(int(seconds / stream.time_base), stream=stream)
        decoded = container.decode(stream)
        picture = next(decoded, None)
        if picture is not None and picture.time is not None and picture.time - origin <= start + SLACK_SECONDS:
            return chain([picture], decoded)
    return None


def _from_start(container: Any, stream: Any) -> Iterator[Any]:
    container.seek(stream.start_time or 0, stream=stream)
    return iter(container.decode(stream))


def _rgb(picture: Any, stream: Any, path: Path) -> UInt8[Tensor, "3 height width"]:
    """The decoded picture as uint8 [3, height, width], pixels square and the right way up."""
    if picture.is_corrupt:
        # FFmpeg paints over what it cannot decode, and goes on.
        raise refusal(f"{path.name} is damaged at {picture.time:.2f} s", str(path), "copy it again or leave it out")
    if (picture.width, picture.height) != (stream.width, stream.height):
        raise refusal(f"{path.name} changes its size at {picture.time:.2f} s", str(path), "cut the clip there")
    width, height = display_size(stream)
    # Untagged video is BT.709 from HD upwards and BT.601 below, as players take it.
    guess = _BT709 if width >= 1280 or height > 576 else _BT601
    colorspace = guess if picture.colorspace == _UNSPECIFIED else None
    rgb = picture.reformat(
        width, height, "rgb24", src_colorspace=colorspace, interpolation=_SWS_FLAGS, dst_color_range=_FULL_RANGE
    )
    return _upright(torch.from_numpy(rgb.to_ndarray()).permute(2, 0, 1), picture)


def _upright(pixels: UInt8[Tensor, "3 stored_height stored_width"], picture: Any) -> UInt8[Tensor, "3 height width"]:
    """Applies the display matrix, which PyAV leaves to us: (x, y) goes to (a x + c y, b x + d y)."""
    entry = picture.side_data.get("DISPLAYMATRIX")
    if entry is None:
        return pixels
    a, b, _, c, d = (int(number) for number in np.frombuffer(bytes(entry), dtype=np.int32)[:5])
    turned = abs(b) > abs(a)
    if turned:
        pixels = pixels.transpose(1, 2)
    x, y = (c, b) if turned else (a, d)
    return pixels.flip([dim for dim, sign in ((2, x), (1, y)) if sign < 0])


def _to_rgb(image: Image.Image, path: Path) -> Image.Image:
    if image.mode.startswith("I;16"):
        # Pillow would clip 16 bits to white.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise refusal(f"{path.name} has pixels of 32 bits", str(path), "write it anew with 8 bits a channel")
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, (0, 0, 0, 255))
        return Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _encode(container: Any, frames: UInt8[Tensor, "frames 3 height width"], rate: Fraction) -> None:
    stream = container.add_stream("libx264", rate=rate, options={"crf": "12", "preset": "medium"})
    stream.width, stream.height, stream.pix_fmt = frames.shape[3], frames.shape[2], "yuv420p"
    context = stream.codec_context
    context.thread_count = 1  # with several, the same frames do not always give the same bytes
    context.colorspace = context.color_primaries = context.color_trc = _BT709
    context.color_range = 1  # limited, what players expect of yuv420p
    for frame in frames:
        picture = av.VideoFrame.from_ndarray(frame.permute(1, 2, 0).contiguous().numpy(), format="rgb24")
        converted = picture.reformat(
            format="yuv420p", dst_colorspace=_BT709, interpolation=_SWS_FLAGS, dst_color_range=1
        )
        for packet in stream.encode(converted):
            container.mux(packet)
    for packet in stream.encode(None):
        container.mux(packet)
