"""The model that a run trains: loaded, adapted or not, with its share of sigma."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from longtake.config.schema import MemoryStrategy, RunConfig
from longtake.config.sharing import SHARDED
from longtake.distributed.engines import shared_out
from longtake.distributed.ranks import ALONE, Ranks
from longtake.errors import ConfigError, Problem
from longtake.lora import attach, begin_from
from longtake.memory.block_swap import swapped_blocks
from longtake.memory.flattened import inner_tensors, rebuilt
from longtake.memory.quantization import QuantizedWeight, quantizable, quantize
from longtake.models.spec import ModelSpec
from longtake.models.wan import tiny
from longtake.models.wan.weights import Loading, ModelFiles, load_transformer, locate, weight_files
from longtake.models.weight_files import WeightFile, read_weights
from longtake.training.optimizer import trained_parameters
from longtake.training.precision import DTYPES

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Expert:
    """A transformer of a model, by its component's name, and the share of (0, 1) of sigma that it is for.

    `noise` says which of two it is, "high" or "low"; it is empty where there is one.
    """

    component: str
    sigma_range: tuple[float, float]
    noise: str = ""


@dataclass(frozen=True)
class TrainedModel:
    """`transformer`, which is that of `expert`, with its trained `parameters`.

    `weight_files` has, by their names in `transformer`, those frozen parameters that lie in a file just as they are.
    """

    transformer: Any
    expert: Expert
    spec: ModelSpec
    parameters: dict[str, nn.Parameter]
    weight_files: dict[str, WeightFile] = field(default_factory=dict)


def find_model(config: RunConfig, say: Callable[[str], None]) -> ModelFiles:
    """Where the config's model lies, fetched if need be; raises ModelError where it cannot be found or told."""
    return locate(config.model, tiny.bundled, say)


def choose_experts(config: RunConfig, spec: ModelSpec) -> tuple[Expert, ...]:
    """The transformers that the config trains; raises ConfigError where `model.expert` does not fit the model."""
    wanted = config.model.expert
    if len(spec.experts) == 1:
        if wanted != "both":
            remedy = 'leave it out, or "both"'
            raise ConfigError(
                Problem(
                    f"{spec.name} has one transformer, not a {wanted}-noise one",
                    "model.expert",
                    remedy,
                    code="model-without-experts",
                )
            )
        return (Expert(spec.experts[0], (0.0, 1.0)),)
    assert spec.boundary_ratio is not None
    high, low = spec.experts
    both = Expert(high, (spec.boundary_ratio, 1.0), "high"), Expert(low, (0.0, spec.boundary_ratio), "low")
    if wanted == "both":
        return both
    if config.validation.samples:
        what = "samples need both transformers, the run trains one"
        remedy = 'leave them out and use `longtake sample` afterwards, or set model.expert = "both"'
        raise ConfigError(Problem(what, "validation.samples", remedy, code="sample-of-one-expert"))
    return tuple(expert for expert in both if expert.noise == wanted)


def build_models(
    config: RunConfig, model_files: ModelFiles, device: torch.device, ranks: Ranks = ALONE
) -> tuple[TrainedModel, ...]:
    """`build_model` for each transformer that is trained."""
    experts = choose_experts(config, model_files.variant.spec)
    return tuple(build_model(config, model_files, device, ranks, index) for index in range(len(experts)))


