"""Sequence parallelism: each rank has a part of a clip's tokens, and inside self-attention a part of the heads.

DeepSpeed-Ulysses (Jacobs et al. 2023, arXiv:2309.14509, section 3.1), with parts that need not be equal: they differ by
one token, or one head, where the number does not come out even, and nothing is padded. Text and image tokens are on
every rank. What a rank adds to a weight's gradient is that of its own tokens: gradients are to be summed over ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as processes
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from longtake.models.spec import ModelSpec


class SequenceParallel:
    """The part of this process among the `size` ranks of `group`, which have one clip; a model of `heads` heads."""

    def __init__(self, group: Any, size: int, rank: int, heads: int) -> None:
        self.group, self.size, self.rank, self.heads = group, size, rank, heads
        self.tokens = 0
        """Of the clip that was last begun with."""

    def own(self, tokens: int) -> slice:
        """This rank's part of all tokens."""
        return _part(tokens, self.size, self.rank)

    def counts(self) -> list[int]:
        """How many tokens each rank has."""
        return _counts(self.tokens, self.size)

    def to_heads(self, rows: Tensor) -> Tensor:
        """From [batch, heads, own tokens, head_dim] to [batch, own heads, tokens, head_dim]."""
        batch, heads, tokens, width = rows.shape
        shares, counts = _counts(heads, self.size), self.counts()
        assert tokens == counts[self.rank], "another clip's tokens"
        # [token, batch, a rank's heads, width] for each rank: what goes to one is one stretch
        sent = torch.cat([part.permute(2, 0, 1, 3).reshape(-1) for part in rows.split(shares, dim=1)])
        unit, own = batch * width, shares[self.rank]
        got = rows.new_empty(sum(counts), batch, own, width)
        self._exchange(got, sent, [count * own * unit for count in counts], [tokens * share * unit for share in shares])
        return got.permute(1, 2, 0, 3)

    def to_tokens(self, rows: Tensor) -> Tensor:
        """From [batch, own heads, tokens, head_dim] to [batch, heads, own tokens, head_dim]."""
        batch, own, _, width = rows.shape
        counts = self.counts()
        tokens, unit = counts[self.rank], batch * width
        shares = _counts(self.heads, self.size)
        sent = rows.permute(2, 0, 1, 3).reshape(-1)
        sizes = [tokens * share * unit for share in shares]
        got = rows.new_empty(sum(sizes))
        self._exchange(got, sent, sizes, [count * own * unit for count in counts])
        parts = (part.view(tokens, batch, -1, width) for part in got.split(sizes))
        return torch.cat([*parts], dim=2).permute(1, 2, 0, 3)

    def gathered(self, rows: Tensor) -> Tensor:
        """From [batch, own tokens, values] to [batch, tokens, values]."""
        counts = self.counts()
        padded = rows.new_zeros(max(counts), *rows.transpose(0, 1).shape[1:])
        padded[: counts[self.rank]] = rows.transpose(0, 1)
        parts = [torch.empty_like(padded) for _ in counts]
        processes.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]).transpose(0, 1)

    def _exchange(self, got: Tensor, sent: Tensor, got_sizes: list[int], sent_sizes: list[int]) -> None:
        processes.all_to_all_single(got.view(-1), sent, got_sizes, sent_sizes, group=self.group)

    def note(self, tokens: int) -> slice:
        """`own`, of a clip that begins."""
        self.tokens = tokens
        return self.own(tokens)


@contextmanager
def sequence_parallel(transformer: Any, spec: ModelSpec, sharing: SequenceParallel) -> Iterator[None]:
    """Inside the context `transformer` takes and gives whole clips, and computes with its rank's tokens in between.

    To be entered before checkpointing and kept attention, which then see attention as it is on this rank; blocks in
    slices make the exchange themselves (`memory.slices`).
    """
    axis = spec.token_axis()
    hooks = [
        getattr(transformer, name).register_forward_hook(_cutting(cut, sharing)) for name, cut in axis.entries().items()
    ]
    gathering = lambda _module, _inputs, output: _Gathered.apply(output, sharing)  # noqa: E731
    hooks.append(getattr(transformer, axis.leaving()).register_forward_hook(gathering))
    attentions = [getattr(block, spec.self_attention) for block in getattr(transformer, spec.blocks)]
    for attention in attentions:
        attention.forward = _exchanging(attention.forward, sharing)
    try:
        yield
    finally:
        for attention in attentions:
            del attention.forward
        for hook in hooks:
            hook.remove()


def _part(tokens: int, count: int, index: int) -> slice:
    return slice(tokens * index // count, tokens * (index + 1) // count)


def _counts(total: int, count: int) -> list[int]:
    parts = (_part(total, count, index) for index in range(count))
    return [part.stop - part.start for part in parts]


def _cutting(cut: Callable[[Any, Callable[[int], slice]], Any], sharing: SequenceParallel) -> Callable[..., Any]:
    return lambda _module, _inputs, output: cut(output, sharing.note)


def _exchanging(forward: Callable[..., Any], sharing: SequenceParallel) -> Callable[..., Any]:
    def run(*arguments: Any, **keywords: Any) -> Any:
        with _Exchanging(sharing):
            return forward(*arguments, **keywords)

    return run


class _Exchanging(TorchFunctionMode):
    """Puts the exchange around `scaled_dot_product_attention`, whoever replaces that call in turn."""

    def __init__(self, sharing: SequenceParallel) -> None:
        super().__init__()
        self.sharing = sharing

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        given = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
        for name in ("query", "key", "value"):
            given[name] = _Exchanged.apply(given[name], self.sharing.to_heads, self.sharing.to_tokens)
        return _Exchanged.apply(func(**given), self.sharing.to_tokens, self.sharing.to_heads)


class _Exchanged(torch.autograd.Function):
    """An exchange, and the one that takes gradients back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.back = back
        return there(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(gradient), None, None


class _Gathered(torch.autograd.Function):
    """All ranks have the same gradient of the whole clip: each takes its own part."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sharing: SequenceParallel) -> Tensor:
        ctx.own = sharing.own(sharing.tokens)
        return sharing.gathered(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient[:, ctx.own].contiguous(), None
