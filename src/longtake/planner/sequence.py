"""Sequence parallelism after Ulysses: each rank has a share of a clip's tokens, and in self-attention of its heads.

https://arxiv.org/abs/2309.14509, section 3.1; `distributed.sequence_parallel` is what is planned. Needs no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from longtake.models.spec import ModelSpec
from longtake.planner.events import Compute, Item, Work
from longtake.planner.plans import Bucket
from longtake.planner.rank_items import ADAPTERS, BLOCK, BUFFERS, Rank, ceil, part_of, rounded, sent

EXCHANGED = 4
"""Query, key and value before attention and its output after it; in backward the gradients of these."""
CONDITION_CHANNELS = 4
"""Of the mask that comes with an image condition, beside as many channels as latents have."""
_FP32 = 4
"""Bytes."""
_LIKE_VELOCITY = 3
"""Tensors of its size that a rank alone would have of its own tokens only, when most is there between forward and
backward: what has come from the ranks, put together, laid out as a video.
"""


def degrees(heads: int, gpus: int) -> tuple[int, ...]:
    """The degrees of sequence parallelism that are proposed: those that share out heads evenly, from 1 on."""
    return tuple(sp for sp in range(1, gpus + 1) if gpus % sp == 0 and heads % sp == 0)


def rank_shape(spec: ModelSpec, bucket: Bucket, sp: int) -> tuple[int, int, int, int]:
    """[channels, frames, height, width] of latents with as many tokens as a rank has of a clip, or a few more.

    No side is longer than the clip's own, and a clip of several latent frames keeps two, of which the first may be
    given. Of the shapes with the fewest tokens it is the one with the most frames, then rows.
    """
    channels, *sides = spec.latent_shape(*bucket)
    if sp == 1:
        return channels, sides[0], sides[1], sides[2]
    frames, rows, columns = (side // patch for side, patch in zip(sides, spec.patch_size, strict=True))
    needed = -(-frames * rows * columns // sp)
    _, few, low, narrow = min(
        (some * high * wide, -some, -high, wide)
        for some in range(min(2, frames), frames + 1)
        for high in range(1, rows + 1)
        if (wide := -(-needed // (some * high))) <= columns
    )
    patch = spec.patch_size
    return channels, -few * patch[0], -low * patch[1], narrow * patch[2]


class Unshared(NamedTuple):
    """What a rank has of whole clips, in fp32: bytes beyond those of a batch with its own tokens (`rank_shape`).

    `batch` is always there. In the forward pass so are the `noisy` latents and, if that is another tensor, what the
    model is `given`; this in the backward pass too, in the compute type, where the first layer is trained. `velocity`
    is what comes out.
    """

    batch: int = 0
    noisy: int = 0
    given: int = 0
    velocity: int = 0


_NOTHING = Unshared()


@dataclass(frozen=True)
class Exchange:
    """What `sp` ranks exchange around self-attention: of `clips` clips with `tokens` tokens on each rank.

    `context` are the tokens that cross-attention sees, `itemsize` the bytes of a value in the compute type. Where
    `heads` do not come out even the rank is one of those that have one more.
    """

    sp: int
    clips: int
    tokens: int
    heads: int
    head_dim: int
    context: int
    itemsize: int = 2
    unshared: Unshared = _NOTHING

    @property
    def unit(self) -> int:
        """Bytes of the query, the key, the value or the output, [clips, tokens, heads, head_dim]."""
        return self.clips * self.tokens * self.heads * self.head_dim * self.itemsize

    @property
    def own_heads(self) -> int:
        """Those that the rank has in attention."""
        return ceil(self.heads, self.sp)

    @property
    def own_unit(self) -> int:
        """Bytes of `unit` after an exchange, [clips, all tokens, own heads, head_dim]."""
        return self.clips * self.sp * self.tokens * self.own_heads * self.head_dim * self.itemsize

    @property
    def kept(self) -> int:
        """Bytes, beyond those recorded, of what autograd keeps of one self-attention.

        Its output is there in own heads for attention's backward pass, and in own tokens for that of the projection
        that follows. Of heads that do not come out even the rank has more than its share in all four tensors and in
        the softmax sums, one fp32 number a row and head.
        """
        sums = _FP32 * self.clips * self.tokens * (self.sp * self.own_heads - self.heads)
        return rounded(self.unit) + EXCHANGED * (rounded(self.own_unit) - rounded(self.unit)) + sums

    @property
    def own_flops(self) -> int:
        """Forward, of all tokens over all tokens in own heads: two products."""
        return 4 * self.clips * self.own_heads * (self.sp * self.tokens) ** 2 * self.head_dim

    def attention_flops(self, context: int) -> int:
        """Forward, of a rank's tokens over `context` tokens, all heads."""
        return 4 * self.clips * self.heads * self.tokens * context * self.head_dim


