# ruff: noqa: F722
"""The first, middle and last frame of a clip exactly as training will see them, and small pictures of them."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image
from torch import Tensor

from longtake.data.dataset import Placed
from longtake.data.video import Window, read_clip, read_image

if TYPE_CHECKING:
    from jaxtyping import UInt8

SIDE = 256
"""Most pixels of either side of a small picture."""
QUALITY = 85
NAMES = ("first", "middle", "last")


@dataclass(frozen=True)
class Picture:
    """A small picture of a frame, as a data URI, with its size and what it is of."""

    name: str
    seconds: float
    uri: str
    width: int
    height: int


def frames_of(placed: Placed) -> dict[int, UInt8[Tensor, "3 height width"]]:
    """Frames of the clip's window by their index, each read as `prepare` reads it; of a still, itself.

    Raises DataError where the clip is damaged. What lies between the frames is not looked at.
    """
    clip, window = placed.clip, placed.clip.window
    path, size = clip.record.path, (clip.bucket.width, clip.bucket.height)
    if clip.info.is_image:
        return {0: read_image(path, size)}
    wanted = dict.fromkeys((0, window.frames // 2, window.frames - 1))
    alone = {index: Window(window.start + index / window.fps, 1, window.fps) for index in wanted}
    return {index: read_clip(path, window, size)[0] for index, window in alone.items()}


def pictures_of(placed: Placed) -> list[Picture]:
    """`frames_of` as small pictures; raises DataError as it does."""
    window, found = placed.clip.window, frames_of(placed)
    names = NAMES if len(found) > 1 else ("still",)
    return [
        _picture(name, window.start + index / window.fps, frame)
        for name, (index, frame) in zip(names, found.items(), strict=False)
    ]


def _picture(name: str, seconds: float, frame: UInt8[Tensor, "3 height width"]) -> Picture:
    image = Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy())
    image.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY)
    uri = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
    return Picture(name, seconds, uri, image.width, image.height)
