"""Three ranks, of which first two and then all share clips: the exchange between them, and steps of tiny models.

The first rank prints a line of JSON for each thing that was tried, with what was found.
"""

import json
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as processes
from torch import Tensor

from longtake.config.schema import LoraConfig, MemoryStrategy
from longtake.distributed.ranks import joined
from longtake.distributed.sequence_parallel import SequenceParallel, sequence_parallel
from longtake.memory.strategy import Among, apply
from longtake.models.spec import ModelSpec
from longtake.models.wan.conditioning import Conditioning
from longtake.models.wan.variants import variant
from longtake.training.batch import Batch, summed_loss
from tiny_steps import Gradients, farthest, gradients_of, load

LATENTS = (5, 2, 14)
"""35 tokens, which neither two ranks nor three share evenly, as little as the 5 heads."""
STRATEGIES: dict[str, dict[str, Any]] = {
    "plain": {"gradient_checkpointing": "none"},
    "checkpointed": {},
    "attention kept on the host": {"gradient_checkpointing": "block_keep_attention", "activation_offload": "host"},
    "slices and groups of heads": {"slices": 4, "attention_head_groups": 2},
    "slices, attention kept": {"slices": 3, "gradient_checkpointing": "block_keep_attention"},
}
Said = Iterator[dict[str, Any]]


def main() -> None:
    """Tries everything; the arguments are the folders of the models, of which three ranks share the last one alone."""
    folders = [*map(Path, sys.argv[1:])]
    with joined() as ranks:
        for size in (2, 3):
            group = processes.new_group([*range(size)])
            sharing = SequenceParallel(group, size, ranks.rank, heads=5)
            if ranks.rank < size:
                for said in (*exchanges(sharing), *models(sharing, folders if size == 2 else folders[-1:])):
                    if ranks.is_first:
                        print(json.dumps({"ranks": size, **said}), flush=True)


def exchanges(sharing: SequenceParallel) -> Said:
    """Whether every rank gets its heads of all tokens, gives them back, and gathers all rows."""
    for heads, tokens in ((5, 45), (5, 46), (3, 4), (4, 35)):
        own = SequenceParallel(sharing.group, sharing.size, sharing.rank, heads)
        clip = torch.randn(2, heads, tokens, 6, generator=torch.Generator().manual_seed(tokens))
        part = own.note(tokens)
        mine = slice(heads * own.rank // own.size, heads * (own.rank + 1) // own.size)
        same = torch.tensor(
            [
                torch.equal(own.to_heads(clip[:, :, part]), clip[:, mine]),
                torch.equal(own.to_tokens(clip[:, mine]), clip[:, :, part]),
                torch.equal(own.gathered(clip[:, 0, part]), clip[:, 0]),
            ],
            dtype=torch.uint8,
        )
        processes.all_reduce(same, processes.ReduceOp.MIN, own.group)
        yield {"tried": f"{heads} heads, {tokens} tokens", "same": same.tolist()}


def models(sharing: SequenceParallel, folders: list[Path]) -> Said:
    """How far a step of shared clips is from one of whole clips, relative to loss and gradients."""
    for folder, lora in product(folders, (True, False)):
        model, spec = load(folder, folder.name, LoraConfig(rank=2) if lora else None), variant(folder.name).spec
        plain = step(model, spec)
        for label, memory in STRATEGIES.items():
            with TemporaryDirectory() as scratch, sequence_parallel(model, spec, sharing):
                among, strategy = Among(sharing), MemoryStrategy(**memory)
                with apply(model, spec, strategy, Path(scratch), among=among):
                    loss, gradients = step(model, spec)
                    quiet = quiet_loss(model, spec)
            for gradient in gradients.values():
                processes.all_reduce(gradient, group=sharing.group)
            yield {
                "tried": f"{folder.name}, {'LoRA' if lora else 'full'}, {label}",
                "loss": max(relative(found, plain[0]) for found in (loss, quiet)),
                "gradient": farthest(by_layer(gradients), by_layer(plain[1])),
            }
        left = step(model, spec)
        same = torch.equal(left[0], plain[0]) and all(torch.equal(left[1][key], plain[1][key]) for key in plain[1])
        yield {"tried": f"{folder.name}, {'LoRA' if lora else 'full'}, left again", "same": same}


def step(model: Any, spec: ModelSpec) -> tuple[Tensor, Gradients]:
    """Loss of two clips and its gradients, copied."""
    loss = summed_loss(model, spec, batch(spec))
    gradients = gradients_of(model, loss.backward)
    return loss.detach(), {name: gradient.clone() for name, gradient in gradients.items()}


def quiet_loss(model: Any, spec: ModelSpec) -> Tensor:
    """As validation computes it."""
    with torch.no_grad():
        return summed_loss(model, spec, batch(spec))


def batch(spec: ModelSpec) -> Batch:
    """Two made-up clips, the same at every call on every rank."""
    generator = torch.Generator().manual_seed(5)
    made = lambda *shape: torch.randn(2, *shape, generator=generator)  # noqa: E731
    latents, noise = made(spec.latent_channels, *LATENTS), made(spec.latent_channels, *LATENTS)
    conditioning = Conditioning(
        prompt_embeds=made(spec.text_tokens, spec.text_dim),
        image_embeds=made(spec.image_tokens, spec.image_dim) if spec.image_tokens else None,
        condition=made(20, *LATENTS) if spec.task in ("i2v", "flf2v") else None,
        first_latents=latents[:, :, :1] if spec.task == "ti2v" else None,
    )
    return Batch(latents, noise, torch.tensor([0.3, 0.8]), torch.ones(2), conditioning)


def by_layer(gradients: Gradients) -> Gradients:
    """A layer's weight and bias in a row: a key's bias alone moves all scores of a query alike, and its gradient is a
    sum that cancels but for rounding."""
    layers: dict[str, list[Tensor]] = {}
    for name, gradient in gradients.items():
        layers.setdefault(name.rpartition(".")[0], []).append(gradient.flatten())
    return {name: torch.cat(parts) for name, parts in layers.items()}


def relative(found: Tensor, expected: Tensor) -> float:
    """Their difference."""
    return float(((found - expected) / expected).abs())


if __name__ == "__main__":
    main()
