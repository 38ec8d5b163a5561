"""What people type, as they type it, on the tiny model."""

from collections.abc import Callable
from pathlib import Path

import pytest

from command_line import run, small_run, succeed, write_config
from longtake.config.load import load_config
from longtake.training.metrics import FILE, read_metrics
from runs import draw_clip

FLAGS = ["--training_strategy", "deepspeed_stage_3", "--use_gradient_checkpointing_offload", "--num_frames", "129"]


@pytest.mark.long
@pytest.mark.parametrize("gpus", [[], ["--gpus", "2"]], ids=["one process", "two ranks"])
def test_zero_3_with_offloaded_checkpointing_trains_on_129_frames(
    tiny_root: Callable[[str], Path], tmp_path: Path, gpus: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    clips = tmp_path / "clips"
    clips.mkdir()
    for index in range(2):
        draw_clip(clips / f"{index}.mp4", index, frames=130)
    table = small_run(tiny_root("tiny-i2v"), clips, tmp_path)
    config = write_config(tmp_path / "run.toml", table, {"training": {"global_batch_size": 2}})
    told = run("train", config, *FLAGS).errors
    assert "run `longtake prepare` with this config" in told[0]
    succeed("prepare", config, "--num_frames", "129")
    outcome = run("train", config, *FLAGS, *gpus)
    assert outcome.status == 0, capfd.readouterr().err
    steps = [line for line in read_metrics(tmp_path / "run" / FILE) if "loss" in line]
    assert [(line["step"], line["num_frames"]) for line in steps] == [(1, 129), (2, 129)]
    recorded = load_config(tmp_path / "run" / "config.toml")
    assert recorded.parallel.strategy == "deepspeed_stage_3"
    assert recorded.memory.activation_offload == "host"
    assert (tmp_path / "run" / "adapter.safetensors").is_file()
