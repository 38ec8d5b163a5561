"""Gradient checkpointing: each block keeps its input alone and is computed again in backward."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

TakenOver = Callable[[torch.Tensor], AbstractContextManager[None]]
"""Given a block's hidden state [batch, tokens, dim], a context in which autograd's saving of it is taken over."""


@contextmanager
def gradient_checkpointing(
    transformer: Any, blocks: nn.ModuleList, taken_over: TakenOver | None, moved: int
) -> Iterator[None]:
    """Checkpoints every block of a diffusers `transformer`; the inputs of the first `moved` are kept by `taken_over`.

    The first blocks' inputs wait longest for their backward pass, so they are the ones that are worth moving.
    Recomputation replays the random state, so dropout inside a block is drawn the same.
    """
    early = {id(block) for block in blocks[:moved]}

    def run(block: nn.Module, hidden_states: torch.Tensor, *arguments: Any) -> Any:
        keep = taken_over(hidden_states) if taken_over and id(block) in early else nullcontext()
        with keep:
            return checkpoint(block, hidden_states, *arguments, use_reentrant=False)

    transformer.enable_gradient_checkpointing(run)
    try:
        yield
    finally:
        transformer.disable_gradient_checkpointing()
