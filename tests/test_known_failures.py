"""Failures that trainers of video models have shipped, each met here as its user would have met it."""

import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel, WanTransformerBlock
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from command_line import run, small_run, succeed, write_config
from failures import (
    OnTwoRanks,
    Payload,
    cached,
    folder_of_one,
    learning,
    others_in_memory,
    steps,
    trained_on_two_ranks,
)
from float64_objective import Encoders, share_below, sigma_of
from longtake.data.video import Window, read_clip
from longtake.errors import ConfigError, RunError
from longtake.training.checkpoint import checkpoint_path
from longtake.training.metrics import FILE
from runs import Recorder, Stopper, contents, learnt, scene
from saved import read
from seen import transformer_calls

Root = Callable[[str], Path]
PLAIN = ("--set", 'memory.gradient_checkpointing="none"')
"""A strategy of the user's own, for which no plan is made."""


def test_first_frame_not_cropped_like_the_clip(tiny_root: Root, tmp_path: Path) -> None:
    source, root = folder_of_one(tmp_path / "clips", 48, 96), tiny_root("tiny-i2v")
    config = write_config(tmp_path / "run.toml", small_run(root, source, tmp_path))
    succeed("prepare", config)
    (tensors,), (image,) = (cached(tmp_path / "cache", kind) for kind in ("latents", "images"))
    assert torch.equal(tensors["condition"][4:, 0], tensors["latents"][:, 0]), "the VAE is causal"
    cropped = read_clip(source / "one.mp4", Window(0.0, 1, 16.0), (32, 32))[0]
    tokens = Encoders(root).clip_tokens([cropped.permute(1, 2, 0).numpy()])
    assert image["image_embeds"].numpy() == pytest.approx(tokens, abs=1e-4)

    uncut = read_clip(source / "one.mp4", Window(0.0, 1, 16.0), (96, 48))[0]
    Image.fromarray(uncut.permute(1, 2, 0).numpy()).save(tmp_path / "first.png")
    wish = ("--prompt", "x", "--image", tmp_path / "first.png", "--size", "32x32", "--num-frames", 5, "--steps", 1)
    with transformer_calls() as calls:
        succeed("sample", "--model", root, *wish, "--out", tmp_path / "out.mp4")
    assert torch.equal(calls[0].hidden_states[0, 16:], tensors["condition"])
    assert torch.equal(calls[0].given["encoder_hidden_states_image"][0], image["image_embeds"])


def test_i2v_weights_trained_with_no_image_by_a_forgotten_switch(tiny_root: Root, tmp_path: Path) -> None:
    source, root = folder_of_one(tmp_path / "clips"), tiny_root("tiny-i2v")
    of_text = write_config(tmp_path / "t2v.toml", small_run(tiny_root("tiny-t2v"), source, tmp_path))
    succeed("prepare", of_text)
    config = write_config(tmp_path / "run.toml", small_run(root, source, tmp_path))
    (error,) = run("train", config).errors
    assert "task 't2v' instead of 'i2v'" in error
    succeed("prepare", config)
    with transformer_calls() as calls:
        succeed("train", config, *PLAIN)
    assert len(learning(calls)) >= 2
    (condition,) = (each["condition"] for each in cached(tmp_path / "cache", "latents") if "condition" in each)
    (image,) = cached(tmp_path / "cache", "images")
    for call in learning(calls):
        assert torch.equal(call.hidden_states[0, 16:], condition)
        assert torch.equal(call.given["encoder_hidden_states_image"][0], image["image_embeds"])
    assert condition[:4, 0].all()
    assert condition[4:, 0].std() > 0.1


