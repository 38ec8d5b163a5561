"""What memory, parallelism and the trainer may know of a model, whatever its family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor, nn

Task = Literal["t2v", "i2v", "flf2v", "ti2v"]
Shared: TypeAlias = tuple[Any, ...]
"""The positional arguments of a block after its hidden state: tensors, None, and tuples of them."""


@runtime_checkable
class BlockStages(Protocol):
    """How a block is cut around its self-attention, so that all else can be evaluated over slices of the tokens.

    For a block's hidden state x, `after(block, x, attention of all tokens over before(block, x, shared), shared)` is
    block(x, *shared); both stages give every token what they give it in any slice that contains it.
    """

    def before(self, block: nn.Module, hidden_states: Tensor, shared: Shared) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value [batch, heads, tokens, head_dim] of a slice [batch, tokens, dim] of the hidden state."""

    def after(self, block: nn.Module, hidden_states: Tensor, attended: Tensor, shared: Shared) -> Tensor:
        """The block's output [batch, tokens, dim] for a slice of its hidden state and of what attention gave for it.

        `attended` is [batch, heads, tokens, head_dim].
        """

    def cut(self, shared: Shared, tokens: slice) -> Shared:
        """`shared` for the slice `tokens` of the token axis: views of what has that axis, the rest as it is."""


@runtime_checkable
class TokenAxis(Protocol):
    """Where tokens are outside of the blocks: what is the same for many, and how ranks compute with a part of them."""

    def held_once(self, transformer: Any) -> AbstractContextManager[None]:
        """Inside the context `transformer` computes once, and holds once, what would be the same for many tokens."""

    def entries(self) -> Mapping[str, Callable[[Any, Callable[[int], slice]], Any]]:
        """The modules of the transformer that give something for every token, with the function that cuts their output.

        It is given the output and a function from the number of all tokens to the slice that is wanted.
        """

    def leaving(self) -> str:
        """The module whose output [batch, tokens, values] must be of all tokens again."""


@runtime_checkable
class Exchange(Protocol):
    """How ranks that have a part of a clip's tokens each come by what self-attention needs, and back."""

    def to_heads(self, rows: Tensor) -> Tensor:
        """From [batch, heads, own tokens, head_dim] to [batch, own heads, tokens, head_dim]."""

    def to_tokens(self, rows: Tensor) -> Tensor:
        """Its inverse."""


@dataclass(frozen=True)
class ModelSpec:
    """The shape of a diffusion transformer and of its inputs.

    `blocks` is the attribute of the transformer that holds the list of identical blocks; the first positional argument
    of a block is its hidden state [batch, tokens, dim], all others are shared by every block. Parameters whose name
    has one of `keep_fp32` as a dotted part stay fp32. `temporal_stride`, `spatial_stride` are the VAE's; `patch_size`
    is (frames, height, width) in latents. `experts` are the component names of the transformers. The hidden state is
    `heads` x `head_dim` wide. `self_attention` is the attribute of a block whose attention sees all tokens; `stages`
    gives, with what must be imported for it, how a block is cut around that attention, `token_axis` likewise where the
    tokens come from and where they go.
    """

    name: str
    task: Task
    latent_channels: int
    fps: int
    text_dim: int
    heads: int
    head_dim: int
    stages: Callable[[], BlockStages]
    token_axis: Callable[[], TokenAxis]
    image_tokens: int = 0
    image_dim: int = 0
    text_tokens: int = 512
    temporal_stride: int = 4
    spatial_stride: int = 8
    patch_size: tuple[int, int, int] = (1, 2, 2)
    blocks: str = "blocks"
    self_attention: str = "attn1"
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