def exchange_of(spec: ModelSpec, bucket: Bucket, clips: int, sp: int, itemsize: int = 2) -> Exchange:
    """That of a micro-batch of `clips` clips of `bucket`."""
    shape = rank_shape(spec, bucket, sp)
    context = spec.text_tokens + spec.image_tokens
    unshared = _unshared(spec, spec.latent_shape(*bucket), shape, clips)
    return Exchange(sp, clips, _tokens(spec, shape), spec.heads, spec.head_dim, context, itemsize, unshared)


def exchanged(items: Iterable[Item], exchange: Exchange, rank: Rank) -> None:
    """Writes to `rank` the items of a step recorded with one rank's tokens (`rank_shape`), with their exchanges.

    The recording has self-attention of a rank's tokens over themselves in all heads. What runs is that of the clip's
    tokens, `sp` times as many, over themselves in heads / sp: sp^2 / sp = sp times the FLOPs. Query, key, value and
    output have as many bytes in either shape, and so have the kernel's workspaces, rows times heads being the same.
    Cross-attention stays as recorded: the rank's own tokens over the replicated text, in all heads.

    Nothing runs beside the exchanges, as attention needs what comes and the output projection what returns. Those of a
    stretch are listed before it. A backward pass exchanges again for what it recomputes, with attention's kept output
    too: query, key and value are in no checkpoint. What is sent and what has come is there twice for that moment only,
    when a block takes less than in its feed-forward layers and in its backward pass: not counted. What remains is.
    """
    items = [*items]
    attentions = {item.work: _attention(item.work, exchange) for item in items if isinstance(item, Compute)}
    outputs = _Outputs(items, attentions)
    turned = False
    for item in items:
        if not isinstance(item, Compute):
            rank.items.append(item)
            continue
        if item.label == "turn" and not turned:
            _exchange(rank, exchange.unshared.velocity * exchange.itemsize // _FP32, "velocity")
            turned = True
        attention, backward = attentions[item.work], part_of(item.label) == "backward"
        times = attention.backward + (attention.recomputed if backward else attention.own)
        _exchange(rank, EXCHANGED * times * sent(exchange.own_unit, exchange.sp), "all-to-all")
        held = [*item.held]
        held[BUFFERS] += outputs.alive(item) * exchange.kept
        held[BLOCK] += _of_whole_clips(item, exchange)
        rank.compute(attention.scaled(item.work, exchange), item.label, held)


class _Attention(NamedTuple):
    """How often a stretch evaluates self-attention, cross-attention, and takes self-attention backward."""

    own: int
    crossed: int
    backward: int

    @property
    def recomputed(self) -> int:
        """Self-attentions in a backward pass, those included of which the output was kept."""
        return max(self.own, self.crossed)

    def scaled(self, work: Work, exchange: Exchange) -> Work:
        """The work of a rank."""
        more = exchange.own_flops - exchange.attention_flops(exchange.tokens)
        return work._replace(
            attention_flops=work.attention_flops + self.own * more,
            attention_backward_flops=work.attention_backward_flops + self.backward * more * 5 // 2,
        )


class _Outputs:
    """Counts self-attentions that wait for their backward pass: of a block, or of all where none is recomputed."""

    def __init__(self, items: Iterable[Item], attentions: Mapping[Work, _Attention]) -> None:
        self.attentions = attentions
        self.waiting = 0
        self.recomputed: Counter[str] = Counter()
        for item in items:
            if isinstance(item, Compute) and part_of(item.label) == "backward":
                self.recomputed[item.label] += attentions[item.work].recomputed
        self.recomputes = self.recomputed.total() > 0

    def alive(self, item: Compute) -> int:
        """While `item`, the next one, is computed."""
        attention = self.attentions[item.work]
        if self.recomputes:
            return attention.own if part_of(item.label) == "forward" else self.recomputed[item.label]
        self.waiting += attention.own
        alive = self.waiting
        self.waiting -= attention.backward
        return alive


def _attention(work: Work, exchange: Exchange) -> _Attention:
    own, other = exchange.attention_flops(exchange.tokens), exchange.attention_flops(exchange.context)
    evaluated, crossed = _evaluations(work.attention_flops, own, other)
    backward, _ = _evaluations(work.attention_backward_flops, own * 5 // 2, other * 5 // 2)  # five products, not two
    return _Attention(evaluated, crossed, backward)


def _evaluations(flops: int, own: int, other: int) -> tuple[int, int]:
    """How often self- and cross-attention are in `flops`; of several answers the evenest, as a block has both once."""

    def answers() -> Iterator[tuple[int, int, int]]:
        for own_times in range(flops // own + 1):
            rest = flops - own_times * own
            if rest % other == 0:
                yield abs(own_times - rest // other), own_times, rest // other

    found = min(answers(), default=None)
    assert found is not None, "attention over other tokens than the clip's and the context's"
    return found[1], found[2]


def _exchange(rank: Rank, nbytes: int, label: str) -> None:
    """Sends so much, which what follows waits for."""
    if nbytes:
        rank.wait(rank.copy("network", nbytes, (rank.reached(),), label))


def _of_whole_clips(item: Compute, exchange: Exchange) -> int:
    """Bytes of `Unshared` in a part of the step; patches are embedded whole, and then cut."""
    whole, part = exchange.unshared, part_of(item.label)
    if part == "backward":
        trained = 0 if item.held[ADAPTERS] else whole.given * exchange.itemsize // _FP32
        return whole.batch + trained
    found = whole.batch + whole.noisy + whole.given
    if part == "prologue":
        return found + (exchange.sp - 1) * exchange.unit
    return found + (_LIKE_VELOCITY * whole.velocity if part == "turn" else 0)


def _unshared(spec: ModelSpec, whole: Sequence[int], own: Sequence[int], clips: int) -> Unshared:
    """Of clips of latents [channels, frames, height, width], of which the recording has `own`."""
    a_channel = _FP32 * clips * (prod(whole[1:]) - prod(own[1:]))
    channels = spec.latent_channels
    latents = channels * a_channel
    if spec.task in ("i2v", "flf2v"):  # the condition is concatenated
        condition = (channels + CONDITION_CHANNELS) * a_channel
        return Unshared(2 * latents + condition, latents, latents + condition, latents)
    if spec.task == "ti2v" and whole[1] > 1:  # the first frame is put in the place of the noisy one
        first = _FP32 * clips * channels * (prod(whole[2:]) - prod(own[2:]))
        return Unshared(2 * latents + first, latents, latents, latents)
    return Unshared(2 * latents, 0, latents, latents)


def _tokens(spec: ModelSpec, shape: Sequence[int]) -> int:
    return prod(side // patch for side, patch in zip(shape[1:], spec.patch_size, strict=True))
