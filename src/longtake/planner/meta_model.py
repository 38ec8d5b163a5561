"""The model that a run trains, on `meta` tensors: all of its blocks, or a few that stand for all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from longtake.config.schema import LoraConfig, Precision, TrainingConfig
from longtake.lora import attach
from longtake.models.spec import ModelSpec
from longtake.models.wan.conditioning import Conditioning
from longtake.models.wan.variants import KEEP_FP32, WanVariant
from longtake.planner.operators import DeviceType
from longtake.planner.plans import Bucket
from longtake.planner.sequence import rank_shape
from longtake.training.batch import Batch
from longtake.training.optimizer import trained_parameters
from longtake.training.precision import DTYPES

META = torch.device("meta")


@dataclass(frozen=True)
class Subject:
    """What is trained, and on what kind of device: everything about a run that no memory strategy changes.

    Without `lora` all weights are trained, in fp32; `dtype` is that of frozen weights. `experts` is how many
    transformers are.
    """

    variant: WanVariant
    lora: LoraConfig | None
    training: TrainingConfig
    dtype: Precision = "bf16"
    device_type: DeviceType = "cuda"
    experts: int = 1

    @property
    def spec(self) -> ModelSpec:
        """The model's."""
        return self.variant.spec

    @property
    def blocks(self) -> int:
        """Of the whole model."""
        return int(self.variant.transformer_config["num_layers"])


@dataclass(frozen=True)
class MetaModel:
    """The transformer with `blocks` of its blocks, and what of it is trained."""

    subject: Subject
    transformer: Any
    parameters: dict[str, nn.Parameter]
    blocks: int

    @property
    def spec(self) -> ModelSpec:
        """The whole model's."""
        return self.subject.spec

    @property
    def trained_kind(self) -> str:
        """What trained parameters count as."""
        return "adapters" if self.subject.lora else "weights"


def build(subject: Subject, blocks: int | None = None) -> MetaModel:
    """As `training.model.build_model` would have it on a device; with the first `blocks` of the blocks, or all.

    Adapters whose rank differs between blocks have the mean rank in each, so that few blocks can stand for all.
    """
    count = subject.blocks if blocks is None else blocks
    with META:
        transformer = WanTransformer3DModel(**subject.variant.transformer_config | {"num_layers": count})
    for name, parameter in transformer.named_parameters():
        parameter.data = parameter.data.to(_dtype_of(name, subject))
    if subject.lora is not None:
        attach(transformer, _alike(subject.lora, subject.blocks), subject.training.seed)
    else:
        transformer.requires_grad_(True)
    transformer.train()
    return MetaModel(subject, transformer, trained_parameters(transformer), count)


def meta_batch(spec: ModelSpec, bucket: Bucket, clips: int = 1, sp: int = 1) -> Batch:
    """A micro-batch without values, in the types of `training.batch.collate`.

    With `sp` it has about as many tokens as one of so many ranks has of each clip, never fewer.
    """
    shape = rank_shape(spec, bucket, sp)

    def empty(*sides: int) -> Tensor:
        return torch.empty(clips, *sides, device=META)

    conditioning = Conditioning(
        prompt_embeds=empty(spec.text_tokens, spec.text_dim),
        image_embeds=empty(spec.image_tokens, spec.image_dim) if spec.image_tokens else None,
        condition=empty(shape[0] + 4, *shape[1:]) if spec.task in ("i2v", "flf2v") else None,
        first_latents=empty(shape[0], 1, *shape[2:]) if spec.task == "ti2v" and shape[1] > 1 else None,
    )
    return Batch(empty(*shape), empty(*shape), empty(), empty(), conditioning)


def batch_tensors(batch: Batch) -> Iterator[Tensor]:
    """All that a batch holds."""
    given = (batch.latents, batch.noise, batch.sigma, batch.weights, *vars(batch.conditioning).values())
    yield from (value for value in given if isinstance(value, Tensor))


@contextmanager
def as_it_was(transformer: nn.Module) -> Iterator[None]:
    """Puts the module's parameters back at the end, whatever was put in their place: quantised ones, flat ones."""
    kept = [(module, dict(module._parameters)) for module in transformer.modules()]
    try:
        yield
    finally:
        for module, parameters in kept:
            module._parameters.update(parameters)


def _alike(lora: LoraConfig, blocks: int) -> LoraConfig:
    """`lora` with one rank for all of `blocks` blocks: the mean, rounded up."""
    own = sum((last + 1 - first) * (rank - lora.rank) for first, last, rank in lora.block_ranks)
    return lora.model_copy(update={"rank": lora.rank + -(-own // blocks), "block_ranks": ()})


def _dtype_of(name: str, subject: Subject) -> torch.dtype:
    kept = any(part in KEEP_FP32 for part in name.split("."))
    return torch.float32 if kept or subject.lora is None else DTYPES[subject.dtype]
