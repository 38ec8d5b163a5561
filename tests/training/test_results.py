"""What one takes from a run: adapters in each format, merged weights, videos; and what is said where it cannot be."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from longtake.data.video import probe
from longtake.errors import ConfigError, RunError
from longtake.lora import read_adapter
from longtake.models.wan.variants import variant
from longtake.models.wan.weights import ModelFiles, load_transformer
from longtake.training.checkpoint import checkpoint_path
from longtake.training.results import Wish, export, read_run, run_adapter, sample_to_file
from runs import CPU, Recorder, Scene, Stopper
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


@pytest.mark.parametrize("form", ["comfyui", "diffusers", "kohya"])
def test_the_adapter_comes_out_in_each_format(finished: Path, tmp_path: Path, form: str) -> None:
    out = tmp_path / "adapter.safetensors"
    export(finished, form, False, out, Recorder())
    exported, own = read_adapter(out), read_adapter(finished / "adapter.safetensors")
    assert exported.alpha == own.alpha == 2.0
    assert exported.state.keys() == own.state.keys()
    assert all(torch.equal(tensor, own.state[name]) for name, tensor in exported.state.items())
    assert exported.metadata["longtake.model"] == "tiny-i2v"


@pytest.mark.parametrize("form", ["comfyui", "diffusers"])
def test_merged_weights_have_the_adapter_in_them(finished: Path, scenes: Scenes, tmp_path: Path, form: str) -> None:
    out = tmp_path / ("merged" if form == "diffusers" else "merged.safetensors")
    export(finished, form, True, out, Recorder())
    tiny = variant("tiny-i2v")
    weights = [
        load_transformer(ModelFiles(tiny, {"transformer": path}, None), "transformer", torch.float32, CPU).state_dict()
        for path in (out, scenes("tiny-i2v").root / "transformer")
    ]
    adapter = read_adapter(finished / "adapter.safetensors").state
    added = adapter[f"{LAYER}.lora_B.weight"] @ adapter[f"{LAYER}.lora_A.weight"]
    merged, base = (state[f"{LAYER}.weight"] for state in weights)
    torch.testing.assert_close(merged - base, added, atol=1e-6, rtol=1e-4)
    assert torch.equal(weights[0]["patch_embedding.weight"], weights[1]["patch_embedding.weight"])


def test_an_adapter_format_holds_no_full_weights(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="kohya's format is for adapters"):
        export(finished, "kohya", True, tmp_path / "out.safetensors", Recorder())


def test_a_run_that_was_stopped_gives_the_average_of_its_last_checkpoint(scenes: Scenes, tmp_path: Path) -> None:
    scene = scenes("tiny-i2v")
    config = scene.config(tmp_path / "run", training={"ema": 0.5, "steps": 4})
    with pytest.raises(RunError, match="after step 2"):
        scene.train(config, reporter=Stopper(2))
    said = Recorder()
    adapter = run_adapter(tmp_path / "run", read_run(tmp_path / "run"), said)
    checkpoint = read(checkpoint_path(tmp_path / "run", 2))
    assert torch.equal(adapter.state[f"{LAYER}.lora_B.weight"], checkpoint.ema[f"{LAYER}.lora_B.default.weight"])
    assert said.lines == ["the run is not finished: using the checkpoint after step 2"]


def test_a_run_that_goes_on_is_not_mistaken_for_finished(scenes: Scenes, tmp_path: Path) -> None:
    scene = scenes("tiny-i2v")
    run = scene.train(scene.config(tmp_path / "run"))
    with pytest.raises(RunError, match="after step 3"):
        scene.train(scene.config(run, training={"steps": 9}), resume=True, reporter=Stopper(3))
    adapter = run_adapter(run, read_run(run), Recorder())
    trained = read(checkpoint_path(run, 3)).trained
    assert torch.equal(adapter.state[f"{LAYER}.lora_B.weight"], trained[f"{LAYER}.lora_B.default.weight"])


def test_full_weights_of_a_run_are_exported_whole(scenes: Scenes, tmp_path: Path) -> None:
    scene = scenes("tiny-t2v")
    run = scene.train(scene.config(tmp_path / "run", lora=None, model={"dtype": "fp32"}))
    out = tmp_path / "full.safetensors"
    export(run, "comfyui", False, out, Recorder())
    trained = read(checkpoint_path(run, 2)).trained
    exported = load_file(out)
    assert torch.equal(exported["blocks.0.self_attn.q.weight"], trained["blocks.0.attn1.to_q.weight"])
    assert len(exported) == len(trained)


def test_a_sample_of_a_run_is_a_sample_of_its_adapter(finished: Path, tmp_path: Path) -> None:
    image = tmp_path / "first.png"
    Image.new("RGB", (64, 64), (30, 90, 200)).save(image)
    asked = wish(image=image)
    videos = [tmp_path / name for name in ("run.mp4", "lora.mp4", "base.mp4")]
    sample_to_file(finished, "", None, asked, videos[0], Recorder())
    model = str(read_run(finished).model.path)
    explicit = wish(image=image, size="32x32", num_frames=5)
    sample_to_file(None, model, finished / "adapter.safetensors", explicit, videos[1], Recorder())
    sample_to_file(None, model, None, explicit, videos[2], Recorder())
    content = [video.read_bytes() for video in videos]
    assert content[0] == content[1]
    assert content[0] != content[2]
    assert probe(videos[0], "sample").duration == pytest.approx(5 / 16)


@pytest.mark.parametrize("size", ["32", "32x", "axb", "32 x 32"])
def test_a_size_that_cannot_be_read_is_named(finished: Path, tmp_path: Path, size: str) -> None:
    with pytest.raises(ConfigError, match=r"--size: cannot read .*; write WIDTHxHEIGHT"):
        sample_to_file(finished, "", None, wish(size=size), tmp_path / "out.mp4", Recorder())


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
        run_adapter(run, read_run(run), Recorder())


def test_an_unfinished_full_run_says_how_to_finish_it(scenes: Scenes, tmp_path: Path) -> None:
    scene = scenes("tiny-t2v")
    config = scene.config(tmp_path / "run", lora=None, training={"steps": 3})
    with pytest.raises(RunError):
        scene.train(config, reporter=Stopper(1))
    with pytest.raises(ConfigError, match="the run is not finished; continue it with --resume"):
        export(tmp_path / "run", "comfyui", False, tmp_path / "out.safetensors", Recorder())
