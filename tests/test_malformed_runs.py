"""Runs, caches, LoRA files and wishes that do not fit: status 2, one `error:` line a problem, nothing half done."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import clips
from command_line import Outcome, Table, run, small_run, succeed, write_config, wrong


@dataclass(frozen=True)
class Done:
    """A folder with a prepared cache and a finished run of two steps of tiny-i2v, and its config."""

    folder: Path
    table: Table
    root: Callable[[str], Path]

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def config(self, **changes: Any) -> Path:
        return write_config(self.folder / "changed.toml", self.table, changes)

    def named(self, word: str) -> str:
        """`word` with the places that stand for a path in it."""
        places = {"RUN": self.run, "IMAGE": self.folder / "first.png", "T2V": self.root("tiny-t2v")}
        first, slash, rest = word.partition("/")
        return f"{places.get(first, first)}{slash}{rest}"

    def sample(self, *arguments: object) -> Outcome:
        return run("sample", "--prompt", "grey", "--out", self.folder / "out.mp4", *arguments)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_root: Callable[[str], Path]) -> Done:
    folder = tmp_path_factory.mktemp("made")
    (folder / "data").mkdir()
    clips.write(folder / "data" / "a.mp4", clips.levels(20), fps=16)
    (folder / "data" / "a.txt").write_text("grey")
    Image.new("RGB", (40, 30)).save(folder / "first.png")
    table = small_run(tiny_root("tiny-i2v"), folder / "data", folder)
    config = write_config(folder / "run.toml", table)
    succeed("prepare", config)
    succeed("train", config)
    return Done(folder, table, tiny_root)


@pytest.fixture
def done(made: Done, tmp_path: Path) -> Done:
    """A copy of `made` of the test's own."""
    shutil.copytree(made.folder, tmp_path, dirs_exist_ok=True)
    return Done(tmp_path, small_run(made.root("tiny-i2v"), made.folder / "data", tmp_path), made.root)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_cache_that_was_not_prepared(done: Done) -> None:
    shutil.rmtree(done.run)
    config = done.config(data={"cache": str(done.folder / "elsewhere")})
    assert not wrong(run("train", config), "the cache has not been prepared; run `longtake prepare` with this config")
    assert not done.run.exists()


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"size": [48, 32]}, "size [32, 32] instead of [48, 32]"),
        ({"num_frames": 9}, "frames [5] instead of [9]"),
    ],
)
def test_a_cache_from_other_settings_says_which(done: Done, change: dict[str, Any], difference: str) -> None:
    shutil.rmtree(done.run)
    line = f"the cache was prepared with other settings: {difference}; run `longtake prepare` with this config"
    assert not wrong(run("train", done.config(data=change)), line)


def test_a_cache_that_lacks_an_entry_or_was_tampered_with(done: Done) -> None:
    shutil.rmtree(done.run)
    (entry,) = (done.folder / "cache" / "latents").iterdir()
    tensors = load_file(entry)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, entry)
    line = f"{entry.name}: the entry has changed since it was written, of clip data/a.mp4; delete it and run"
    assert not wrong(run("train", done.config()), line)
    entry.write_bytes(b"")
    shutil.rmtree(done.run, ignore_errors=True)
    assert not wrong(run("train", done.config()), f"{entry.name}: the entry cannot be read")
    entry.unlink()
    shutil.rmtree(done.run, ignore_errors=True)
    assert not wrong(run("train", done.config()), "1 of 4 entries are missing; run `longtake prepare` again")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "the run folder is not empty; add --resume to continue it, or set another output.run"),
        (["--resume", "--learning-rate", "0.5"], "training.learning_rate: the run was started with 0.0001, not 0.5; s"),
        (["--resume", "--lora_rank", "3"], "lora.rank: the run was started with 2, not 3; start a new run with it, or"),
        (["--resume", "--set", "training.shift=5"], "training.shift: the run was started with 3.0, not 5"),
        (["--set", "output.run=other", "--resume"], "there is no run to resume; leave out --resume"),
        (["--set", "output.run=other", "--budget", "900TiB"], "memory.budget: the budget is 900.0 TiB and only"),
        (["--set", "output.run=other", "--lora_target_modules", "to_q,zzz"], "zzz"),
        (["--set", "output.run=other", "--set", "model.expert=high"], "model.expert: tiny-i2v has one transformer"),
    ],
)
def test_a_run_that_cannot_begin_leaves_things_as_they_are(done: Done, arguments: list[str], line: str) -> None:
    before = files_of(done.run)
    assert not wrong(run("train", done.config(), *arguments), line)
    assert files_of(done.run) == before
    assert not (done.folder / "other" / "config.toml").exists()