@pytest.mark.parametrize(("name", "boundary"), [("tiny-t2v-a14b", 0.875), ("tiny-i2v-a14b", 0.9)])
@pytest.mark.parametrize("expert", ["high", "low"])
def test_experts_boundary_wrong(tiny_root: Root, tmp_path: Path, name: str, boundary: float, expert: str) -> None:
    where = scene(name, tiny_root(name), tmp_path)
    training = {"steps": 2, "global_batch_size": 16, "micro_batch_size": 16}
    with transformer_calls() as calls:
        where.train(
            where.config(tmp_path / "run", model={"expert": expert}, training=training, data={"validation": 0.25})
        )
    component = "transformer" if expert == "high" else "transformer_2"
    weights = load_file(where.root / component / "diffusion_pytorch_model.safetensors")
    low, high = (boundary, 1.0) if expert == "high" else (0.0, boundary)
    for call in calls:
        assert torch.equal(call.transformer.patch_embedding.weight, weights["patch_embedding.weight"])
        assert ((low * 1000 <= call.given["timestep"]) & (call.given["timestep"] <= high * 1000)).all()
    first, last = (share_below(edge, "logit_normal", 3.0) for edge in (low, high))
    middles = [sigma_of(first + (last - first) * (k + 0.5) / 4, "logit_normal", 3.0) for k in range(4)]
    validated = [call.timestep for call in calls if not call.learning]
    assert validated == pytest.approx([1000 * sigma for sigma in middles] * 2, rel=1e-6)


def test_clean_first_frame_lost(tiny_root: Root, tmp_path: Path) -> None:
    source, root = folder_of_one(tmp_path / "clips"), tiny_root("tiny-ti2v")
    config = write_config(tmp_path / "run.toml", small_run(root, source, tmp_path))
    succeed("prepare", config)
    (latents,) = (each["latents"] for each in cached(tmp_path / "cache", "latents"))
    with transformer_calls() as calls:
        succeed("train", config, *PLAIN)
    made = learning(calls)[-2:]
    for call, line in zip(made, steps(tmp_path / "run"), strict=True):
        assert torch.equal(call.hidden_states[0, :, 0], latents[:, 0])
        sigma = call.timestep / 1000
        noise = (call.hidden_states[0, :, 1:].double() - (1 - sigma) * latents[:, 1:]) / sigma
        loss = (call.velocity[0, :, 1:] - (noise - latents[:, 1:])).square().mean()
        # noise comes back with fp32's rounding over sigma, which is above 0.03 in 999 of 1000 draws
        assert line["loss"] == pytest.approx(float(loss), rel=1e-4), "the given frame is not in the loss"


@pytest.mark.parametrize(
    ("flags", "times"),
    [(["--use_gradient_checkpointing"], 2), ([*PLAIN], 1), (["--use_gradient_checkpointing_offload"], 2)],
)
def test_gradient_checkpointing_flag_ignored(tiny_root: Root, tmp_path: Path, flags: list[str], times: int) -> None:
    config = write_config(
        tmp_path / "run.toml", small_run(tiny_root("tiny-t2v"), folder_of_one(tmp_path / "clips"), tmp_path)
    )
    succeed("prepare", config)
    counts = {WanTransformer3DModel: 0, WanTransformerBlock: 0}

    def count(module: nn.Module, *_: Any) -> None:
        if type(module) in counts:
            counts[type(module)] += 1

    hook = register_module_forward_pre_hook(count)
    try:
        succeed("train", config, *flags, "--training_strategy", "single")
    finally:
        hook.remove()
    assert counts[WanTransformer3DModel] >= 2
    assert counts[WanTransformerBlock] == times * 4 * counts[WanTransformer3DModel]


def test_resume_restarting_step_sampler_and_learning_rate_at_0_and_overwriting_old_files(
    tiny_root: Root, tmp_path: Path
) -> None:
    where = scene("tiny-i2v", tiny_root("tiny-i2v"), tmp_path / "scene", count=5)
    sections: dict[str, Any] = {"training": {"steps": 4, "warmup_steps": 3}, "output": {"keep": 9}}
    whole = where.train(where.config(tmp_path / "whole", **sections))
    config = where.config(tmp_path / "cut", **sections)
    with pytest.raises(RunError, match="after step 2, which is saved"):
        where.train(config, reporter=Stopper(2))
    before = contents(tmp_path / "cut")
    with pytest.raises(ConfigError, match="the run folder is not empty; add --resume"):
        where.train(config)
    assert contents(tmp_path / "cut") == before
    where.train(config, resume=True)
    assert learnt(tmp_path / "cut") == learnt(whole)
    rates = [line["learning_rate"] for line in steps(tmp_path / "cut")]
    assert rates == pytest.approx([1e-4 / 3, 2e-4 / 3, 1e-4, 1e-4])
    after = contents(tmp_path / "cut")
    kept = [name for name in before if name.startswith("checkpoints/")]
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    assert after["metrics.jsonl"].startswith(before["metrics.jsonl"])


