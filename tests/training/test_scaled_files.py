"""Runs on ComfyUI's files: encoded from its components, trained on its fp8 transformer with scales."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from longtake.config.schema import ModelConfig, RunConfig
from longtake.data.encode import prepare
from longtake.memory.strategy import apply
from longtake.models.wan.keys import to_diffusers
from longtake.models.wan.tiny import bundled
from longtake.models.wan.weights import load_transformer, locate
from longtake.progress import Reporter
from longtake.sampling import SampleRequest, sample
from longtake.training.metrics import FILE, read_metrics
from longtake.training.model import TrainedModel, build_model, find_model
from longtake.training.run import train
from releases import unscaled, write_comfyui, write_release
from runs import Scene

CPU = torch.device("cpu")
PREFIX = "model.diffusion_model."


@pytest.fixture(scope="module")
def file(scenes: Callable[[str], Scene], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_comfyui(tmp_path_factory.mktemp("ComfyUI") / "models", scenes("tiny-i2v").root, PREFIX)


def config_of(scene: Scene, run: Path, path: Path, **sections: Any) -> RunConfig:
    return scene.config(run, **{"model": {"path": str(path), "dtype": "fp32"}, **sections})


def dequantised(file: Path) -> dict[str, Tensor]:
    return {to_diffusers(name.removeprefix(PREFIX)): value for name, value in unscaled(load_file(file)).items()}


def frozen(model: TrainedModel) -> dict[str, Tensor]:
    named = model.transformer.named_parameters()
    return {name.replace(".base_layer.", "."): value for name, value in named if not value.requires_grad}


@pytest.mark.parametrize("memory", [{}, {"block_swap": 4}, {"block_swap": 3, "block_swap_from": "disk"}])
def test_a_scaled_transformer_computes_the_same_wherever_its_blocks_wait(
    scenes: Callable[[str], Scene], tmp_path: Path, file: Path, memory: dict[str, Any]
) -> None:
    """From the disk, what the file has as it is stays there; products of values and scales are in memory."""
    config, values = config_of(scenes("tiny-i2v"), tmp_path / "run", file, memory=memory), dequantised(file)
    model = build_model(config, find_model(config, print), CPU)
    held = frozen(model)
    assert held.keys() == values.keys()
    left = {name for name, parameter in held.items() if parameter.is_meta}
    assert all(torch.equal(parameter, values[name]) for name, parameter in held.items() if name not in left)
    matrices = {f"{name.rpartition('.')[0]}.weight" for name in values if name.endswith("ffn.net.2.weight")}
    assert bool(left) == ("block_swap_from" in memory)
    assert not left & matrices
    files = {name.replace(".base_layer.", ".") for name in model.weight_files}
    assert left <= files
    assert not files & matrices
    (tmp_path / "scratch").mkdir()
    with apply(model.transformer, model.spec, config.memory, tmp_path / "scratch", model.weight_files):
        pass
    for name, parameter in frozen(model).items():
        assert parameter.is_meta == (name in left)
        assert parameter.is_meta or torch.equal(parameter, values[name]), name


@pytest.mark.parametrize("form", ["comfyui", "release"])
def test_prepare_and_train_on_the_files_that_users_have(
    scenes: Callable[[str], Scene], tmp_path: Path, form: str
) -> None:
    scene, folder = scenes("tiny-i2v"), tmp_path / "models"
    path = write_comfyui(folder, scene.root) if form == "comfyui" else write_release(folder, scene.root)
    config = config_of(scene, tmp_path / "run", path, data={"cache": str(tmp_path / "cache")})
    root = find_model(config, print).root
    assert root == folder
    prepare(config, scene.spec, root, CPU, Reporter(quiet=True), (0, 1))
    run = train(config, False, Reporter(quiet=True))
    steps = [line for line in read_metrics(run / FILE) if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2]
    assert all(line["loss"] > 0 for line in steps)


def test_a_sample_from_comfyuis_files(file: Path) -> None:
    """Every encoder of the request, and the VAE's decoder."""
    found = locate(ModelConfig(path=str(file)), bundled, print)
    assert found.root is not None
    image = torch.full((3, 32, 32), 90, dtype=torch.uint8)
    request = SampleRequest(
        prompt="a rabbit",
        size=(32, 32),
        num_frames=5,
        steps=2,
        guidance_scale=1.0,
        shift=3.0,
        seed=0,
        negative_prompt="",
        image=image,
        last_image=None,
    )
    transformer = load_transformer(found, "transformer", torch.float32, CPU)
    frames = sample(found.root, found.variant.spec, {"transformer": transformer}, request, CPU)
    assert frames.shape == (5, 3, 32, 32)