@pytest.mark.parametrize(
    ("sample", "line"),
    [
        ({"prompt": "x", "image": "gone.png"}, "gone.png does not exist"),
        ({"prompt": "x"}, "image: tiny-i2v makes a video from an image, none is given; give one"),
        ({"prompt": "x", "image": "first.png", "last_image": "first.png"}, "last_image: tiny-i2v would ignore the ima"),
    ],
)
def test_a_sample_that_could_not_be_made_is_refused_before_the_first_step(
    done: Done, sample: dict[str, str], line: str
) -> None:
    shutil.rmtree(done.run)
    outcome = run("train", done.config(validation={"samples": [sample], "sample_steps": 2}))
    assert not wrong(outcome, line)
    assert not (done.run / "config.toml").exists()


def test_a_run_folder_below_a_file(done: Done) -> None:
    outcome = run("train", done.config(output={"run": str(done.folder / "first.png" / "run")}))
    assert outcome.status in (1, 2)
    (line,) = outcome.errors
    assert "first.png" in line


def test_checkpoints_that_are_all_damaged(done: Done) -> None:
    for path in done.run.glob("checkpoints/*/trained.safetensors"):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    outcome = run("train", done.config(), "--resume")
    assert not wrong(outcome, "checkpoints: all checkpoints are damaged; start a new run", status=1)
    assert "trained.safetensors has changed since it was written" in outcome.err


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "longtake sample: give either --run or --model; not both, not neither"),
        (["--run", "RUN", "--model", "tiny-i2v"], "longtake sample: give either --run or --model"),
        (["--run", "RUN", "--lora", "RUN/adapter.safetensors"], "--lora: a run has its own adapter; use --model with"),
        (["--run", "RUN/samples-of-none"], "this is no run folder (it has no config.toml); give output.run of a run"),
        (["--run", "RUN"], "image: tiny-i2v makes a video from an image, none is given; give one"),
        (["--run", "RUN", "--image", "gone.png"], "gone.png: gone.png does not exist; correct the path"),
        (["--run", "RUN", "--image", "RUN/metrics.jsonl"], "metrics.jsonl: metrics.jsonl is a damaged image"),
        (["--run", "RUN", "--image", "IMAGE", "--last-image", "IMAGE"], "last_image: tiny-i2v would ignore the image"),
        (["--run", "RUN", "--image", "IMAGE", "--size", "wide"], "--size: cannot read 'wide'; write WIDTHxHEIGHT"),
        (["--run", "RUN", "--image", "IMAGE", "--size", "40x32"], "size: the width 40 does not divide by 16; use 32"),
        (["--run", "RUN", "--image", "IMAGE", "--num-frames", "6"], "num_frames: 6 is not 4n+1; use 5 or 9"),
        (["--run", "RUN", "--image", "IMAGE", "--steps", "0"], "steps: 0 denoising steps make no video"),
        (["--model", "T2V", "--image", "IMAGE"], "image: tiny-t2v would ignore the image; leave it out, or choose a m"),
        (["--model", "gone"], "model.name: there is no model called 'gone'"),
        (["--model", "T2V", "--size", "32x32", "--num-frames", "5", "--lora", "gone"], "gone: there is no such file"),
    ],
)
def test_a_wish_that_cannot_be_fulfilled(done: Done, arguments: list[str], line: str) -> None:
    assert not wrong(done.sample(*(done.named(word) for word in arguments)), line)
    assert not (done.folder / "out.mp4").exists()


