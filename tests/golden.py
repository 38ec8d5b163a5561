"""Golden losses: short runs whose every input is the same on every machine, and the losses that they had.

`.venv/bin/python tests/golden.py` writes golden.json anew, where the objective has changed on purpose; with names of
models, for these alone. What has changed by how much is printed, and belongs into the message of the commit.
"""

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import av
import numpy as np
import torch

from longtake.data.cache import Cache
from longtake.models.wan.tiny import build_tiny
from longtake.progress import Reporter
from longtake.training.metrics import FILE, read_metrics
from longtake.training.run import train
from runs import Scene

GOLDEN = Path(__file__).with_suffix(".json")
BOUND = 1e-4
"""Of the relative difference: another CPU's kernels add up in another order, and AdamW makes much of what is small.

Without AVX (ATEN_CPU_CAPABILITY=default, MKL_CBWR=COMPATIBLE, ONEDNN_MAX_CPU_ISA=SSE41) 4e-7 was the most here.
"""
FRAMES, SIZE, CLIPS = 9, (64, 32), 4

RUNS: dict[str, dict[str, Any]] = {
    "tiny-t2v": {},
    "tiny-i2v": {"lora": {"targets": ("attention", "ffn", "image")}},
    "tiny-flf2v": {"lora": {"targets": ("attention", "ffn", "image")}},
    "tiny-ti2v": {"training": {"shift": 5.0}},
    "tiny-t2v-a14b": {},
    "tiny-i2v-a14b": {"training": {"shift": 5.0}},
}
"""By the model, what its run has otherwise than `run` says. For another: a line, and `python tests/golden.py NAME`."""

Losses = dict[str, list[float]]


def run(name: str, root: Path, folder: Path) -> Losses:
    """The losses of the steps, and those on the clip that is held out, of a LoRA of the model in `root`."""
    scene = Scene(name, root, folder / "clips", folder / "cache")
    _draw_clips(scene)
    training = {"steps": 20, "learning_rate": 2e-3, "warmup_steps": 4, "loss_weighting": "bell"}
    sections: dict[str, dict[str, Any]] = {
        "data": {"num_frames": FRAMES, "size": SIZE, "validation": 0.25, "caption_dropout": 0.2},
        "lora": {"rank": 4, "alpha": 8.0},
        "training": training,
        "output": {"save_every": 20},
    }
    for section, changes in RUNS[name].items():
        sections[section] = {**sections.get(section, {}), **changes}
    config = scene.config(folder / "run", **sections)
    manifest, cache = scene.prepare(config), Cache(scene.cache)
    # keys are made of files and versions, and noise and what is held out of keys: here all is of the clips' names
    named = [replace(each, latents=f"golden {each.prompt}", clip=each.prompt) for each in manifest.entries]
    for entry, other in zip(manifest.entries, named, strict=True):
        cache.write("latents", other.latents, cache.read("latents", entry.latents))
    cache.write_manifest(replace(manifest, entries=tuple(named)))
    lines = read_metrics(train(config, False, Reporter(quiet=True)) / FILE)
    return {key: [line[key] for line in lines if key in line] for key in ("loss", "validation_loss")}


def farthest(found: Losses, expected: Losses) -> float:
    """The greatest relative difference; infinite where there are more or fewer losses."""
    if {key: len(values) for key, values in found.items()} != {key: len(values) for key, values in expected.items()}:
        return float("inf")
    return max(abs(loss / wanted - 1) for key in found for loss, wanted in zip(found[key], expected[key], strict=True))


def read() -> dict[str, Losses]:
    """The losses that are committed, by the model."""
    return json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}


def _draw_clips(scene: Scene) -> None:
    """Waves that wander, in integers and without compression: the same bytes and pixels wherever they are written."""
    scene.source.mkdir(parents=True)
    time, row, column = np.mgrid[:FRAMES, : SIZE[1], : SIZE[0]]
    for index in range(CLIPS):
        wave = abs((column * (2 + index) + row * (5 - index) - time * 7) % 96 - 48) * 5
        pixels = np.stack([wave, wave[:, ::-1], 250 - wave], axis=-1).astype(np.uint8)
        _write_raw(scene.source / f"{index}.avi", pixels, scene.spec.fps)
        (scene.source / f"{index}.txt").write_text(f"wave {index}")


def _write_raw(path: Path, frames: np.ndarray, fps: int) -> None:
    with av.open(str(path), "w", format="avi", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("rawvideo", rate=fps)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "bgr24"
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="bgr24")
            frame.pts, frame.time_base = index, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def write(names: Iterable[str], say: Callable[[str], None]) -> None:
    """Runs these and replaces their committed losses."""
    torch.set_num_threads(1)
    before, found = read(), read()
    for name in names:
        with TemporaryDirectory() as scratch:
            found[name] = run(name, build_tiny(name, Path(scratch) / "model"), Path(scratch))
        change = farthest(found[name], before[name]) if name in before else float("inf")
        say(f"{name}: from {found[name]['loss'][0]:.4f} to {found[name]['loss'][-1]:.4f}, changed by {change:.1e}")
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    write(sys.argv[1:] or RUNS, print)
