"""Sequence parallelism after Ulysses: each rank has a share of a clip's tokens, and in self-attention of its heads.

https://arxiv.org/abs/2309.14509, section 3.1. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from longtake.models.spec import ModelSpec
from longtake.planner.events import Compute, Item, Work
from longtake.planner.plans import Bucket
from longtake.planner.rank_items import BUFFERS, Rank, rounded, sent

EXCHANGED = 4
"""Query, key and value before attention and its output after it; in backward the gradients of these."""


def degrees(heads: int, gpus: int) -> tuple[int, ...]:
    """The degrees of sequence parallelism that share out whole heads among ranks, from 1 on."""
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


@dataclass(frozen=True)
class Exchange:
    """What `sp` ranks exchange around self-attention: of `clips` clips with `tokens` tokens on each rank.

    `context` are the tokens that cross-attention sees, `itemsize` the bytes of a value in the compute type.
    """

    sp: int
    clips: int
    tokens: int
    heads: int
    head_dim: int
    context: int
    itemsize: int = 2

    @property
    def unit(self) -> int:
        """Bytes of the query, the key, the value or the output, [clips, tokens, heads, head_dim]."""
        return self.clips * self.tokens * self.heads * self.head_dim * self.itemsize

    def attention_flops(self, context: int) -> int:
        """Forward, of a rank's tokens over `context` tokens, all heads: two products."""
        return 4 * self.clips * self.heads * self.tokens * context * self.head_dim


def exchange_of(spec: ModelSpec, bucket: Bucket, clips: int, sp: int, itemsize: int = 2) -> Exchange:
    """That of a micro-batch of `clips` clips of `bucket`."""
    _, *sides = rank_shape(spec, bucket, sp)
    frames, rows, columns = (side // patch for side, patch in zip(sides, spec.patch_size, strict=True))
    context = spec.text_tokens + spec.image_tokens
    return Exchange(sp, clips, frames * rows * columns, spec.heads, spec.head_dim, context, itemsize)


def exchanged(items: Iterable[Item], exchange: Exchange, rank: Rank) -> None:
    """Writes to `rank` the items of a step recorded with one rank's tokens (`rank_shape`), with their exchanges.

    The recording has self-attention of a rank's tokens over themselves in all heads. What runs is that of the clip's
    tokens, `sp` times as many, over themselves in heads / sp: sp^2 / sp = sp times the FLOPs. Query, key, value and
    output have as many bytes in either shape, and so have the kernel's workspaces, rows times heads being the same.
    Cross-attention stays as recorded: the rank's own tokens over the replicated text, in all heads.

    Nothing runs beside the exchanges, as attention needs what comes and the output projection what returns. Those of a
    stretch are listed before it. A backward pass exchanges again for what it recomputes, with attention's kept output
    too: query, key and value are in no checkpoint. While the last of three tensors is sent, the others have come and
    all are still there: four buffers, which are counted for the whole stretch though its peak may be elsewhere.
    """
    scaled: dict[tuple[bool, Work], tuple[Work, int]] = {}
    for item in items:
        if not isinstance(item, Compute):
            rank.items.append(item)
            continue
        key = item.label.startswith("backward"), item.work
        if key not in scaled:
            scaled[key] = _scaled(item.work, exchange, key[0])
        work, times = scaled[key]
        if not times:
            rank.items.append(item)
            continue
        nbytes = EXCHANGED * times * sent(exchange.unit, exchange.sp)
        rank.wait(rank.copy("network", nbytes, (rank.reached(),), "all-to-all"))
        held = [*item.held]
        held[BUFFERS] += EXCHANGED * rounded(exchange.unit)
        rank.compute(work, item.label, held)


def _scaled(work: Work, exchange: Exchange, backward: bool) -> tuple[Work, int]:
    """The work of a rank, and how many times it exchanges."""
    own, other = exchange.attention_flops(exchange.tokens), exchange.attention_flops(exchange.context)
    forward, crossed = _evaluations(work.attention_flops, own, other)
    back, _ = _evaluations(work.attention_backward_flops, own * 5 // 2, other * 5 // 2)  # five products, not two
    more = exchange.sp - 1
    replaced = work._replace(
        attention_flops=work.attention_flops + more * forward * own,
        attention_backward_flops=work.attention_backward_flops + more * back * own * 5 // 2,
    )
    return replaced, back + (max(forward, crossed) if backward else forward)


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
