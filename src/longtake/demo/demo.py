"""`longtake demo`: real clips, prepared, learnt and sampled with the bundled tiny model, in minutes on a CPU."""

import json
import time
from itertools import count
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from longtake import files
from longtake.config.dump import to_toml
from longtake.config.load import load_config
from longtake.config.schema import (
    DataConfig,
    LoraConfig,
    MemoryStrategy,
    ModelConfig,
    OutputConfig,
    RunConfig,
    SampleConfig,
    TrainingConfig,
    ValidationConfig,
)
from longtake.data.encode import component_root, prepare
from longtake.data.video import Window, read_clip, write_clip
from longtake.demo.clips import draw_clips, film, shots
from longtake.progress import Reporter
from longtake.training.metrics import FILE, read_metrics
from longtake.training.model import find_model
from longtake.training.outputs import ADAPTER
from longtake.training.run import train
from longtake.units import format_seconds
from longtake.web.report import write_report

UNSEEN_STARTS = (36.0, 84.5, 382.0, 446.5)
"""The shots that the bundled model was not trained on: there is something to learn from them."""
SIZE = (160, 96)
FRAMES = 17
TRAINED_FROM = (0, 12, 24)
HELD_FROM = 60
"""First frames of the windows of a shot that are trained on, and of the one that is held out."""
STEPS = 100


def run_demo(out: Path, reporter: Reporter) -> list[str]:
    """Works in `out` and returns the lines that say what came of it: paths, and what was learnt."""
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    config_path = write_demo(out, reporter)
    config = load_config(config_path)
    model_files = find_model(config, reporter.line)
    root = component_root(model_files, "model.components")
    prepare(config, model_files.variant.spec, root, torch.device("cpu"), reporter, (0, 1))
    run = train(config, resume=False, reporter=reporter)
    page = write_report(run)
    losses = [line["validation_loss"] for line in read_metrics(run / FILE) if "validation_loss" in line]
    change = 100 * (losses[-1] / losses[0] - 1)
    before, *_, after = sorted((run / "samples").glob("*.mp4"))
    took = format_seconds(time.monotonic() - started)
    return [
        f"video:   {after}  (before training: {before})",
        f"report:  {page}",
        f"adapter: {run / ADAPTER}",
        f"config:  {config_path}",
        f"learnt:  held-out loss {losses[0]:.4f} -> {losses[-1]:.4f} ({change:+.0f} %) in {took}",
    ]


def write_demo(out: Path, reporter: Reporter) -> Path:
    """Writes clips, metadata, a first frame and the config into `out`; returns the config's path."""
    clips = out / "clips"
    clips.mkdir(exist_ok=True)
    rows = _film_clips(clips, reporter)
    _write_rows(clips / "training.jsonl", [_window(row, first) for row in rows for first in TRAINED_FROM])
    _write_rows(clips / "held-out.jsonl", [_window(row, HELD_FROM) for row in rows])
    image = out / "first-frame.png"
    _write_first_frame(clips / rows[0]["video"], image)
    name = next(name for number in count(1) if not (out / (name := f"run-{number}")).exists())
    config = RunConfig(
        model=ModelConfig(name="tiny-i2v", dtype="fp32"),
        data=DataConfig(
            source="clips/training.jsonl",
            validation="clips/held-out.jsonl",
            cache="cache",
            num_frames=FRAMES,
            size=SIZE,
        ),
        lora=LoraConfig(rank=16, alpha=16.0),
        training=TrainingConfig(
            steps=STEPS,
            global_batch_size=4,
            micro_batch_size=4,
            precision="fp32",
            learning_rate=2e-3,
            warmup_steps=10,
            sigmas="uniform",
        ),
        memory=MemoryStrategy(gradient_checkpointing="none"),
        validation=ValidationConfig(
            every=STEPS,
            samples=(SampleConfig(prompt=rows[0]["caption"], image=image.name),),
            sample_steps=20,
            guidance_scale=1.0,
        ),
        output=OutputConfig(run=name, save_every=50),
    )
    path = out / f"{name}.toml"
    files.write_text(path, to_toml(config, comments=True))
    return path


def _film_clips(folder: Path, reporter: Reporter) -> list[dict[str, Any]]:
    """The shots as small clips of their own; drawn clips where the film cannot be had."""
    path = film(reporter.line)
    if path is None:
        reporter.line("the demo draws its own clips instead")
        return draw_clips(folder)
    chosen = [shot for shot in shots() if shot["start"] in UNSEEN_STARTS]
    rows = []
    with reporter.bar("cutting clips", len(chosen), "clips") as advance:
        for done, shot in enumerate(chosen, 1):
            clip = folder / f"shot-{shot['start']:05.1f}.mp4"
            if not clip.exists():
                window = Window(shot["start"], shot["frames"], shot["fps"])
                frames = read_clip(path.resolve(), window, (2 * SIZE[0], 2 * SIZE[1]))
                files.write_file(clip, lambda staged, frames=frames: write_clip(frames, staged, 16))  # type: ignore[misc]
            rows.append({**shot, "video": clip.name, "start": 0.0})
            advance(done, "")
    return rows


def _window(row: dict[str, Any], first: int) -> dict[str, Any]:
    return {**row, "start": first / row["fps"], "frames": FRAMES}


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    files.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _write_first_frame(clip: Path, image: Path) -> None:
    """The first frame of the held-out window of `clip`, from which the demo's video starts."""
    frame = read_clip(clip.resolve(), Window(HELD_FROM / 16, 1, 16.0), SIZE)[0]
    files.write_file(image, lambda staged: Image.fromarray(frame.permute(1, 2, 0).numpy()).save(staged, format="PNG"))
