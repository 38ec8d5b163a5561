"""The command line from clips to a video: each command on the results of the one before, and what it prints."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import clips
from command_line import run, small_run, succeed, write_config
from longtake.data.video import Window, probe, read_clip
from longtake.models.wan.tiny import build_tiny

NOISE = re.compile(r"Loading weights|Writing model shards|it/s\]|\[transformers\]|Warning")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "clips"
    folder.mkdir()
    for index, frames in enumerate((clips.levels(20), clips.quadrants(20))):
        clips.write(folder / f"{index}.mp4", frames, fps=16)
        (folder / f"{index}.txt").write_text(f"clip number {index}")
    return folder


@pytest.fixture
def still(tmp_path: Path) -> Path:
    Image.new("RGB", (64, 48), (200, 30, 30)).save(tmp_path / "still.png")
    return tmp_path / "still.png"


def sets(**values: Any) -> list[str]:
    """`--set` for each of `values`, whose names have two underscores for the dot."""
    texts = [f"{name.replace('__', '.')}={json.dumps(value)}" for name, value in values.items()]
    return [word for text in texts for word in ("--set", text)]


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def frames_of(video: Path) -> torch.Tensor:
    return read_clip(video, Window(0.0, 5, 16.0), (32, 32)).float()


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Frames that are equal but for the encoder: x264 does not give the same bytes in every process."""
    return float((one - other).abs().mean()) < 1.0


def keys(path: Path) -> set[str]:
    with safe_open(path, framework="pt") as file:
        return set(file.keys())


def test_from_clips_to_a_lora_and_a_video(
    tmp_path: Path, data: Path, still: Path, tiny_root: Callable[[str], Path]
) -> None:
    config, folder = tmp_path / "run.toml", tmp_path / "runs" / "run"
    root = tiny_root("tiny-i2v")

    out = succeed("init", "--model", root, "--data", data, "-o", config).out
    assert f"wrote {config}; next: longtake prepare {config}" in out
    assert tomllib.loads(config.read_text())["model"]["path"] == str(root)

    small = sets(data__num_frames=5, data__size=[32, 32])
    outcome = succeed("prepare", config, *small)
    assert f"2 clips ready in {tmp_path / 'cache'}; next: longtake train {config}" in outcome.out
    assert "video latents  2/2" in outcome.err
    assert "video latents: all 2 cached" in succeed("prepare", config, *small).err

    flags = "--num_frames 5 --height 32 --width 32 --lora_rank 3 --lora_target_modules to_q,ffn --learning_rate 1e-3"
    flags += " --gradient_accumulation_steps 2 --training_strategy single --use_gradient_checkpointing_offload"
    flags += " --budget 8GiB"
    short = sets(training__warmup_steps=0, output__save_every=1, validation__every=2)
    outcome = succeed("train", config, *flags.split(), *short, *sets(training__steps=2))
    assert f"result:  {folder / 'adapter.safetensors'}" in outcome.out
    assert (folder / "report.html").is_file()
    resolved = tomllib.loads((folder / "config.toml").read_text())
    assert (resolved["data"]["num_frames"], resolved["data"]["size"]) == (5, [32, 32])
    assert (resolved["lora"]["rank"], resolved["lora"]["targets"]) == (3, ["to_q", "ffn"])
    training, memory = resolved["training"], resolved["memory"]
    assert (training["learning_rate"], training["global_batch_size"], training["micro_batch_size"]) == (1e-3, 2, 1)
    offload = (memory["gradient_checkpointing"], memory["activation_offload"], memory["budget"])
    assert offload == ("block", "host", "8GiB")
    assert resolved["parallel"]["strategy"] == "single"

    outcome = succeed("train", config, *flags.split(), *short, *sets(training__steps=3), "--resume")
    assert "resumed with another training.steps: 3 instead of 2" in outcome.err
    assert "resumed after step 2" in outcome.err
    assert [line["step"] for line in metrics(folder) if "loss" in line] == [1, 2, 3]
    assert [line["step"] for line in metrics(folder) if "validation_loss" in line] == [0, 2, 3]

    video = tmp_path / "out" / "clip.mp4"
    wish = ["--prompt", "red", "--image", still, "--steps", 2, "--out", video]
    assert succeed("sample", "--run", folder, *wish).out == f"{video}\n"
    info = probe(video, "video")
    assert (info.width, info.height, round(info.duration * 16)) == (32, 32, 5)
    first = frames_of(video)
    lora = ["--model", root, "--lora", folder / "adapter.safetensors", "--size", "32x32", "--num_frames", 5]
    succeed("sample", *lora, *wish)
    assert same(frames_of(video), first)


