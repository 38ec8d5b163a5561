"""Blocks in slices: all of a block but its self-attention is evaluated, and differentiated, over slices of the tokens.

A block is then its own checkpoint. What is as long as the clip is left out of autograd and freed at its last use.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from longtake.memory.attention import attend, attend_backward, autocast_as_now, lowered
from longtake.memory.host_buffers import Keep
from longtake.models.spec import BlockStages, Exchange, Shared


@contextmanager
def slices(
    blocks: nn.ModuleList,
    stages: BlockStages,
    count: int,
    head_groups: int,
    keep_for: Callable[[int], Keep],
    keep_attention: bool,
    exchange: Exchange | None = None,
) -> Iterator[None]:
    """Inside the context the blocks are evaluated in `count` slices, self-attention in `head_groups` groups of heads.

    Slices and groups differ by one where they do not come out even, and are at least one token, one head. Block i keeps
    its hidden state [batch, tokens, dim] by `keep_for(i)`, with `keep_attention` also attention's output and logsumexp,
    and computes all else again in backward: nothing else may checkpoint it, and each forward pass is differentiated at
    most once. Without gradients nothing is kept. Gradients of weights are sums over slices, in another order than the
    plain model's. A block must draw nothing at random: dropout would be drawn anew for every slice and every time. With
    an `exchange` the tokens are a rank's part of a clip's, and groups are of the heads that it has in attention.
    """
    cut = _Cut(stages, count, head_groups, keep_attention, exchange)
    for index, block in enumerate(blocks):
        block.forward = _forward(block, cut, keep_for, index)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


@dataclass(frozen=True)
class _Cut:
    """How blocks are cut, whether attention's output is kept, and how ranks exchange tokens for heads around it."""

    stages: BlockStages
    count: int
    head_groups: int
    keep_attention: bool
    exchange: Exchange | None

    def to_heads(self, rows: Tensor) -> Tensor:
        """Of all tokens, the heads that this rank has in attention: all of them where it has no others beside it."""
        return rows if self.exchange is None else self.exchange.to_heads(rows)

    def to_tokens(self, rows: Tensor) -> Tensor:
        """Back to all heads, of the tokens that this rank has."""
        return rows if self.exchange is None else self.exchange.to_tokens(rows)


def _forward(block: nn.Module, cut: _Cut, keep_for: Callable[[int], Keep], index: int) -> Callable[..., Tensor]:
    def run(hidden_states: Tensor, *shared: Any) -> Tensor:
        call = _Call(block, cut, shared)
        weights = [parameter for parameter in block.parameters() if parameter.requires_grad]
        inputs = [hidden_states, *(leaf for leaf in tree_leaves(shared) if _wants_gradient(leaf)), *weights]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
            return _SlicedBlock.apply(call, keep_for(index), len(weights), *inputs)
        with torch.no_grad(), autocast_as_now(hidden_states.device.type)():
            return call.output(hidden_states)[0]

    return run


class _SlicedBlock(torch.autograd.Function):
    """A block as one step of autograd; what it is trained by and what it shares are inputs, so that hooks see them."""

    @staticmethod
    def forward(ctx: Any, call: "_Call", keep: Keep, weights: int, hidden_states: Tensor, *inputs: Tensor) -> Tensor:
        ctx.call, ctx.autocast = call, autocast_as_now(hidden_states.device.type)
        ctx.weights = inputs[len(inputs) - weights :]
        kept = [keep(hidden_states.detach())]
        with ctx.autocast():
            output, attended, logsumexp = call.output(hidden_states)
        if call.cut.keep_attention:
            kept += [keep(attended), keep(logsumexp)]
        ctx.kept = kept
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        assert ctx.kept is not None, "a forward pass in slices can be differentiated once"
        (hidden_states, *attention), ctx.kept = (tensor() for tensor in ctx.kept), None  # the graph may live on
        found = _Gradients(ctx.call, hidden_states, ctx.weights, ctx.needs_input_grad[3])
        with ctx.autocast():
            found.through(gradient, attention)
        return None, None, None, found.of_hidden_states, *found.of_shared(), *found.of_weights


