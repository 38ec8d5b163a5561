"""What only a CUDA device can show; skipped without one."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import clips
from longtake.config.schema import (
    DataConfig,
    LoraConfig,
    MemoryStrategy,
    ModelConfig,
    OutputConfig,
    RunConfig,
    TrainingConfig,
    ValidationConfig,
)
from longtake.data.encode import prepare
from longtake.memory_gauge import MemoryGauge
from longtake.models.wan.variants import variant
from longtake.progress import Reporter
from longtake.training.metrics import FILE, read_metrics
from longtake.training.run import train

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


def test_the_driver_and_torch_agree_on_who_uses_the_device() -> None:
    gauge = MemoryGauge(CUDA)
    held = torch.zeros(2**28, dtype=torch.uint8, device=CUDA)
    memory = gauge.read()
    gauge.close()
    assert memory.device_bytes >= held.numel()
    assert memory.driver_bytes is not None
    assert "GiB" in gauge.device_line()


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("offload", ["none", "host", "disk"])
def test_a_lora_run_finishes_on_the_device_with_finite_losses(
    precision: str, offload: str, tmp_path: Path, tiny_root: Callable[[str], Path]
) -> None:
    (tmp_path / "data").mkdir()
    clips.write(tmp_path / "data" / "clip.mp4", clips.levels(30))
    (tmp_path / "data" / "clip.txt").write_text("A clip.")
    root = tiny_root("tiny-i2v")
    config = RunConfig(
        model=ModelConfig(path=str(root), dtype=precision),
        data=DataConfig(
            source=str(tmp_path / "data"), cache=str(tmp_path / "cache"), num_frames=9, size=(64, 32), validation=0.0
        ),
        lora=LoraConfig(rank=4, alpha=4.0),
        training=TrainingConfig(steps=3, warmup_steps=1, global_batch_size=1, precision=precision),
        memory=MemoryStrategy(activation_offload=offload),
        validation=ValidationConfig(every=3),
        output=OutputConfig(run=str(tmp_path / "run")),
    )
    prepare(config, variant("tiny-i2v").spec, root, CUDA, Reporter(quiet=True), (0, 1))
    run = train(config, resume=False, reporter=Reporter(quiet=True))
    losses = [line["loss"] for line in read_metrics(run / FILE) if "loss" in line]
    assert len(losses) == 3
    assert all(loss is not None for loss in losses)
