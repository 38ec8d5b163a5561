"""What is wrong with a still image that Pillow opens, or fails on."""

import os
from io import BufferedReader

from PIL import Image, UnidentifiedImageError

from longtake.data.regular_files import refusal
from longtake.errors import DataError

_COPY = "copy it again, or leave it out"
_PNG = "write it anew as PNG"
_SUBFILE = 254
"""TIFF's tag of what a picture is beside the others."""


def check_single(image: Image.Image, name: str) -> None:
    """Raises DataError where the image has several pictures.

    A second picture of a JPEG is a phone's map of brightness, and of a TIFF often a small copy.
    """
    count = getattr(image, "n_frames", 1) if image.format in ("PNG", "WEBP", "TIFF") else 1
    if count > 1 and image.format == "TIFF":
        image.seek(1)
        count = 1 if image.tag_v2.get(_SUBFILE, 0) & 1 else count  # type: ignore[attr-defined]  # of a TIFF
        image.seek(0)
    if count > 1:
        what = f"{name} has {count} pictures, of which only the first would be used"
        raise refusal(what, "", "give stills, or write it as mp4", code="image-several")


def damaged_image(file: BufferedReader, name: str, error: Exception) -> DataError:
    """What Pillow's `error` means."""
    text = str(error)
    if isinstance(error, UnidentifiedImageError):
        text = "its header tells nothing"
    if "MAX_TEXT" in text:
        what = f"{name} has texts or profiles of many megabytes ({text})"
        return refusal(what, "", _PNG, code="image-metadata-too-large")
    file.seek(0)
    head = file.read(8)
    is_short = head[:4] == b"RIFF" and int.from_bytes(head[4:8], "little") + 8 > os.fstat(file.fileno()).st_size
    if is_short or "truncated" in text.lower():
        return refusal(f"{name} is cut off ({text})", "", _COPY, code="image-cut-off")
    return refusal(f"{name} is a damaged image ({text})", "", _PNG, code="image-damaged")