def test_what_a_run_exports_is_what_inspect_says(tmp_path: Path, data: Path, tiny_root: Callable[[str], Path]) -> None:
    config = write_config(tmp_path / "run.toml", small_run(tiny_root("tiny-t2v"), data, tmp_path))
    succeed("prepare", config)
    succeed("train", config, *sets(output__formats=["diffusers", "kohya"]))
    folder = tmp_path / "run"
    assert {path.name for path in folder.glob("adapter*")} == {
        "adapter.safetensors",
        "adapter-diffusers.safetensors",
        "adapter-kohya.safetensors",
    }
    prefixes = {"comfyui": "diffusion_model.", "diffusers": "transformer.", "kohya": "lora_unet_"}
    for form, prefix in prefixes.items():
        path = tmp_path / f"{form}.safetensors"
        succeed("export", "--run", folder, "--format", form, "--out", path)
        assert all(key.startswith(prefix) for key in keys(path))
        found = json.loads(succeed("inspect", path, "--json").out)
        assert found["kind"] == "lora"
        written = folder / ("adapter.safetensors" if form == "comfyui" else f"adapter-{form}.safetensors")
        tensors = load_file(path)
        assert all(tensors[key].equal(tensor) for key, tensor in load_file(written).items())

    single, component = tmp_path / "merged.safetensors", tmp_path / "merged"
    succeed("export", "--run", folder, "--format", "comfyui", "--merge", "--out", single)
    succeed("export", "--run", folder, "--format", "diffusers", "--merge", "--out", component)
    for path in (single, component):
        found = json.loads(succeed("inspect", path, "--json").out)
        assert (found["kind"], found["variant"]) == ("transformer", "tiny-t2v")
    assert "tiny-t2v" in succeed("inspect", tiny_root("tiny-t2v")).out


def test_full_fine_tuning_from_clips_to_a_video(tmp_path: Path, data: Path, tiny_root: Callable[[str], Path]) -> None:
    root = build_tiny("tiny-t2v", tmp_path / "model")
    table = small_run(root, data, tmp_path)
    config = write_config(tmp_path / "run.toml", table, {"lora": None, "data": {"validation": 0.5}})
    folder = tmp_path / "run"
    assert not NOISE.search(succeed("prepare", config).err)
    outcome = succeed("train", config, *sets(training__steps=1))
    assert f"result:  {folder / 'transformer'}" in outcome.out
    assert not NOISE.search(outcome.err)
    (once,) = (load_file(path) for path in (folder / "transformer").glob("*.safetensors"))
    succeed("train", config, "--resume", *sets(training__steps=2))
    (twice,) = (load_file(path) for path in (folder / "transformer").glob("*.safetensors"))
    assert once.keys() == twice.keys()
    assert any(not once[key].equal(twice[key]) for key in once)
    assert [line["step"] for line in metrics(folder) if "loss" in line] == [1, 2]

    video = tmp_path / "clip.mp4"
    succeed("sample", "--run", folder, "--prompt", "grey", "--steps", 2, "--out", video)
    assert probe(video, "video").height == 32
    single = tmp_path / "full.safetensors"
    succeed("export", "--run", folder, "--format", "comfyui", "--out", single)
    assert json.loads(succeed("inspect", single, "--json").out)["variant"] == "tiny-t2v"

    # what was trained is a model like any other
    shutil.copytree(folder / "transformer", root / "transformer", dirs_exist_ok=True)
    again = tmp_path / "again.mp4"
    succeed(
        "sample",
        "--model",
        root,
        "--prompt",
        "grey",
        "--steps",
        2,
        "--size",
        "32x32",
        "--num-frames",
        5,
        "--out",
        again,
    )
    assert same(frames_of(again), frames_of(video))


def test_a_process_of_its_own_says_nothing_but_ours(
    tmp_path: Path, still: Path, tiny_root: Callable[[str], Path]
) -> None:
    wish = ["--image", still, "--size", "32x32", "--num-frames", 5, "--steps", 2, "--out", tmp_path / "clip.mp4"]
    command = ["sample", "--model", tiny_root("tiny-i2v"), "--prompt", "red", *wish]
    arguments = [sys.executable, "-m", "longtake", *map(str, command)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=200, check=True)
    assert re.fullmatch(r"sampling  2/2  .* ETA 0:00\n", done.stderr)
    assert done.stdout == f"{tmp_path / 'clip.mp4'}\n"


def test_without_a_command_the_help_is_shown() -> None:
    outcome = run()
    assert outcome.status == 0
    assert "Usage: longtake" in outcome.out
    for command in ("init", "inspect", "doctor", "prepare", "train", "sample", "export", "push", "demo"):
        assert f"  {command} " in outcome.out
        assert f"Usage: longtake {command}" in run(command, "--help").out


def test_a_command_that_does_not_exist_names_the_nearest() -> None:
    outcome = run("trian")
    assert outcome.status == 2
    assert outcome.errors == [
        "longtake: No such command 'trian'. Did you mean 'train'?; see `longtake --help` [command-wrong]"
    ]


def test_inspect_prints_a_table_and_json(tiny_root: Callable[[str], Path]) -> None:
    root = tiny_root("tiny-i2v")
    found = json.loads(succeed("inspect", root, "--json").out)
    lines = dict(line.split(None, 1) for line in succeed("inspect", root).out.splitlines() if " " in line.strip())
    assert found["task"] == lines["task"] == "i2v"
    assert found.keys() >= {"variant", "task", "parameters", "dtype", "layout"}