def test_a_lora_of_another_model(done: Done) -> None:
    adapter = load_file(done.run / "adapter.safetensors")
    foreign, wide, cut = (done.folder / f"{name}.safetensors" for name in ("foreign", "wide", "cut"))
    key = "lora_unet_down_blocks_0_attentions_0_proj_in.lora"
    save_file({f"{key}_down.weight": torch.zeros(2, 8), f"{key}_up.weight": torch.zeros(8, 2)}, foreign)
    save_file({k: torch.cat([v, v], int("lora_A" in k)) if "lora" in k else v for k, v in adapter.items()}, wide)
    clips.write_truncated(cut, done.run / "adapter.safetensors")
    tiny = ["--model", done.root("tiny-t2v"), "--size", "32x32", "--num-frames", 5, "--lora"]
    assert not wrong(done.sample(*tiny, foreign), "foreign.safetensors: this is a LoRA of another model")
    assert not wrong(done.sample(*tiny, cut), "cut.safetensors: the safetensors file is damaged")
    assert not wrong(
        done.sample(*tiny, done.root("tiny-t2v") / "vae" / "diffusion_pytorch_model.safetensors"), "is no LoRA"
    )
    outcome = done.sample(*tiny, wide)
    assert outcome.status == 2
    assert outcome.errors
    assert not (done.folder / "out.mp4").exists()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--run", "RUN", "--format", "zip"], "--format: there is no format 'zip'; use comfyui, diffusers or kohya"),
        (["--run", "IMAGE", "--format", "comfyui"], "first.png: this is no run folder (it has no config.toml)"),
        (["--run", "RUN", "--format", "kohya", "--merge"], "--format: kohya's format is for adapters; use comfyui or"),
        (["--run", "RUN"], "longtake export: Missing option '--format'"),
    ],
)
def test_an_export_that_cannot_be_made(done: Done, arguments: list[str], line: str) -> None:
    out = done.folder / "out.safetensors"
    assert not wrong(run("export", *(done.named(word) for word in arguments), "--out", out), line)
    assert not out.exists()


def test_an_output_that_cannot_be_written(done: Done) -> None:
    out = done.folder / "first.png" / "below"
    assert not wrong(
        run("export", "--run", done.run, "--format", "kohya", "--out", out), "first.png is no folder", status=1
    )
    wish = ["--run", done.run, "--image", done.folder / "first.png", "--steps", 1, "--prompt", "grey"]
    assert not wrong(run("sample", *wish, "--out", out.with_suffix(".mp4")), "first.png is no folder", status=1)
    line = "--out: a video is written as mp4, not as .gif; name it .mp4"
    assert not wrong(run("sample", *wish, "--out", done.folder / "clip.gif"), line)


def test_a_first_config_that_cannot_be_made(done: Done) -> None:
    taken, free = done.folder / "run.toml", done.folder / "new.toml"
    root = done.root("tiny-i2v")
    data = done.folder / "data"
    assert not wrong(
        run("init", "--model", root, "--data", data, "-o", taken), "run.toml: the file exists; choose another name"
    )
    assert not wrong(run("init", "--model", "wan9", "--data", data, "-o", free), "there is no model called 'wan9'")
    assert not wrong(
        run("init", "--model", root, "--data", done.folder / "gone", "-o", free), "gone: the source does not exist"
    )
    assert not wrong(run("init", "--model", root, "-o", free), "longtake init: Missing option '--data'")
    assert not free.exists()


def test_the_run_that_all_of_this_was_tried_on_is_sound(made: Done) -> None:
    lines = [json.loads(line) for line in (made.run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert "comfyui" in succeed("inspect", made.run / "adapter.safetensors").out