def test_training_flags_frozen_into_the_cache(tiny_root: Root, tmp_path: Path) -> None:
    table = small_run(tiny_root("tiny-i2v"), folder_of_one(tmp_path / "clips"), tmp_path)
    config = write_config(tmp_path / "run.toml", table)
    succeed("prepare", config)
    before = contents(tmp_path / "cache")
    flags = ["--lora_rank", 3, "--learning_rate", "1e-3", "--gradient_accumulation_steps", 2, *PLAIN]
    sets = ["data.caption_dropout=0.9", "training.shift=7.0", 'training.sigmas="uniform"', "training.ema=0.5"]
    sets += ['training.loss_weighting="bell"', "training.steps=1", "lora.dropout=0.1"]
    succeed("train", config, *flags, *(word for text in sets for word in ("--set", text)))
    (line,) = steps(tmp_path / "run")
    assert line["learning_rate"] == 1e-3
    state = load_file(tmp_path / "run" / "adapter.safetensors")
    assert {tensor.shape[0] for name, tensor in state.items() if "lora_A" in name} == {3}
    assert contents(tmp_path / "cache") == before


@pytest.fixture(scope="module")
def on_two_ranks(tiny_root: Root, tmp_path_factory: pytest.TempPathFactory) -> OnTwoRanks:
    """One launch for three tests."""
    folder = tmp_path_factory.mktemp("ranks")
    return trained_on_two_ranks(scene("tiny-t2v", tiny_root("tiny-t2v"), folder / "scene", count=5), folder)


@pytest.mark.long
def test_loss_logged_from_one_micro_batch_of_one_rank(on_two_ranks: OnTwoRanks) -> None:
    whole, shared = ([line["loss"] for line in steps(run)] for run in (on_two_ranks.whole, on_two_ranks.shared))
    assert shared == pytest.approx(whole, rel=2e-6)  # sums in another order
    assert len(set(whole)) == 5


@pytest.mark.long
def test_the_learning_rate_schedule_ticking_once_per_process(on_two_ranks: OnTwoRanks) -> None:
    cosine = [0.5e-4 * (1 + math.cos(math.pi * done / 3)) for done in range(3)]
    for each in (on_two_ranks.whole, on_two_ranks.shared):
        assert [line["learning_rate"] for line in steps(each)] == pytest.approx([0.5e-4, 1e-4, *cosine])


def test_a_129_frame_bucket_met_hours_into_the_run(tiny_root: Root, tmp_path: Path) -> None:
    where = scene("tiny-t2v", tiny_root("tiny-t2v"), tmp_path / "scene", count=2, frames=130)
    curriculum = {"num_frames": 129, "frames_schedule": ((0, 5), (3, 129)), "validation": 0}
    config = where.config(tmp_path / "run", data=curriculum, training={"steps": 4})

    def full(module: nn.Module, _given: Any) -> None:
        if isinstance(module, WanTransformerBlock) and _given[0].shape[1] == 33 * 4:
            raise torch.OutOfMemoryError("no room for 129 frames")

    hook = register_module_forward_pre_hook(full)
    said = Recorder()
    try:
        with pytest.raises(RunError, match="no room for 129 frames"):
            where.train(config, reporter=said)
    finally:
        hook.remove()
    assert not (tmp_path / "run" / FILE).exists() or not steps(tmp_path / "run")
    assert said.having("the largest bucket")


