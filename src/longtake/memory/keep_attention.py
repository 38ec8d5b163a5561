"""Keeping what self-attention gave: checkpointing computes a block again in backward, but not its attention kernel."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar, Token
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from longtake.errors import Problem, RunError
from longtake.memory.attention import attend, attend_backward, lowered
from longtake.memory.host_buffers import Keep, Kept

Contexts: TypeAlias = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]
"""Makes the contexts of one checkpointed call: in the forward pass, and when it is computed again."""


@contextmanager
def keep_attention(blocks: nn.ModuleList, self_attention: str, keep_for: Callable[[int], Keep]) -> Iterator[Contexts]:
    """Yields the `context_fn` that torch's non-reentrant checkpoint must be given around one block or several.

    Inside the context, attention called by the module `self_attention` of block i keeps its output
    [batch, heads, tokens, head_dim] and logsumexp by `keep_for(i)` and takes them back where the block is computed
    again. They belong to one checkpointed call, so forward and backward passes may come in any order; a second backward
    pass through one graph computes attention again. Calls that are not checkpointed, those without gradients among
    them, keep nothing. Gradients are the plain model's to the bit. Raises RunError where that module calls another
    kernel than torch's `scaled_dot_product_attention`, or one with a mask, dropout or a scale of its own.
    """
    attentions = [getattr(block, self_attention) for block in blocks]
    before = [vars(attention).get("forward") for attention in attentions]  # of ranks that share clips, if any
    for index, attention in enumerate(attentions):
        attention.forward = _intercepting(attention.forward, index, keep_for)
    try:
        yield _contexts
    finally:
        for attention, forward in zip(attentions, before, strict=True):
            del attention.forward
            if forward is not None:
                attention.forward = forward


class _Call:
    """What one checkpointed call keeps, by block: output and logsumexp."""

    def __init__(self) -> None:
        self.kept: dict[int, tuple[Kept, Kept]] = {}


_current: ContextVar[tuple[_Call, bool] | None] = ContextVar("checkpointed call, and whether it is computed again")


def _contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    call = _Call()
    return _Pass(call, again=False), _Pass(call, again=True)


class _Pass:
    """Says which call is computed; checkpointing enters it each time that it computes the call."""

    def __init__(self, call: _Call, again: bool) -> None:
        self.state = (call, again)
        self.outer: list[Token[tuple[_Call, bool] | None]] = []

    def __enter__(self) -> None:
        self.outer.append(_current.set(self.state))

    def __exit__(self, *_: object) -> None:
        _current.reset(self.outer.pop())


def _intercepting(forward: Callable[..., Any], index: int, keep_for: Callable[[int], Keep]) -> Callable[..., Any]:
    def run(*arguments: Any, **keywords: Any) -> Any:
        state = _current.get(None)
        if state is None:
            return forward(*arguments, **keywords)
        with _Interception(*state, index, keep_for(index)) as interception:
            result = forward(*arguments, **keywords)
        if interception.calls != 1:
            raise _unknown_attention("self-attention ran through another operator")
        return result

    return run


class _Interception(TorchFunctionMode):
    """Replaces `scaled_dot_product_attention` while one self-attention runs."""

    def __init__(self, call: _Call, again: bool, index: int, keep: Keep) -> None:
        super().__init__()
        self.call, self.again, self.index, self.keep = call, again, index, keep
        self.calls = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        return _KeptAttention.apply(self, *lowered(*_plain_operands(*args, **(kwargs or {}))))

    def computed(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Output and logsumexp, kept in the forward pass and taken back afterwards."""
        if self.again and (kept := self.call.kept.pop(self.index, None)):
            return kept[0]().detach(), kept[1]()
        out, logsumexp = attend(query, key, value)
        if not self.again:
            # Detached: the output itself gets the graph, which holds the call, which would hold the output.
            self.call.kept[self.index] = self.keep(out.detach()), self.keep(logsumexp)
        return out, logsumexp


class _KeptAttention(torch.autograd.Function):
    """Attention that saves the same five tensors, for checkpointing to compare, whether they are computed or kept."""

    @staticmethod
    def forward(ctx: Any, interception: _Interception, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out, logsumexp = interception.computed(query, key, value)
        ctx.save_for_backward(query, key, value, out, logsumexp)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, *attend_backward(gradient, *ctx.saved_tensors)


def _plain_operands(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operands of a `scaled_dot_product_attention` that is asked for nothing else."""
    if attn_mask is not None or dropout_p or is_causal or scale is not None or enable_gqa:
        raise _unknown_attention("self-attention is masked, scaled or drops out")
    return query, key, value


def _unknown_attention(what: str) -> RunError:
    remedy = 'use "block", or torch\'s attention: unset DIFFUSERS_ATTN_BACKEND'
    return RunError(
        Problem(
            f"{what}, whose output cannot be kept",
            "memory.gradient_checkpointing",
            remedy,
            code="memory-attention-unknown",
        )
    )
