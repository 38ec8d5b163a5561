"""What memory, parallelism and the trainer may know of a model, whatever its family."""

from dataclasses import dataclass
from typing import Literal

Task = Literal["t2v", "i2v", "flf2v", "ti2v"]


@dataclass(frozen=True)
class ModelSpec:
    """The shape of a diffusion transformer and of its inputs.

    `blocks` is the attribute of the transformer that holds the list of identical blocks; the first positional argument
    of a block is its hidden state [batch, tokens, dim], all others are shared by every block. Parameters whose name
    has one of `keep_fp32` as a dotted part stay fp32. `temporal_stride`, `spatial_stride` are the VAE's; `patch_size`
    is (frames, height, width) in latents. `experts` are the component names of the transformers.
    """

    name: str
    task: Task
    latent_channels: int
    fps: int
    text_dim: int
    image_tokens: int = 0
    image_dim: int = 0
    text_tokens: int = 512
    temporal_stride: int = 4
    spatial_stride: int = 8
    patch_size: tuple[int, int, int] = (1, 2, 2)
    blocks: str = "blocks"
    keep_fp32: tuple[str, ...] = ()
    experts: tuple[str, ...] = ("transformer",)
    boundary_ratio: float | None = None
    expand_timesteps: bool = False

    @property
    def size_divisor(self) -> int:
        """Height and width of a clip in pixels divide by this."""
        return self.spatial_stride * self.patch_size[1]

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """[channels, frames, height, width] of the latents of a clip in frames and pixels."""
        frames = (num_frames - 1) // self.temporal_stride + 1
        return self.latent_channels, frames, height // self.spatial_stride, width // self.spatial_stride

    def tokens(self, num_frames: int, height: int, width: int) -> int:
        """Tokens of a clip of `num_frames` frames of `height` x `width` pixels in the transformer."""
        _, frames, rows, columns = self.latent_shape(num_frames, height, width)
        return (frames // self.patch_size[0]) * (rows // self.patch_size[1]) * (columns // self.patch_size[2])
