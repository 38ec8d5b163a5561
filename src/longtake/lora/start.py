"""Going on from the LoRA in a file: a run's fresh adapter takes it over, and computes what it does."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from longtake.config.schema import LoraConfig
from longtake.errors import ConfigError, ModelError, Problem
from longtake.lora.adapter import MAGNITUDE, Adapter
from longtake.lora.dora import NO_FILES, frozen_weight
from longtake.lora.files import read_adapter
from longtake.lora.layers import NAME, adapted_layers
from longtake.lora.merging import check_shapes, shortened
from longtake.lora.origin import other_model
from longtake.models.spec import ModelSpec
from longtake.models.weight_files import WeightFile

WHERE = "lora.start_from"


def begin_from(
    transformer: nn.Module,
    lora: LoraConfig,
    place: tuple[int, int] = (0, 1),
    files: Mapping[str, WeightFile] = NO_FILES,
    spec: ModelSpec | None = None,
) -> str:
    """Fills the adapter that `attach` has put on `transformer` from `lora.start_from`, and says what was done.

    `place` is which of how many trained experts the transformer is. Each layer then adds what the file's does: the
    quotient of the scales is multiplied into B, in double precision and rounded once; where the file's rank is lower,
    the further rows of A stay as drawn and the columns of B are zero. Layers that the file lacks start fresh. Of a
    plain LoRA a DoRA takes the lengths that its rows have, with weights on `meta` read from `files`. `spec` is the
    model, to be compared with the one that the file names. Raises ConfigError where the file has more than `lora`
    trains, ModelError where it, or one of those after it, is not there, cannot be read or is of another model.
    """
    if not lora.start_from:
        return ""
    index, count = place
    if len(lora.start_from) != count:
        what = f"{len(lora.start_from)} files for {count} trained transformer{'s' if count > 1 else ''}"
        remedy = "give one for each, the high-noise expert's first"
        raise ConfigError(Problem(what, WHERE, remedy, code="lora-start-count-differs"))
    paths = [Path(name) for name in lora.start_from[index:]]
    if missing := [f"{WHERE}: {path}" for path in paths if not path.is_file()]:
        raise ModelError([Problem("there is no such file", where, code="lora-file-missing") for where in missing])
    path = paths[0]
    adapter, layers = read_adapter(path), dict(adapted_layers(transformer))
    other = ("low", "high")[index] if count == 2 else ""
    if other and adapter.metadata.get("longtake.expert") == other:
        what = f"{path.name} is of the {other}-noise expert"
        raise ConfigError(Problem(what, WHERE, "give the high-noise expert's first", code="lora-of-other-expert"))
    of_another = other_model(adapter, path, spec) if spec is not None else ""
    shapes = {name: tuple(layer.get_base_layer().weight.shape) for name, layer in layers.items()}
    _check(adapter, layers, lora, path)
    check_shapes(adapter.state, shapes)
    for name in adapter.modules:
        _fill(name, layers[name], adapter, files)
    return "; ".join(filter(None, (_told(adapter, layers, path), of_another)))


def _check(adapter: Adapter, layers: Mapping[str, LoraLayer], lora: LoraConfig, path: Path) -> None:
    if outside := [name for name in adapter.modules if name not in layers]:
        what = f"{len(outside)} of {len(adapter.modules)} layers of {path.name} are not trained, {_first(outside)}"
        remedy = "add them to lora.targets, or start from another file"
        raise ConfigError(Problem(what, WHERE, remedy, code="lora-layers-untrained"))
    if adapter.is_dora and not lora.dora:
        raise ConfigError(Problem(f"{path.name} is a DoRA", WHERE, "set lora.dora = true", code="lora-is-dora"))
    if problems := [*_too_high(adapter, layers, lora)]:
        raise ConfigError(shortened(problems))


def _too_high(adapter: Adapter, layers: Mapping[str, LoraLayer], lora: LoraConfig) -> Iterator[Problem]:
    own = {block for first, last, _ in lora.block_ranks for block in range(first, last + 1)}
    whole = f"set lora.rank = {adapter.rank}"
    for name, rank in adapter.ranks.items():
        if rank > layers[name].r[NAME]:
            what = f"{name} has rank {rank} in the file and {layers[name].r[NAME]} in the config"
            block = int(name.split(".")[1])
            remedy = f"give block {block} rank {rank} in lora.block_ranks" if block in own else whole
            yield Problem(what, WHERE, f"{remedy}, or lower it: `longtake export --rank`", code="lora-rank-too-high")


@torch.no_grad()
def _fill(name: str, layer: LoraLayer, adapter: Adapter, files: Mapping[str, WeightFile]) -> None:
    down, up = (adapter.state[f"{name}.{half}.weight"] for half in ("lora_A", "lora_B"))
    scaling, own = layer.scaling[NAME], adapter.scales[name]
    rank = down.shape[0]
    scaled = up if own == scaling else (up.double() * (own / scaling)).float()
    a, b = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
    a[:rank] = down.to(a.device)
    b.zero_()
    b[:, :rank] = scaled.to(b.device)
    if NAME not in layer.lora_magnitude_vector:
        return
    magnitude = layer.lora_magnitude_vector[NAME]
    lengths = adapter.state.get(f"{name}.{MAGNITUDE}.weight")
    if lengths is None:
        weight = frozen_weight(name, layer, files)
        lengths = magnitude.norms(a.to(weight.device), b.to(weight.device), scaling, weight)
    magnitude.weight.copy_(lengths)


def _told(adapter: Adapter, layers: Mapping[str, LoraLayer], path: Path) -> str:
    fresh = len(layers) - len(adapter.modules)
    padded = sum(rank < layers[name].r[NAME] for name, rank in adapter.ranks.items())
    ranks = sorted(set(adapter.ranks.values()))
    held = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    parts = [f"starting from {path.name}: {len(adapter.modules)} layers of {held}"]
    parts += [f"{padded} of them padded to the config's rank"] if padded else []
    parts += [f"{fresh} that it lacks start fresh"] if fresh else []
    return ", ".join(parts)


def _first(names: Sequence[str]) -> str:
    return f"first {names[0]}"
