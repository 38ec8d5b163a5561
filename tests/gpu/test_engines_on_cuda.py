"""Engines on CUDA and NCCL: the adapter of one GPU's run, from each engine on one GPU, and on two where there are."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from command_line import run, small_run, succeed, write_config
from runs import draw_clip

pytestmark = pytest.mark.gpu
ENGINES = ("ddp", "fsdp2", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3")


@pytest.fixture
def config(tiny_root: Callable[[str], Path], tmp_path: Path) -> Path:
    """Of a prepared run of two clips in fp32."""
    clips = tmp_path / "clips"
    clips.mkdir()
    for index in range(2):
        draw_clip(clips / f"{index}.mp4", index)
    table = small_run(tiny_root("tiny-i2v"), clips, tmp_path)
    path = write_config(tmp_path / "run.toml", table, {"training": {"global_batch_size": 2, "steps": 4}})
    succeed("prepare", path)
    return path


def trained(config: Path, name: str, *arguments: str) -> dict[str, torch.Tensor]:
    """The adapter of a run of its own."""
    folder = config.parent / name
    outcome = run("train", config, "--set", f"output.run={folder}", "--use_gradient_checkpointing", *arguments)
    assert outcome.status == 0
    return load_file(folder / "adapter.safetensors")


def assert_near(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(float((tensor - other[name]).abs().max()) <= 1e-4 for name, tensor in one.items())


@pytest.mark.parametrize("strategy", ENGINES)
def test_an_engine_on_one_gpu_trains_what_one_gpu_trains(config: Path, strategy: str) -> None:
    assert_near(trained(config, "engine", "--training_strategy", strategy), trained(config, "single"))


@pytest.mark.parametrize(
    ("strategy", "sp"), [*((engine, 1) for engine in ENGINES), ("ddp", 2), ("fsdp2", 2), ("deepspeed_stage_3", 2)]
)
def test_an_engine_on_two_gpus_trains_what_one_gpu_trains(config: Path, strategy: str, sp: int) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    flags = ("--training_strategy", strategy, "--set", f"parallel.sp={sp}", "--gpus", "2")
    assert_near(trained(config, "engine", *flags), trained(config, "single"))
