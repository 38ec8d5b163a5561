"""What people take away from a run: the adapter in each format, or the trained transformer, made of a checkpoint.

A checkpoint is whole, whichever ranks and engine wrote it, so that none of them shows in what is made of it.
"""

import re
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from longtake.config.schema import LoraFormat, RunConfig
from longtake.lora import save_adapter, trained_adapter
from longtake.models.wan.weights import Loading, ModelFiles, load_transformer, save_transformer
from longtake.training.card import Card, write_card
from longtake.training.checkpoint import Checkpoint
from longtake.training.experts import prefix_of
from longtake.training.model import Expert, choose_experts
from longtake.training.sampled import run_samples
from longtake.training.tensor_files import TensorFiles

ADAPTER = "adapter.safetensors"
CPU = torch.device("cpu")


def write_outputs(
    config: RunConfig, run: Path, checkpoint: Checkpoint, model_files: ModelFiles, say: Callable[[str], None]
) -> None:
    """The adapter in each format that is asked for, or the transformer; of the average, if there is one.

    One of each for each expert that the run trains; and a model card beside them.
    """
    experts = choose_experts(config, model_files.variant.spec)
    names = []
    for expert in experts:
        trained = checkpoint.of("ema" if config.training.ema else "trained", prefix_of(expert))
        if config.lora is None:
            folder = trained_folder(run, expert, experts)
            _write_transformer(expert, model_files, trained, folder)
            names.append(folder.name)
            continue
        adapter = trained_adapter(adapter_of(trained), config.lora, adapter_metadata(config, model_files, expert))
        whole = of_expert(run / ADAPTER, expert, experts)
        save_adapter(whole, adapter, "comfyui")
        names.append(whole.name)
        for form in config.output.formats:
            if form != "comfyui":
                save_adapter(whole.with_stem(f"{whole.stem}-{form}"), adapter, form)
    full = config.lora is None
    layout: LoraFormat = "diffusers" if full else "comfyui"
    write_card(run, Card(config, model_files.variant, tuple(names), full, run_samples(run, say), layout))


def of_expert(path: Path, expert: Expert, experts: Sequence[Expert]) -> Path:
    """`path`, of several experts with `-high-noise` or `-low-noise` before its suffix."""
    return path if len(experts) == 1 else path.with_stem(f"{path.stem}-{expert.noise}-noise")


def results_of(run: Path) -> list[Path]:
    """The adapters that a finished run has left, or the transformers."""
    adapters = [run / ADAPTER, *sorted(run.glob(f"{Path(ADAPTER).stem}-*-noise.safetensors"))]
    folders = [run / "transformer", run / "transformer_2"]
    return [path for path in adapters if path.is_file()] or [path for path in folders if path.is_dir()]


def trained_folder(run: Path, expert: Expert, experts: Sequence[Expert]) -> Path:
    """Where full fine-tuning leaves a transformer: under its component's name where both are trained."""
    return run / ("transformer" if len(experts) == 1 else expert.component)


def adapter_of(trained: TensorFiles) -> dict[str, Tensor]:
    """An adapter's weights by the names of its layers, without peft's name of the adapter."""
    own = re.compile(r"(lora_A|lora_B|lora_magnitude_vector)\.[^.]+\.weight$")
    return {own.sub(r"\1.weight", name): trained.whole(name) for name in trained.names()}


def adapter_metadata(config: RunConfig, model_files: ModelFiles, expert: Expert) -> dict[str, str]:
    """What an adapter's file says of how it was made."""
    return {
        "longtake.version": version("longtake"),
        "longtake.model": model_files.variant.name,
        "longtake.expert": expert.noise or "both",
        "longtake.num_frames": str(config.data.num_frames),
        "longtake.steps": str(config.training.steps),
    }


def _write_transformer(expert: Expert, model_files: ModelFiles, trained: TensorFiles, folder: Path) -> None:
    transformer = load_transformer(model_files, expert.component, torch.float32, CPU, Loading(lambda _name: None))
    transformer.load_state_dict({name: trained.whole(name) for name in trained.names()}, assign=True)
    save_transformer(transformer, folder, "diffusers")
