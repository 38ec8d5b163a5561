"""What one takes from a run for other programs: its adapters in each format, or full weights with them in."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from longtake.config.schema import LoraFormat, RunConfig
from longtake.errors import ConfigError, Problem
from longtake.files import write_file, write_folder
from longtake.lora import Adapter, check_shapes, merged, reduced, save_adapter
from longtake.models.tensor_writing import LazyTensor, write_shards, write_tensors
from longtake.models.wan.keys import to_original
from longtake.models.wan.weights import Loading, ModelFiles, load_transformer, save_transformer, weight_files
from longtake.models.weight_files import WeightFile, read_weights
from longtake.progress import Reporter
from longtake.training.card import Card, write_card_beside
from longtake.training.model import Expert, choose_experts, find_model
from longtake.training.outputs import adapter_metadata, of_expert, trained_folder
from longtake.training.precision import DTYPES
from longtake.training.results import read_run, run_adapter

CPU = torch.device("cpu")
Change: TypeAlias = "Callable[[str, Tensor], Tensor]"
"""What becomes of a parameter, by its name."""


@dataclass(frozen=True)
class ExportWish:
    """What the user asks of an export; `rank` and `max_shard_bytes` are None where nothing is said of them."""

    form: LoraFormat
    out: Path
    merged: bool = False
    rank: int | None = None
    max_shard_bytes: int | None = None


@dataclass(frozen=True)
class _Source:
    """A run with what is exported of it."""

    run: Path
    config: RunConfig
    model_files: ModelFiles
    experts: Sequence[Expert]
    reporter: Reporter


def export(run: Path, wish: ExportWish, reporter: Reporter) -> list[Path]:
    """Writes the adapter; or, with `merged` or after full fine-tuning, the full weights in the format's layout.

    One for each trained expert, and a model card beside them unless another README is there. Gives what was written.
    Raises ConfigError for a wish that cannot be.
    """
    config = read_run(run)
    if problems := [*_refused(config, wish)]:
        raise ConfigError(problems)
    model_files = find_model(config, reporter.line)
    source = _Source(run, config, model_files, choose_experts(config, model_files.variant.spec), reporter)
    whole = wish.merged or config.lora is None
    written = [(_weights if whole else _adapter)(source, expert, wish) for expert in source.experts]
    names = tuple(path.name for path in written)
    card = Card(config, model_files.variant, names, whole, form=wish.form, rank=wish.rank)
    write_card_beside(written[0].parent, card, reporter.line)
    return written


def _refused(config: RunConfig, wish: ExportWish) -> Iterator[Problem]:
    whole = wish.merged or config.lora is None
    if whole and wish.form == "kohya":
        yield Problem(
            "kohya's format is for adapters",
            "--format",
            "use comfyui or diffusers for full weights",
            code="export-kohya-whole",
        )
    if wish.max_shard_bytes is not None and not whole:
        yield Problem(
            "an adapter is one file",
            "--max-shard-size",
            "leave it out, or add --merge",
            code="export-shards-of-adapter",
        )
    if wish.max_shard_bytes == 0:
        yield Problem(
            "a file of no bytes holds nothing",
            "--max-shard-size",
            "give more, for example 5GB",
            code="export-shard-empty",
        )
    if wish.rank is None:
        return
    if config.lora is None:
        yield Problem(
            "the run trained all weights, there is no adapter", "--rank", "leave it out", code="export-rank-of-whole"
        )
    elif wish.rank < 1:
        yield Problem("a rank is at least 1", "--rank", "give more", code="export-rank-too-low")


def _adapter(source: _Source, expert: Expert, wish: ExportWish) -> Path:
    """The expert's adapter in a file."""
    out = of_expert(wish.out, expert, source.experts)
    metadata = adapter_metadata(source.config, source.model_files, expert)
    save_adapter(out, replace(_chosen(source, expert, wish), metadata=metadata), wish.form)
    return out


def _chosen(source: _Source, expert: Expert, wish: ExportWish) -> Adapter:
    """The expert's adapter, of the wanted rank."""
    spec = source.model_files.variant.spec
    adapter = run_adapter(source.run, source.config, spec, expert, source.reporter)
    if wish.rank is None:
        return adapter
    if wish.rank >= adapter.rank:
        what = f"the adapter's rank is {adapter.rank} already"
        raise ConfigError(
            Problem(what, "--rank", f"give less than {adapter.rank}, or leave it out", code="export-rank-too-high")
        )
    found = reduced(adapter, wish.rank)
    source.reporter.line(
        f"rank {adapter.rank} to {wish.rank}: relative error {found.error:.2%} of the update,"
        f" at worst {found.errors[found.worst]:.2%} in {found.worst}"
    )
    return found.adapter


def _weights(source: _Source, expert: Expert, wish: ExportWish) -> Path:
    """The expert's full weights in the type that the run computed them from: diffusers' folder, or original names."""
    out, files = of_expert(wish.out, expert, source.experts), source.model_files
    change: Change = _unchanged
    if source.config.lora is None:
        folder = trained_folder(source.run, expert, source.experts)
        if not folder.is_dir():
            raise ConfigError(
                Problem("the run is not finished", str(source.run), "continue it with --resume", code="run-unfinished")
            )
        files = replace(files, transformers={expert.component: folder})
    else:
        change = _merging(_chosen(source, expert, wish), files)
    dtype = DTYPES[source.config.model.dtype]
    if wish.form == "diffusers":
        transformer = load_transformer(files, expert.component, dtype, CPU, Loading(convert=change))
        save_transformer(transformer, out, "diffusers", wish.max_shard_bytes)
        return out
    tensors = _original(files, expert, dtype, change)
    if wish.max_shard_bytes is None:
        write_file(out, lambda staged: write_tensors(staged, tensors))
    elif out.exists():
        raise ConfigError(
            Problem(
                "is there already", str(out), "give a new folder for weights in several files", code="export-exists"
            )
        )
    else:
        most = wish.max_shard_bytes
        write_folder(out, lambda staged: write_shards(staged, tensors, most))
    return out


def _merging(adapter: Adapter, files: ModelFiles) -> Change:
    """What merges `adapter` into a parameter by its name; raises ModelError where it does not fit."""
    shapes = files.variant.parameter_shapes()
    check_shapes(adapter.state, {module: shapes.get(f"{module}.weight") for module in adapter.modules})
    weights = {f"{module}.weight": module for module in adapter.modules}
    return lambda name, tensor: merged(tensor, adapter, weights[name]) if name in weights else tensor


def _unchanged(_name: str, tensor: Tensor) -> Tensor:
    return tensor


def _original(files: ModelFiles, expert: Expert, dtype: torch.dtype, change: Change) -> dict[str, LazyTensor]:
    """Every weight under its original name, read from its file and changed when it is written."""
    empty = load_transformer(files, expert.component, dtype, CPU, Loading(lambda _name: None))
    places = weight_files(files, expert.component)
    return {
        to_original(name): LazyTensor(tuple(like.shape), like.dtype, partial(_read, name, places[name], like, change))
        for name, like in empty.state_dict().items()
    }


def _read(name: str, place: WeightFile, like: Tensor, change: Change) -> Tensor:
    return read_weights({name: place}, lambda _name: torch.empty_like(like, device=CPU), change)[name]