class _Call:
    """One call of a block. Its frozen weights are read where they are used: they may be streamed, and lie elsewhere."""

    def __init__(self, block: nn.Module, cut: _Cut, shared: Shared) -> None:
        self.block, self.cut, self.shared = block, cut, shared

    def output(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The block's output [batch, tokens, dim], attention's [batch, heads, tokens, head_dim], and its logsumexp."""
        attended, logsumexp = self.attended(*self.operands(hidden_states))
        output, of_own = torch.empty_like(hidden_states), self.cut.to_tokens(attended)
        for tokens in self.slices(hidden_states):
            shared = self.cut.stages.cut(self.shared, tokens)
            rows, attended_rows = hidden_states[:, tokens], of_own[:, :, tokens]
            output[:, tokens] = self.cut.stages.after(self.block, rows, attended_rows, shared)
        return output, attended, logsumexp

    def operands(self, hidden_states: Tensor) -> tuple[Tensor, ...]:
        """Query, key and value as attention takes them, laid out for its kernels: [batch, tokens, heads, head_dim]."""
        buffers: list[Tensor] = []
        for tokens in self.slices(hidden_states):
            parts = self.operands_of(hidden_states[:, tokens], self.cut.stages.cut(self.shared, tokens))
            if not buffers:
                buffers = [_for_all_tokens(part, hidden_states.shape[1]) for part in parts]
            for buffer, part in zip(buffers, parts, strict=True):
                buffer[:, :, tokens] = part
            del parts, part
        return _one_by_one(self.cut.to_heads, buffers)

    def operands_of(self, rows: Tensor, shared: Shared) -> tuple[Tensor, ...]:
        """Query, key and value of a slice, as attention is computed with them."""
        return lowered(*self.cut.stages.before(self.block, rows, shared))

    def attended(self, *operands: Tensor) -> tuple[Tensor, Tensor]:
        """Attention's output and logsumexp, by groups of heads."""
        groups = self.head_groups(operands[0])
        if len(groups) == 1:
            return attend(*operands)
        attended, logsumexps = torch.empty_like(operands[2]), []
        for heads in groups:
            attended[:, heads], logsumexp = attend(*(operand[:, heads] for operand in operands))
            logsumexps.append(logsumexp)
        return attended, torch.cat(logsumexps, dim=1)

    def slices(self, hidden_states: Tensor) -> list[slice]:
        """Slices of the token axis."""
        return _parts(hidden_states.shape[1], self.cut.count)

    def head_groups(self, attended: Tensor) -> list[slice]:
        """Slices of the axis of heads."""
        return _parts(attended.shape[1], self.cut.head_groups)


class _Gradients:
    """Gradients of one call's inputs; those of weights and of shared arguments, these in fp32, add up over slices."""

    def __init__(self, call: _Call, hidden_states: Tensor, weights: Sequence[Tensor], wanted: bool) -> None:
        """`wanted`: whether the hidden state's is."""
        self.call, self.hidden_states, self.weights = call, hidden_states, weights
        self.of_hidden_states = torch.empty_like(hidden_states) if wanted else None
        self.of_weights: list[Tensor | None] = [None] * len(weights)
        leaves, structure = tree_flatten(call.shared)
        self.places = [place for place, leaf in enumerate(leaves) if _wants_gradient(leaf)]
        for place in self.places:
            leaves[place] = torch.zeros_like(leaves[place], dtype=torch.float32)
        self.sums: Shared = tree_unflatten(leaves, structure)

    def through(self, gradient: Tensor, attention: list[Tensor]) -> None:
        """Fills everything from the gradient of the output; `attention`: output and logsumexp, where they were kept."""
        call, hidden_states = self.call, self.hidden_states
        operands = () if attention else call.operands(hidden_states)
        attended, logsumexp = attention or call.attended(*operands)
        attention.clear()
        of_own = call.cut.to_tokens(attended)
        of_attended = torch.empty_like(of_own)
        for tokens in call.slices(hidden_states):
            self._through_after(tokens, of_own, gradient, of_attended)
        del of_own
        of_attended = call.cut.to_heads(of_attended)
        operands = operands or call.operands(hidden_states)
        for heads in call.head_groups(attended):
            _through_attention(heads, of_attended, operands, attended, logsumexp)
        del attended, of_attended, logsumexp
        of_operands = [*operands]
        del operands
        gradients = _one_by_one(call.cut.to_tokens, of_operands)
        for tokens in call.slices(hidden_states):
            self._through_before(tokens, gradients)

    def of_shared(self) -> list[Tensor]:
        """Those of the shared arguments that want one, in order."""
        leaves = tree_leaves(self.call.shared)
        return [
            total.to(leaves[place].dtype) for place, total in zip(self.places, self._chosen(self.sums), strict=True)
        ]

    def _through_after(self, tokens: slice, attended: Tensor, gradient: Tensor, of_attended: Tensor) -> None:
        """What follows attention in one slice."""
        with torch.enable_grad():
            rows, shared = self._rows(tokens), self._shared(tokens)
            attended_rows = attended[:, :, tokens].detach().requires_grad_()
            output = self.call.cut.stages.after(self.call.block, rows, attended_rows, shared)
        found = self._found([output], [gradient[:, tokens]], [rows, attended_rows], (tokens, shared))
        of_attended[:, :, tokens] = found[1]
        if self.of_hidden_states is not None:
            self.of_hidden_states[:, tokens] = found[0]

    def _through_before(self, tokens: slice, gradients: Sequence[Tensor]) -> None:
        """What precedes attention in one slice."""
        with torch.enable_grad():
            rows, shared = self._rows(tokens), self._shared(tokens)
            operands = self.call.operands_of(rows, shared)
        given = [gradient[:, :, tokens] for gradient in gradients]
        (found,) = self._found(operands, given, [rows], (tokens, shared))
        if self.of_hidden_states is not None:
            self.of_hidden_states[:, tokens] += found

    def _rows(self, tokens: slice) -> Tensor:
        return self.hidden_states[:, tokens].detach().requires_grad_(self.of_hidden_states is not None)

    def _shared(self, tokens: slice) -> Shared:
        """The shared arguments of a slice, cut off from the graph that they come from."""
        leaves, structure = tree_flatten(self.call.cut.stages.cut(self.call.shared, tokens))
        for place in self.places:
            leaves[place] = leaves[place].detach().requires_grad_()
        return tree_unflatten(leaves, structure)

    def _chosen(self, shared: Shared) -> list[Tensor]:
        leaves = tree_leaves(shared)
        return [leaves[place] for place in self.places]

    def _found(
        self, outputs: Sequence[Tensor], gradients: list[Tensor], rows: list[Tensor], given: tuple[slice, Shared]
    ) -> list[Any]:
        """Gradients of `rows`, None for those that need none; adds those of weights and shared arguments up."""
        pairs = [pair for pair in zip(outputs, gradients, strict=True) if pair[0].requires_grad]
        if not pairs:  # the first block's hidden state needs no gradient, nor may its projections
            return [None] * len(rows)
        (outputs, gradients), (tokens, shared) = map(list, zip(*pairs, strict=True)), given
        wanted = [row for row in rows if row.requires_grad]
        inputs = [*wanted, *self._chosen(shared), *self.weights]
        found = iter(torch.autograd.grad(outputs, inputs, gradients, allow_unused=True))
        of_rows = [next(found) if row.requires_grad else None for row in rows]
        for shared_sum in self._chosen(self.call.cut.stages.cut(self.sums, tokens)):
            if (part := next(found)) is not None:
                shared_sum += part
        self.of_weights = [_sum(total, part) for total, part in zip(self.of_weights, found, strict=True)]
        return of_rows


def _one_by_one(change: Callable[[Tensor], Tensor], tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """What `change` makes of `tensors`, which are taken out of their list so that each is freed before the next."""
    changed = []
    while tensors:
        changed.append(change(tensors.pop(0)))
    return tuple(changed)


def _sum(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    """A new tensor: autograd may give one tensor out as the gradient of two."""
    return part if total is None else total if part is None else total + part


def _through_attention(
    heads: slice, gradient: Tensor, operands: tuple[Tensor, ...], attended: Tensor, logsumexp: Tensor
) -> None:
    """Replaces query, key and value of one group of heads, which no other group uses, by their gradients."""
    of_group, query, key, value, out = (tensor[:, heads] for tensor in (gradient, *operands, attended))
    found = attend_backward(of_group, query, key, value, out, logsumexp[:, heads].contiguous())
    for operand, part in zip(operands, found, strict=True):
        operand[:, heads] = part


def _for_all_tokens(part: Tensor, tokens: int) -> Tensor:
    """An empty [batch, heads, tokens, head_dim] like `part`, a slice of it."""
    batch, heads, _, head_dim = part.shape
    return part.new_empty(batch, tokens, heads, head_dim).transpose(1, 2)


def _parts(length: int, count: int) -> list[slice]:
    """An axis of `length` in `count` parts, fewer where it is shorter."""
    count = min(count, length)
    return [slice(length * part // count, length * (part + 1) // count) for part in range(count)]


def _wants_gradient(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad
