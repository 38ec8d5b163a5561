"""What the bundled tiny models reach on film that they have not seen; used by the tests and by `benchmarks`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longtake.data.video import Window, read_clip
from longtake.demo.demo import SIZE, UNSEEN_STARTS
from longtake.models.wan import encoders


def frame_psnr(video: Tensor, reference: Tensor) -> float:
    """Mean over frames of the PSNR in dB of uint8 videos [frames, 3, height, width]."""
    error = (video.float() - reference.float()).square().mean((1, 2, 3))
    return float((10 * torch.log10(255**2 / error.clamp(min=1e-10))).mean())


def unseen_shots(film: Path, frames: int) -> dict[float, Tensor]:
    """Start in seconds -> the first `frames` frames at 16 fps of each shot that no bundled weight was trained on."""
    return {start: read_clip(film.resolve(), Window(start, frames, 16.0), SIZE) for start in UNSEEN_STARTS}


@torch.no_grad()
def reconstruct(vae: Any, frames: Tensor) -> Tensor:
    """`frames` uint8 [frames, 3, height, width] through the VAE and back."""
    video = encoders.normalise_pixels(frames).permute(1, 0, 2, 3)[None]
    decoded = encoders.decode_latents(vae, encoders.encode_video(vae, video))[0].permute(1, 0, 2, 3)
    return ((decoded.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def nearest(video: Tensor, shots: Mapping[float, Tensor], frames: int) -> float:
    """Start of the shot whose first `frames` frames are nearest to those of `video` by PSNR."""
    return max(shots, key=lambda start: frame_psnr(video[:frames], shots[start][:frames]))