@pytest.mark.parametrize("name", ["tiny-i2v", "tiny-flf2v", "tiny-i2v-a14b"])
def test_image_only_data_training_an_i2v_model_for_36_hours(tiny_root: Root, tmp_path: Path, name: str) -> None:
    stills = tmp_path / "stills"
    stills.mkdir()
    for index in range(3):
        Image.new("RGB", (40, 40), (60 * index, 90, 200)).save(stills / f"{index}.png")
        (stills / f"{index}.txt").write_text("a wall")
    model = {"expert": "high"} if name.endswith("a14b") else {}
    config = write_config(tmp_path / "run.toml", small_run(tiny_root(name), stills, tmp_path), {"model": model})
    for command in ("prepare", "train"):
        outcome = run(command, config)
        (error,) = outcome.errors
        assert outcome.status == 2
        assert error.startswith(f"{stills}: all 3 of its clips are still images; give clips")
    config = write_config(tmp_path / "t2v.toml", small_run(tiny_root("tiny-t2v"), stills, tmp_path))
    assert "will learn how things look, and no motion" in succeed("prepare", config).err
    succeed("train", config, *PLAIN)
    assert [line["num_frames"] for line in steps(tmp_path / "run")] == [1, 1]


@pytest.mark.long
def test_save_under_zero_3_deadlocking(on_two_ranks: OnTwoRanks) -> None:
    assert on_two_ranks.said[:2] == ["shared: done", "saving: done"], on_two_ranks.said
    for step in (1, 2, 3):
        saved = read(checkpoint_path(on_two_ranks.saving, step))
        assert saved.trained.keys() == saved.ema.keys()
        assert all(tensor.isfinite().all() for tensor in saved.trained.values())
    assert (on_two_ranks.saving / "adapter.safetensors").is_file()


@pytest.mark.long
def test_validation_sampling_being_the_real_memory_peak(tiny_root: Root, tmp_path: Path) -> None:
    Image.new("RGB", (40, 40), (200, 40, 40)).save(tmp_path / "first.png")
    wanted = {"samples": [{"prompt": "x", "image": str(tmp_path / "first.png")}], "sample_steps": 1, "every": 1}
    table = small_run(tiny_root("tiny-i2v"), folder_of_one(tmp_path / "clips"), tmp_path)
    config = write_config(tmp_path / "run.toml", table, {"validation": wanted, "training": {"steps": 1}})
    succeed("prepare", config)
    with others_in_memory() as beside:
        succeed("train", config, *PLAIN)
    assert set(beside) == {0}, "an encoder is in memory while the transformer is used"
    assert len([*(tmp_path / "run" / "samples").glob("*.mp4")]) == 2

    sections = {
        "model": {"name": "tiny-t2v"},
        "data": {"source": "-", "size": [832, 480], "num_frames": 17},
        "lora": {},
        "memory": {"gradient_checkpointing": "block", "activation_offload": "host", "slices": 16},
        "output": {"run": "-"},
        "validation": {"samples": [{"prompt": "x"}]},
    }
    large = write_config(tmp_path / "large.toml", sections)
    report = json.loads(succeed("plan", large, "--gpu", "rtx-4090", "--json", "-").out)
    chosen = report["plans"][report["chosen"]]
    needs = {each["stage"]: each["device_bytes"] for each in chosen["stages"] if each["stage"] != "prepare"}
    assert max(needs, key=lambda stage: needs[stage]) == chosen["stage"] == "sampling"
    assert chosen["peak_bytes"]["device"] == needs["sampling"]


def test_pickle_caches(tiny_root: Root, tmp_path: Path) -> None:
    config = write_config(
        tmp_path / "run.toml", small_run(tiny_root("tiny-i2v"), folder_of_one(tmp_path / "clips"), tmp_path)
    )
    succeed("prepare", config)
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json"}
    for path in (path for path in files if path.parent.name in ("latents", "images", "texts", "manifests")):
        content = path.read_bytes()
        path.write_bytes(pickle.dumps(Payload(tmp_path / "executed")))
        outcome = run("train", config, *PLAIN, "--set", f'output.run="{tmp_path / path.stem}"')
        assert outcome.status == 2
        assert "cannot be read" in outcome.errors[0]
        assert not (tmp_path / "executed").exists()
        path.write_bytes(content)
