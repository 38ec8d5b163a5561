"""What people take away from a run: the adapter in each format, or the trained transformer, made of a checkpoint.

A checkpoint is whole, whichever ranks and engine wrote it, so that none of them shows in what is made of it.
"""

import re
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from longtake.config.schema import RunConfig
from longtake.lora import save_adapter
from longtake.models.wan.weights import Loading, ModelFiles, load_transformer, save_transformer
from longtake.training.checkpoint import Checkpoint
from longtake.training.model import choose_expert
from longtake.training.tensor_files import TensorFiles

ADAPTER = "adapter.safetensors"
CPU = torch.device("cpu")


def write_outputs(config: RunConfig, run: Path, checkpoint: Checkpoint, model_files: ModelFiles) -> None:
    """The adapter in each format that is asked for, or the transformer; of the average, if there is one."""
    trained = checkpoint.of("ema" if config.training.ema else "trained")
    if config.lora is None:
        _write_transformer(config, model_files, trained, run / "transformer")
        return
    state = adapter_of(trained)
    described = adapter_metadata(config, model_files)
    save_adapter(run / ADAPTER, state, config.lora.alpha, "comfyui", described)
    for form in config.output.formats:
        if form != "comfyui":
            save_adapter(run / f"adapter-{form}.safetensors", state, config.lora.alpha, form, described)


def adapter_of(trained: TensorFiles) -> dict[str, Tensor]:
    """An adapter's weights by the names of its layers, without peft's name of the adapter."""
    return {re.sub(r"(lora_[AB])\.[^.]+\.weight$", r"\1.weight", name): trained.whole(name) for name in trained.names()}


def adapter_metadata(config: RunConfig, model_files: ModelFiles) -> dict[str, str]:
    """What an adapter's file says of how it was made."""
    return {
        "longtake.version": version("longtake"),
        "longtake.model": model_files.variant.name,
        "longtake.expert": config.model.expert,
        "longtake.num_frames": str(config.data.num_frames),
        "longtake.steps": str(config.training.steps),
    }


def _write_transformer(config: RunConfig, model_files: ModelFiles, trained: TensorFiles, folder: Path) -> None:
    component, _ = choose_expert(config, model_files.variant.spec)
    transformer = load_transformer(model_files, component, torch.float32, CPU, Loading(lambda _name: None))
    transformer.load_state_dict({name: trained.whole(name) for name in trained.names()}, assign=True)
    save_transformer(transformer, folder, "diffusers")
