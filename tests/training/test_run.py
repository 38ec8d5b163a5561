"""Whole runs: what is in the folder afterwards, and what keeps a run from beginning."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from longtake.config.load import load_config
from longtake.data.loader import BucketSampler
from longtake.errors import CacheError, ConfigError
from longtake.models.wan.variants import variant
from longtake.models.wan.weights import ModelFiles, load_transformer
from longtake.training.checkpoint import checkpoint_path
from longtake.training.metrics import FILE, read_metrics
from longtake.training.run import train
from runs import CPU, Recorder, Scene, assert_same_run, learnt
from saved import read

Scenes = Callable[[str], Scene]

KEYS = {
    "step",
    "loss",
    "learning_rate",
    "grad_norm",
    "step_seconds",
    "tokens_per_second",
    "device_peak_bytes",
    "host_peak_bytes",
    "planned_peak_bytes",
}


@pytest.mark.parametrize("name", ["tiny-i2v", "tiny-t2v", "tiny-ti2v"])
def test_a_run_leaves_an_adapter_a_log_checkpoints_and_its_config(scenes: Scenes, tmp_path: Path, name: str) -> None:
    scene = scenes(name)
    config = scene.config(tmp_path / "run", output={"formats": ("kohya", "diffusers"), "keep": 1})
    run = scene.train(config)
    assert load_config(run / "config.toml") == config
    assert {path.name for path in run.glob("adapter*")} == {
        "adapter.safetensors",
        "adapter-kohya.safetensors",
        "adapter-diffusers.safetensors",
    }
    assert any(tensor.any() for key, tensor in load_file(run / "adapter.safetensors").items() if "lora_B" in key)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000002"]
    assert len([*run.glob("events.out.tfevents.*")]) == 1
    assert not (run / "scratch").exists()
    assert not [*run.rglob("*.staged-*")]
    lines = read_metrics(run / FILE)
    assert [line["step"] for line in lines] == [0, 1, 2, 2]
    assert [line["step"] for line in lines if "validation_loss" in line] == [0, 2]
    assert all(line.keys() >= KEYS for line in lines if "loss" in line)
    assert not any(line.keys() & {"strategy", "out_of_memory"} for line in lines)
    assert all(line["validation_host_peak_bytes"] > 0 for line in lines if "validation_loss" in line)
    peaks = [line["host_peak_bytes"] for line in lines if "loss" in line]
    assert peaks == sorted(peaks), "what validation takes is read apart and does not start the run's peak anew"


def test_a_run_is_a_function_of_its_config(scenes: Scenes, tmp_path: Path) -> None:
    scene = scenes("tiny-i2v")
    runs = [
        scene.train(scene.config(tmp_path / str(index), training={"seed": seed}, lora={"dropout": 0.2}))
        for index, seed in enumerate((0, 0, 1))
    ]
    assert_same_run(runs[0], runs[1], step=2)
    assert learnt(runs[0]) != learnt(runs[2])


def test_loss_and_gradient_norm_are_of_the_whole_global_batch(scenes: Scenes, tmp_path: Path) -> None:
    scene = scenes("tiny-i2v")
    lines = []
    for size in (1, 2, 4):
        batch = {"global_batch_size": 4, "micro_batch_size": size}
        run = scene.train(scene.config(tmp_path / str(size), training=batch, data={"validation": 0.0}))
        lines.append(learnt(run))
    for other in lines[1:]:
        for line, reference in zip(other, lines[0], strict=True):
            assert line["loss"] == pytest.approx(reference["loss"], abs=1e-6)
            assert line["grad_norm"] == pytest.approx(reference["grad_norm"], abs=1e-6)


def test_the_average_is_what_is_exported(scenes: Scenes, tmp_path: Path) -> None:
    scene = scenes("tiny-i2v")
    run = scene.train(scene.config(tmp_path / "run", training={"ema": 0.5}))
    checkpoint = read(checkpoint_path(run, 2))
    adapter = load_file(run / "adapter.safetensors")
    key, exported = next((key, tensor) for key, tensor in adapter.items() if "blocks.0.self_attn.q.lora_B" in key)
    name = "blocks.0.attn1.to_q.lora_B.default.weight"
    assert key.startswith("diffusion_model.")
    assert torch.equal(exported, checkpoint.ema[name])
    assert not torch.equal(exported, checkpoint.trained[name])


@pytest.mark.filterwarnings(
    "ignore:Mismatch dtype between input and weight"
)  # torch's RMSNorm: fp32 weights, bf16 input
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_full_fine_tuning_leaves_a_transformer_that_loads_back(scenes: Scenes, tmp_path: Path, precision: str) -> None:
    scene = scenes("tiny-t2v")
    run = scene.train(scene.config(tmp_path / "run", lora=None, training={"precision": precision}))
    trained = read(checkpoint_path(run, 2)).trained
    files = ModelFiles(variant("tiny-t2v"), {"transformer": run / "transformer"}, None)
    loaded = load_transformer(files, "transformer", torch.float32, CPU).state_dict()
    assert loaded.keys() == trained.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in trained.items())
    before = load_transformer(
        ModelFiles(files.variant, {"transformer": scene.root / "transformer"}, None), "transformer", torch.float32, CPU
    )
    assert not torch.equal(before.proj_out.weight, loaded["proj_out.weight"])
    assert not (run / "adapter.safetensors").exists()


def test_a_tampered_entry_stops_the_run(
    scenes: Scenes, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    like = scenes("tiny-t2v")
    scene = Scene(like.model, like.root, like.source, tmp_path / "cache")
    config = scene.config(tmp_path / "run")
    manifest = scene.prepare(config)
    assert manifest is not None
    for entry in manifest.entries:
        file = tmp_path / "cache" / "latents" / f"{entry.latents}.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    with pytest.raises(CacheError, match="the entry has changed since it was written"):
        train(config, False, Recorder())


def test_a_cache_that_was_not_prepared_is_named_before_anything_is_written(scenes: Scenes, tmp_path: Path) -> None:
    config = scenes("tiny-i2v").config(tmp_path / "run", data={"cache": str(tmp_path / "cache")})
    with pytest.raises(CacheError, match="the cache has not been prepared; run `longtake prepare` with this config"):
        train(config, False, Recorder())
    assert not (tmp_path / "run").exists()


def test_a_run_that_could_not_begin_can_be_started_again(scenes: Scenes, tmp_path: Path) -> None:
    scene = scenes("tiny-i2v")
    with pytest.raises(ConfigError, match=r"lora\.targets"):
        scene.train(scene.config(tmp_path / "run", lora={"targets": ("nothing",)}))
    scene.train(scene.config(tmp_path / "run"))


def test_the_largest_bucket_to_come_is_run_once_before_anything_counts(scenes: Scenes, tmp_path: Path) -> None:
    scene = scenes("tiny-i2v")
    training = {"steps": 4, "micro_batch_size": 2, "schedule": "constant"}
    plain = scene.train(scene.config(tmp_path / "plain", training=training, lora={"dropout": 0.2}))
    curriculum = {"num_frames": 5, "frames_schedule": ((0, 5), (2, 9), (3, 5))}
    config = scene.config(tmp_path / "run", data=curriculum, training=training, lora={"dropout": 0.2})
    said = Recorder()
    run = scene.train(config, reporter=said)
    (line,) = said.having("the largest bucket")
    assert line.startswith("the largest bucket: 9 frames of 32x32, micro-batch 2, took device ")
    losses = [[line["loss"] for line in learnt(folder) if "loss" in line] for folder in (plain, run)]
    assert losses[1][:2] == losses[0][:2], "a larger bucket that was tried leaves no trace in what is computed"
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    resumed = Recorder()
    scene.train(config, resume=True, reporter=resumed)
    (line,) = resumed.having("the largest bucket")
    assert "5 frames" in line, "of the stages that are over nothing is tried"
    finished = Recorder()
    scene.train(config, resume=True, reporter=finished)
    assert not finished.having("the largest bucket")


def test_a_largest_micro_batch_of_few_clips_repeats_them(scenes: Scenes, tmp_path: Path) -> None:
    scene = scenes("tiny-t2v")
    config = scene.config(tmp_path / "run", data={"num_frames": 9, "frames_schedule": ((0, 5), (1, 9))})
    manifest = scene.prepare(config)
    assert manifest is not None
    sampler = BucketSampler(manifest.entries, [(0, 5), (1, 9)], 0, 8)
    visits = sampler.largest(scene.spec.tokens, 6, 0)
    assert [visit.entry.bucket for visit in visits] == [(9, 32, 32)] * 6
    assert {visit.stage for visit in visits} == {1}
    assert len({visit.entry.latents for visit in visits}) == 4


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_the_random_state_after_the_largest_bucket_is_the_one_before(
    scenes: Scenes, tmp_path: Path, dropout: float
) -> None:
    class Asked(Recorder):
        def line(self, text: str) -> None:
            if text.startswith("the largest bucket") or text.startswith("budget"):
                states.append(torch.get_rng_state())

    states: list[torch.Tensor] = []
    scene = scenes("tiny-i2v")
    scene.train(scene.config(tmp_path / "run", lora={"dropout": dropout}, data={"validation": 0.0}), reporter=Asked())
    assert len(states) == 2
    assert torch.equal(*states)
