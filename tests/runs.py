"""Small runs for tests: clips that are drawn, a cache that is filled once, and configs over both."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

import clips
from longtake.config.schema import RunConfig
from longtake.data.cache import Manifest
from longtake.data.encode import prepare
from longtake.models.spec import ModelSpec
from longtake.models.wan.variants import variant
from longtake.progress import Reporter, TimeLeft
from longtake.training.metrics import FILE, read_metrics
from longtake.training.run import train

SIDE = 32
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Scene:
    """A tiny model, drawn clips and the folder of their cache; the runs over it are the tests' own."""

    model: str
    root: Path
    source: Path
    cache: Path

    @property
    def spec(self) -> ModelSpec:
        """Of the model."""
        return variant(self.model).spec

    def config(self, run: Path, **sections: dict[str, Any] | None) -> RunConfig:
        """Two LoRA steps in fp32 at five frames; `sections` change keys, `lora=None` trains all weights."""
        table: dict[str, Any] = {
            "model": {"path": str(self.root), "name": self.model, "dtype": "fp32"},
            "data": {"source": str(self.source), "cache": str(self.cache), "num_frames": 5, "size": (SIDE, SIDE)},
            "lora": {"rank": 2, "alpha": 2.0},
            "training": {"steps": 2, "global_batch_size": 2, "precision": "fp32", "warmup_steps": 0},
            "output": {"run": str(run), "save_every": 1},
        }
        for name, changes in sections.items():
            table[name] = None if changes is None else {**table.get(name, {}), **changes}
        return RunConfig.model_validate(table)

    def prepare(self, config: RunConfig, reporter: Reporter | None = None, ranks: tuple[int, int] = (0, 1)) -> Manifest:
        """Fills the cache for `config`."""
        return prepare(config, self.spec, self.root, CPU, reporter or Reporter(quiet=True), ranks)

    def train(self, config: RunConfig, resume: bool = False, reporter: Reporter | None = None) -> Path:
        """Prepares and trains."""
        self.prepare(config)
        return train(config, resume, reporter or Reporter(quiet=True))


class Recorder(Reporter):
    """A silent reporter that keeps its lines."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        """Keeps it."""
        self.lines.append(text)

    def having(self, part: str) -> list[str]:
        """The lines with `part` in them."""
        return [line for line in self.lines if part in line]


class Stopper(Recorder):
    """Sends this process SIGTERM when `step` steps are done."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def bar(
        self, title: str, total: int, unit: str, done: int = 0, left: TimeLeft = lambda _done: None
    ) -> AbstractContextManager[Callable[[int, str], None]]:
        """A bar that stops the run."""
        return _stopping(self.step)


@contextmanager
def _stopping(step: int) -> Iterator[Callable[[int, str], None]]:
    def advance(done: int, _text: str) -> None:
        if done == step:
            os.kill(os.getpid(), signal.SIGTERM)

    yield advance


def learnt(run: Path) -> list[dict[str, Any]]:
    """The run's log without clocks and memory."""
    values = ("step", "loss", "grad_norm", "learning_rate", "validation_loss", "num_frames", "scale", "skipped")
    return [{key: line[key] for key in values if key in line} for line in read_metrics(run / FILE)]


def assert_same_run(one: Path, other: Path, step: int) -> None:
    """Adapter, log and the checkpoint of `step`, the last one, are the same to the bit."""
    checkpoint = f"checkpoints/step-{step:08d}"
    parts = sorted(path.name for path in (one / checkpoint).iterdir())
    assert parts == sorted(path.name for path in (other / checkpoint).iterdir())
    for name in ("adapter.safetensors", *(f"{checkpoint}/{part}" for part in parts)):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert learnt(one) == learnt(other)


def scene(model: str, root: Path, folder: Path, count: int = 4, frames: int = 24) -> Scene:
    """`count` drawn clips in `folder`, captioned `clip 0` and so on."""
    source = folder / "clips"
    source.mkdir(parents=True)
    for index in range(count):
        draw_clip(source / f"{index}.mp4", index, frames)
    return Scene(model, root, source, folder / "cache")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file in `folder` by its name."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def with_a_clip_that_breaks_off(scene: Scene) -> Scene:
    """Adds a clip that is sound where it is looked at first and damaged where it is read, and a copy of it."""
    # what is sound is over within a window's four sixteenths of a second, wherever it begins
    times = [*range(0, 240, 6), *range(240, 10240, 62)]
    good = clips.write(scene.source / "broken.mp4", _bars(90, len(times)), milliseconds=times)
    content = bytearray(good.read_bytes())
    with av.open(str(good)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    for position, size in packets[40:]:  # FFmpeg's threads read up to 16 ahead of what is asked for
        content[position : position + size] = bytes(size)
    for name in ("broken", "copy"):
        (scene.source / f"{name}.mp4").write_bytes(content)
        (scene.source / f"{name}.txt").write_text(name)
    return scene


def draw_clip(path: Path, index: int, frames: int = 24) -> Path:
    """A clip of bars that move to the right, no two of them alike, and its caption."""
    clips.write(path, _bars(index, frames), fps=16)
    path.with_suffix(".txt").write_text(f"clip {index}")
    return path


def _bars(index: int, frames: int) -> np.ndarray:
    time, row, column = np.mgrid[:frames, :SIDE, :SIDE]
    bars = (column * (3 + index) - time * 5 + row * index) % 64 * 3 + 20
    return np.stack([bars, bars[:, ::-1], 255 - bars], axis=-1).astype(np.uint8)
