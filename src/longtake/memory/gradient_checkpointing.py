"""Gradient checkpointing: blocks, or segments of them, keep their input alone and are computed again in backward."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, noop_context_fn

from longtake.memory.host_buffers import Keep, Kept

Contexts: TypeAlias = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]
"""Makes the contexts of one checkpointed call: in the forward pass, and when it is computed again."""


@contextmanager
def gradient_checkpointing(
    transformer: Any, blocks: nn.ModuleList, every: int, keep_for: Callable[[int], Keep], contexts: Contexts | None
) -> Iterator[None]:
    """Checkpoints a diffusers `transformer` in segments of `every` blocks; segment i keeps its input by `keep_for(i)`.

    Recomputation replays the random state, so dropout inside a block is drawn the same.
    """
    number = {id(block): index for index, block in enumerate(blocks)}

    def run(block: nn.Module, hidden_states: Tensor, *shared: Any) -> Any:
        index = number[id(block)]
        if index % every:
            return hidden_states  # computed with the first block of its segment
        segment = blocks[index : index + every]
        with _taken_over(hidden_states, keep_for(index // every)):
            return checkpoint(
                _through, segment, hidden_states, *shared, use_reentrant=False, context_fn=contexts or noop_context_fn
            )

    transformer.enable_gradient_checkpointing(run)
    try:
        yield
    finally:
        transformer.disable_gradient_checkpointing()


def _through(segment: nn.ModuleList, hidden_states: Tensor, *shared: Any) -> Any:
    for block in segment:
        hidden_states = block(hidden_states, *shared)
    return hidden_states


@contextmanager
def _taken_over(hidden_states: Tensor, keep: Keep) -> Iterator[None]:
    """Autograd's saving of the hidden state goes through `keep`; text, time embedding and RoPE tables are all blocks'.

    torch saves the inputs of a checkpointed call through the hooks that hold around it.
    """
    own = hidden_states.untyped_storage()._cdata  # a number that `meta` tensors have too

    def pack(tensor: Tensor) -> Tensor | Kept:
        return keep(tensor) if tensor.untyped_storage()._cdata == own else tensor

    def unpack(stored: Tensor | Kept) -> Tensor:
        return stored if isinstance(stored, Tensor) else stored()

    with saved_tensors_hooks(pack, unpack):
        yield
