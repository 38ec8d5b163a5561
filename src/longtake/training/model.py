"""The model that a run trains: loaded, adapted or not, with its share of sigma."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from longtake.config.schema import RunConfig
from longtake.errors import ConfigError, Problem
from longtake.lora import attach
from longtake.models.spec import ModelSpec
from longtake.models.wan import tiny
from longtake.models.wan.weights import ModelFiles, load_transformer, locate
from longtake.training.optimizer import trained_parameters
from longtake.training.precision import DTYPES


@dataclass(frozen=True)
class TrainedModel:
    """`transformer` with its trained `parameters`; `sigma_range` is the share of (0, 1) that it is trained on."""

    transformer: Any
    component: str
    spec: ModelSpec
    parameters: dict[str, nn.Parameter]
    sigma_range: tuple[float, float]


def find_model(config: RunConfig, say: Callable[[str], None]) -> ModelFiles:
    """Where the config's model lies, fetched if need be; raises ModelError where it cannot be found or told."""
    return locate(config.model, tiny.bundled, say)


def choose_expert(config: RunConfig, spec: ModelSpec) -> tuple[str, tuple[float, float]]:
    """(component to train, its range of sigma); raises ConfigError where `model.expert` does not fit the model."""
    expert = config.model.expert
    if len(spec.experts) == 1:
        if expert != "both":
            remedy = 'leave it out, or "both"'
            raise ConfigError(
                Problem(f"{spec.name} has one transformer, not a {expert}-noise one", "model.expert", remedy)
            )
        return spec.experts[0], (0.0, 1.0)
    assert spec.boundary_ratio is not None
    if expert == "both":
        what = f"{spec.name} has two transformers and this version trains one at a time"
        raise ConfigError(Problem(what, "model.expert", 'set it to "high", and then in a second run to "low"'))
    if config.validation.samples:
        what = "samples need both transformers, a run trains one"
        raise ConfigError(Problem(what, "validation.samples", "leave them out and use `longtake sample` afterwards"))
    high = expert == "high"
    return spec.experts[0 if high else 1], (spec.boundary_ratio, 1.0) if high else (0.0, spec.boundary_ratio)


def build_model(config: RunConfig, model_files: ModelFiles, device: torch.device) -> TrainedModel:
    """Loads the transformer and makes trainable what the config trains: fp32 adapters, or all weights in fp32."""
    spec = model_files.variant.spec
    component, sigma_range = choose_expert(config, spec)
    dtype = DTYPES[config.model.dtype] if config.lora else torch.float32
    transformer = load_transformer(model_files, component, dtype, device)
    if config.lora:
        attach(transformer, config.lora, config.training.seed)
    else:
        transformer.requires_grad_(True)
    transformer.train()
    return TrainedModel(transformer, component, spec, trained_parameters(transformer), sigma_range)