def build_model(
    config: RunConfig, model_files: ModelFiles, device: torch.device, ranks: Ranks = ALONE, index: int = 0
) -> TrainedModel:
    """Loads the one numbered `index` of the transformers that are trained, and makes trainable what the config trains.

    That is fp32 adapters, or all weights in fp32.

    Under adapters the weights are quantised as they are read, and those of swapped blocks are put where
    `config.memory` wants them: in host memory, or left in their file and on `meta`. So are those of all blocks where
    transformers take turns on the device. Where an engine shares out weights, each rank gets its part of them and no
    more.
    """
    spec = model_files.variant.spec
    experts = choose_experts(config, spec)
    component = experts[index].component
    dtype = DTYPES[config.model.dtype] if config.lora else torch.float32
    files = weight_files(model_files, component)
    sharded = config.parallel.strategy in SHARDED
    if sharded:
        transformer = load_transformer(model_files, component, dtype, device, Loading(lambda _name: None))
        transformer.requires_grad_(True)
        if config.lora:
            attach(transformer, config.lora, config.training.seed, device, files)
    elif config.lora:
        memory = _all_away(config.memory, spec, files) if len(experts) > 1 else config.memory
        chosen = _loading(memory, spec, files, dtype, device)
        transformer = load_transformer(model_files, component, dtype, device, chosen)
        attach(transformer, config.lora, config.training.seed, device, files)
    else:
        transformer = load_transformer(model_files, component, dtype, device)
        transformer.requires_grad_(True)
    transformer.train()
    place = (index, len(experts))
    if config.lora and (told := begin_from(transformer, config.lora, place, files, spec)) and ranks.is_first:
        _LOG.warning(told)
    shared_out(
        transformer,
        getattr(transformer, spec.blocks),
        config.parallel,
        ranks,
        device,
        lambda wanted: _read(wanted, files),
    )
    there = {
        name: files[_file_name(name)]
        for name, parameter in transformer.named_parameters()
        if not sharded and not parameter.requires_grad and _lies_there(parameter, files.get(_file_name(name)))
    }
    return TrainedModel(transformer, experts[index], spec, trained_parameters(transformer), there)


def _all_away(memory: MemoryStrategy, spec: ModelSpec, files: Mapping[str, WeightFile]) -> MemoryStrategy:
    """`memory` with every block swapped."""
    blocks = {name.split(".")[1] for name in files if name.startswith(f"{spec.blocks}.")}
    return memory.model_copy(update={"block_swap": len(blocks)})


def _loading(
    memory: MemoryStrategy, spec: ModelSpec, files: dict[str, WeightFile], dtype: torch.dtype, device: torch.device
) -> Loading:
    blocks = {name.split(".")[1] for name in files if name.startswith(f"{spec.blocks}.")}
    swapped = {str(index) for index in swapped_blocks(len(blocks), memory.block_swap)} if memory.block_swap else set()
    kind, host = memory.quantization, torch.device("cpu")

    def away(name: str) -> bool:
        return name.startswith(f"{spec.blocks}.") and name.split(".")[1] in swapped

    def place(name: str) -> torch.device | None:
        if not away(name) or kind != "none":  # the device quantises fast; `convert` takes the result to the host
            return device
        final = torch.float32 if any(part in spec.keep_fp32 for part in name.split(".")) else dtype
        return None if memory.block_swap_from == "disk" and files[name].holds(final) else host

    def convert(name: str, tensor: Tensor) -> Tensor:
        weight = quantize(tensor, kind) if kind != "none" and quantizable(name, tensor, spec) else tensor
        if not away(name):
            return weight
        return rebuilt(weight, [inner.to(host) for inner in inner_tensors(weight)])

    return Loading(place, convert)


def _read(wanted: Mapping[str, tuple[int, Tensor]], files: dict[str, WeightFile]) -> None:
    """Fills stretches of parameters from the bytes of their files."""

    def stretch(name: str) -> WeightFile:
        first, values = wanted[name]
        return files[_file_name(name)].part(first, values.numel())

    read_weights({name: stretch(name) for name in wanted}, lambda name: wanted[name][1], lambda _name, values: values)


def _file_name(name: str) -> str:
    """A parameter's name before peft wrapped its layer."""
    return name.replace(".base_layer.", ".")


def _lies_there(parameter: Tensor, file: WeightFile | None) -> bool:
    return file is not None and file.holds(parameter.dtype) and not isinstance(parameter, QuantizedWeight)
