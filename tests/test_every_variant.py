"""Every published variant: its tiny counterpart goes the whole way; `inspect`, `plan` and the recipes agree."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from checkpoints import original_shapes, write_pipeline, write_sparse
from command_line import Table, run, small_run, succeed, write_config
from longtake.config.load import load_config
from longtake.data.video import probe
from longtake.lora import read_adapter
from longtake.models.wan.variants import VARIANTS, WanVariant
from longtake.training.metrics import FILE, read_metrics
from runs import draw_clip

PUBLISHED = {name: model for name, model in VARIANTS.items() if model.hub_id}
TINY = {
    "wan2.1-t2v-1.3b": "tiny-t2v",
    "wan2.1-t2v-14b": "tiny-t2v",
    "wan2.1-i2v-14b-480p": "tiny-i2v",
    "wan2.1-i2v-14b-720p": "tiny-i2v",
    "wan2.1-flf2v-14b-720p": "tiny-flf2v",
    "wan2.2-t2v-a14b": "tiny-t2v-a14b",
    "wan2.2-i2v-a14b": "tiny-i2v-a14b",
    "wan2.2-ti2v-5b": "tiny-ti2v",
}
STRUCTURE = ("cross_attn_norm", "qk_norm", "patch_size", "in_channels", "out_channels", "freq_dim", "eps")
RECIPES = Path(__file__).parents[1] / "recipes"
CARDS = (16, 24, 48, 80)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_variant_has_a_tiny_counterpart_of_the_same_structure(name: str) -> None:
    large, tiny = VARIANTS[name], VARIANTS[TINY[name]]
    for key in STRUCTURE:
        assert large.transformer_config[key] == tiny.transformer_config[key], key
    for key in ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len"):
        assert (large.transformer_config[key] is None) == (tiny.transformer_config[key] is None), key
    for key in ("task", "experts", "boundary_ratio", "expand_timesteps", "spatial_stride", "fps", "keep_fp32"):
        assert getattr(large.spec, key) == getattr(tiny.spec, key), key
    assert bool(large.spec.image_tokens) == bool(tiny.spec.image_tokens)
    assert large.vae == tiny.vae

    def layers(model: WanVariant) -> set[str]:
        return {key.split(".", 2)[2] if key.startswith("blocks.") else key for key in model.parameter_shapes()}

    assert layers(large) == layers(tiny)


WAYS = [(name, name != "tiny-t2v" and name != "tiny-t2v-a14b") for name in dict.fromkeys(TINY.values())]
WAYS.append(("tiny-ti2v", False))


@pytest.mark.long
@pytest.mark.parametrize(("name", "with_image"), WAYS, ids=[f"{n}{' image' * image}" for n, image in WAYS])
def test_it_trains_resumes_exports_samples_and_is_planned(
    tiny_root: Callable[[str], Path], tmp_path: Path, name: str, with_image: bool
) -> None:
    spec = VARIANTS[name].spec
    side = spec.size_divisor * 2
    clips = tmp_path / "clips"
    clips.mkdir()
    for index in range(2):
        draw_clip(clips / f"{index}.mp4", index)
    changes: Table = {"model": {"name": name}, "training": {"steps": 4, "ema": 0.5}, "data": {"size": [side, side]}}
    config = write_config(tmp_path / "run.toml", small_run(tiny_root(name), clips, tmp_path), changes)
    folder = tmp_path / "run"
    succeed("prepare", config)
    succeed("train", config, "--set", "training.steps=2")
    first = run("train", config)
    assert first.status == 2
    assert "add --resume" in first.errors[0]
    succeed("train", config, "--resume")
    steps = [line["step"] for line in read_metrics(folder / FILE) if "loss" in line]
    assert steps == [1, 2, 3, 4]
    trained = [read_adapter(path) for path in sorted(folder.glob("adapter*.safetensors"))]
    assert len(trained) == len(spec.experts)
    for form in ("comfyui", "diffusers", "kohya"):
        out = tmp_path / form / "lora.safetensors"
        out.parent.mkdir()
        succeed("export", "--run", folder, "--format", form, "--out", out)
        exported = [read_adapter(path) for path in sorted(out.parent.glob("*.safetensors"))]
        assert [own.scales for own in exported] == [own.scales for own in trained]
        for own, its in zip(exported, trained, strict=True):
            assert own.state.keys() == its.state.keys()
            assert all(torch.equal(tensor, its.state[key]) for key, tensor in own.state.items())
    assert_sampled(folder, tmp_path / "clip.mp4", spec.task, side, with_image)
    planned: dict[str, Any] = json.loads(succeed("plan", config, "--gpu", "cpu", "--json", "-").out)
    assert (planned["model"], planned["task"]) == (name, spec.task)
    assert planned["tokens"] == spec.tokens(5, side, side)
    assert planned["plans"][planned["chosen"]]["fits"]


def assert_sampled(folder: Path, out: Path, task: str, side: int, with_image: bool) -> None:
    """A video of the run's size, from the images that its task takes."""
    image = out.with_suffix(".png")
    Image.new("RGB", (80, 60), (200, 90, 40)).save(image)
    images = ["--image", image] if with_image else []
    images += ["--last-image", image] if task == "flf2v" else []
    succeed("sample", "--run", folder, "--prompt", "a wall", "--steps", 3, "--out", out, *images)
    found = probe(out, "sample")
    assert (found.width, found.height) == (side, side)


@pytest.mark.parametrize("name", PUBLISHED)
def test_inspect_plan_and_recipes_agree_on_a_variant(tmp_path: Path, name: str) -> None:
    model = VARIANTS[name]
    alone: dict[str, Any] = json.loads(
        succeed("inspect", write_sparse(tmp_path / "one.safetensors", original_shapes(name)), "--json").out
    )
    assert name in alone["candidates"]
    assert alone["parameters"] == model.parameters
    whole: dict[str, Any] = json.loads(succeed("inspect", write_pipeline(tmp_path / "root", name), "--json").out)
    assert name in whole["candidates"]
    assert whole["experts"] == list(model.spec.experts)
    assert whole["task"] == alone["task"] == model.spec.task
    for card in CARDS:
        path = RECIPES / f"{name}-lora-{card}gb.toml"
        config, header = load_config(path), path.read_text(encoding="utf-8").split("\n\n")[0]
        assert config.model.name == name
        assert config.model.expert == "both"
        assert f"--model {name} " in header
        assert config.data.num_frames == model.num_frames
        assert config.data.size in (model.size, (832, 480))
        frames, (width, height) = config.data.num_frames, config.data.size
        assert f"--num-frames {frames} --size {width}x{height} " in header


@pytest.mark.parametrize("name", PUBLISHED)
def test_plan_says_the_task_and_tokens_that_the_variant_has(name: str) -> None:
    model = VARIANTS[name]
    asked = ("--model", name, "--num-frames", 17, "--size", "256x256", "--gpu", "h100-sxm", "--host-memory", "256GiB")
    pinned = ("--set", "memory.gradient_checkpointing=block", "--set", "memory.block_swap=0")
    report: dict[str, Any] = json.loads(succeed("plan", *asked, *pinned, "--json", "-").out)
    assert (report["model"], report["task"]) == (name, model.spec.task)
    assert report["tokens"] == model.spec.tokens(17, 256, 256)
    weights = report["plans"][0]["breakdown_bytes"]["weights"]
    outside = model.parameters - model.transformer_config["num_layers"] * model.block_parameters
    held = model.parameters + outside * (len(model.spec.experts) - 1)
    assert weights == pytest.approx(2 * held, rel=0.02), "of two experts, the blocks of one"
