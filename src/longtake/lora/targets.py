"""Which layers of a transformer get an adapter, and of what rank."""

from collections.abc import Iterator, Sequence

from torch import nn

from longtake.config.schema import LoraConfig
from longtake.errors import ConfigError, Problem
from longtake.models.wan.keys import to_original

GROUPS = {
    "attention": tuple(f"attn{i}.{leaf}" for i in (1, 2) for leaf in ("to_q", "to_k", "to_v", "to_out.0")),
    "ffn": ("ffn.net.0.proj", "ffn.net.2"),
    "image": ("attn2.add_k_proj", "attn2.add_v_proj"),
}
"""What the words in [lora].targets stand for, as suffixes of module names."""


def target_ranks(transformer: nn.Module, lora: LoraConfig) -> dict[str, int]:
    """Rank of each linear layer of the blocks that `lora` adapts, by the layer's name, in the transformer's order.

    Raises ConfigError for each target that matches no layer and for each range of blocks that are not there.
    """
    linear = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    adaptable = [name for name in linear if name.startswith("blocks.")]
    blocks = 1 + max((_block(name) for name in adaptable), default=-1)
    if problems := [*_unmatched(adaptable, lora.targets), *_beyond(blocks, lora)]:
        raise ConfigError(problems)
    own = {block: rank for first, last, rank in lora.block_ranks for block in range(first, last + 1)}
    chosen = [name for name in adaptable if any(_matches(name, target) for target in lora.targets)]
    return {name: own.get(_block(name), lora.rank) for name in chosen}


def _unmatched(adaptable: Sequence[str], targets: Sequence[str]) -> Iterator[Problem]:
    missing = [target for target in targets if not any(_matches(name, target) for name in adaptable)]
    groups = [group for group in GROUPS if any(_matches(name, group) for name in adaptable)]
    suffixes = dict.fromkeys(name.split(".", 2)[2] for name in adaptable)
    remedy = f"choose among the groups {', '.join(groups)} and the suffixes {', '.join(suffixes)}"
    for target in missing:
        yield Problem(f"{target!r} matches no layer", "lora.targets", remedy, code="lora-target-unmatched")


def _beyond(blocks: int, lora: LoraConfig) -> Iterator[Problem]:
    for first, last, _ in lora.block_ranks:
        if last >= blocks:
            what = f"there is no block {max(first, blocks)}"
            yield Problem(what, "lora.block_ranks", f"the model's are 0 to {blocks - 1}", code="lora-block-missing")


def _matches(name: str, target: str) -> bool:
    suffixes = GROUPS.get(target, (target,))
    spellings = (name, to_original(name))
    return any(f".{spelling}".endswith(f".{suffix}") for spelling in spellings for suffix in suffixes)


def _block(name: str) -> int:
    return int(name.split(".")[1])
