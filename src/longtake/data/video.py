# ruff: noqa: F722
"""Pictures in and out: a window of a clip or a still image as uint8 tensors, and tensors as an mp4."""

from __future__ import annotations

from contextlib import closing
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import torch
from torch import Tensor

from longtake.data.decoder import probe, shared_decoder
from longtake.data.decoding import BT709, SWS_FLAGS
from longtake.data.regular_files import content_hash, refusal
from longtake.data.sniff import ClipInfo, Window
from longtake.errors import Problem, RunError

if TYPE_CHECKING:
    from jaxtyping import UInt8

__all__ = [
    "ClipInfo",
    "Window",
    "content_hash",
    "cover_and_crop",
    "covering",
    "probe",
    "read_clip",
    "read_image",
    "write_clip",
]


def read_clip(path: Path, window: Window, size: tuple[int, int]) -> UInt8[Tensor, "frames 3 height width"]:
    """The window's frames as uint8 [frames, 3, height, width], scaled to cover `size` (width, height) and cropped.

    Frame i is the picture shown `start + i / fps` seconds after the first one, whatever the clip's own rate. Raises
    DataError that names the clip where it is damaged or ends before the window does. `path` is resolved.
    """
    frames = torch.empty(window.frames, 3, size[1], size[0], dtype=torch.uint8)
    last = None
    with closing(shared_decoder().clip(path, window, str(path))) as found:
        for index, pixels in enumerate(found):
            frames[index] = frames[index - 1] if pixels is last else cover_and_crop(_planes(pixels), size)[0]
            last = pixels
    return frames


def read_image(path: Path, size: tuple[int, int]) -> UInt8[Tensor, "3 height width"]:
    """The still image as uint8 [3, height, width], scaled and cropped exactly as a clip's frames are.

    The camera's orientation is honoured; transparent parts are laid over black. Raises DataError naming the image.
    `path` is resolved.
    """
    return cover_and_crop(_planes(shared_decoder().image(path, str(path))), size)[0]


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
        what = f"cannot write {count} frames of {width}x{height} as mp4"
        raise refusal(what, str(path), "give even sides", code="video-odd-sides")
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        with av.open(str(unfinished), "w", format="mp4") as container:
            _encode(container, frames, Fraction(fps).limit_denominator(1001))
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        what = f"cannot write the video ({error.strerror})"
        raise RunError(Problem(what, str(path), "free space there", code="video-not-written")) from error


def _planes(pixels: Any) -> UInt8[Tensor, "1 3 height width"]:
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def _encode(container: Any, frames: UInt8[Tensor, "frames 3 height width"], rate: Fraction) -> None:
    stream = container.add_stream("libx264", rate=rate, options={"crf": "12", "preset": "medium"})
    stream.width, stream.height, stream.pix_fmt = frames.shape[3], frames.shape[2], "yuv420p"
    context = stream.codec_context
    context.thread_count = 1  # with several, the same frames do not always give the same bytes
    context.colorspace = context.color_primaries = context.color_trc = BT709
    context.color_range = 1  # limited, what players expect of yuv420p
    for frame in frames:
        picture = av.VideoFrame.from_ndarray(frame.permute(1, 2, 0).contiguous().numpy(), format="rgb24")
        converted = picture.reformat(format="yuv420p", dst_colorspace=BT709, interpolation=SWS_FLAGS, dst_color_range=1)
        for packet in stream.encode(converted):
            container.mux(packet)
    for packet in stream.encode(None):
        container.mux(packet)
