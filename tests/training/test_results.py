"""What one takes from a run: adapters in each format, merged weights, videos; and what is said where it cannot be."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from longtake.data.video import probe
from longtake.errors import ConfigError, ModelError, RunError
from longtake.lora import Adapter, read_adapter, save_adapter
from longtake.models.wan.variants import variant
from longtake.progress import Reporter
from longtake.training.checkpoint import checkpoint_path
from longtake.training.model import choose_experts
from longtake.training.results import Wish, adapters_of, model_of, read_run, run_adapter, sample_to_file
from runs import Recorder, Scene, Stopper
from saved import read

Scenes = Callable[[str], Scene]
LAYER = "blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def finished(scenes: Scenes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose average differs from its weights, to be read only."""
    scene = scenes("tiny-i2v")
    training = {"ema": 0.5, "learning_rate": 0.01}
    return scene.train(scene.config(tmp_path_factory.mktemp("runs") / "finished", training=training))


def wish(**changes: Any) -> Wish:
    """A short sample of five frames."""
    values: dict[str, Any] = {"prompt": "clip 0", "negative_prompt": "", "image": None, "last_image": None}
    values |= {"num_frames": None, "size": "", "steps": 2, "guidance_scale": 1.0, "seed": 0}
    return Wish(**(values | changes))


def adapter_of_run(run: Path, reporter: Reporter) -> Adapter:
    """Of a run of tiny-i2v."""
    spec = variant("tiny-i2v").spec
    config = read_run(run)
    return run_adapter(run, config, spec, choose_experts(config, spec)[0], reporter)


def test_a_run_that_was_stopped_gives_the_average_of_its_last_checkpoint(scenes: Scenes, tmp_path: Path) -> None:
    scene = scenes("tiny-i2v")
    config = scene.config(tmp_path / "run", training={"ema": 0.5, "steps": 4})
    with pytest.raises(RunError, match="after step 2"):
        scene.train(config, reporter=Stopper(2))
    said = Recorder()
    adapter = adapter_of_run(tmp_path / "run", said)
    checkpoint = read(checkpoint_path(tmp_path / "run", 2))
    assert torch.equal(adapter.state[f"{LAYER}.lora_B.weight"], checkpoint.ema[f"{LAYER}.lora_B.default.weight"])
    assert said.lines == ["the run is not finished: using the checkpoint after step 2"]


def test_a_run_that_goes_on_is_not_mistaken_for_finished(scenes: Scenes, tmp_path: Path) -> None:
    scene = scenes("tiny-i2v")
    run = scene.train(scene.config(tmp_path / "run"))
    with pytest.raises(RunError, match="after step 3"):
        scene.train(scene.config(run, training={"steps": 9}), resume=True, reporter=Stopper(3))
    adapter = adapter_of_run(run, Recorder())
    trained = read(checkpoint_path(run, 3)).trained
    assert torch.equal(adapter.state[f"{LAYER}.lora_B.weight"], trained[f"{LAYER}.lora_B.default.weight"])


def test_a_sample_of_a_run_is_a_sample_of_its_adapter(finished: Path, tmp_path: Path) -> None:
    image = tmp_path / "first.png"
    Image.new("RGB", (64, 64), (30, 90, 200)).save(image)
    asked = wish(image=image)
    videos = [tmp_path / name for name in ("run.mp4", "lora.mp4", "base.mp4")]
    sample_to_file(finished, None, [], asked, videos[0], Recorder())
    model = str(read_run(finished).model.path)
    explicit = wish(image=image, size="32x32", num_frames=5)
    sample_to_file(None, model_of(model), [finished / "adapter.safetensors"], explicit, videos[1], Recorder())
    sample_to_file(None, model_of(model), [], explicit, videos[2], Recorder())
    content = [video.read_bytes() for video in videos]
    assert content[0] == content[1]
    assert content[0] != content[2]
    assert probe(videos[0], "sample").duration == pytest.approx(5 / 16)


@pytest.mark.parametrize("size", ["32", "32x", "axb", "32 x 32"])
def test_a_size_that_cannot_be_read_is_named(finished: Path, tmp_path: Path, size: str) -> None:
    with pytest.raises(ConfigError, match=r"--size: cannot read .*; write WIDTHxHEIGHT"):
        sample_to_file(finished, None, [], wish(size=size), tmp_path / "out.mp4", Recorder())


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="this is no run folder"):
        read_run(tmp_path)


def test_a_run_without_anything_to_take_says_so(scenes: Scenes, tmp_path: Path) -> None:
    scene = scenes("tiny-i2v")
    run = scene.train(scene.config(tmp_path / "run"))
    (run / "adapter.safetensors").unlink()
    for step in (1, 2):
        checkpoint_path(run, step).rename(tmp_path / str(step))
    with pytest.raises(ConfigError, match="the run has no adapter and no checkpoint yet"):
        adapter_of_run(run, Recorder())


def test_a_lora_of_another_task_is_refused_and_one_of_another_model_is_said(finished: Path, tmp_path: Path) -> None:
    adapter, spec, said = read_adapter(finished / "adapter.safetensors"), variant("tiny-i2v").spec, list[str]()
    path = tmp_path / "lora.safetensors"

    def of(model: str) -> list[Path]:
        save_adapter(path, replace(adapter, metadata={"longtake.model": model} if model else {}), "comfyui")
        return [path]

    with pytest.raises(ModelError) as caught:
        adapters_of(of("tiny-flf2v"), spec, said.append)
    assert str(caught.value) == (
        f"{path}: this is a LoRA of tiny-flf2v (flf2v), the model is tiny-i2v (i2v); use one of the same task"
        " [lora-of-another-task]"
    )
    for model in ("", "tiny-i2v"):
        adapters_of(of(model), spec, said.append)
    assert said == []
    for model in ("wan2.2-i2v-a14b", "of-later-days"):
        adapters_of(of(model), spec, said.append)
    assert said == [
        f"lora.safetensors is a LoRA of {m}, the model is tiny-i2v" for m in ("wan2.2-i2v-a14b", "of-later-days")
    ]


def test_a_run_does_not_start_from_a_lora_of_another_task(scenes: Scenes, finished: Path, tmp_path: Path) -> None:
    adapter, path = read_adapter(finished / "adapter.safetensors"), tmp_path / "lora.safetensors"
    save_adapter(path, replace(adapter, metadata={"longtake.model": "tiny-t2v"}), "comfyui")
    scene = scenes("tiny-i2v")
    lora = {"rank": adapter.rank, "alpha": 2.0, "start_from": [str(path)]}
    with pytest.raises(ModelError, match=r"this is a LoRA of tiny-t2v \(t2v\), the model is tiny-i2v \(i2v\)"):
        scene.train(scene.config(tmp_path / "run", lora=lora))
