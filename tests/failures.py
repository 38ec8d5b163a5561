"""What the tests of known failures look at runs with: caches, logs, ranks, and what else is in memory."""

import subprocess
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from transformers import CLIPVisionModel, UMT5EncoderModel

import clips
from launched import TESTS, launched
from longtake.config.dump import to_toml
from longtake.training.metrics import FILE, read_metrics
from runs import Scene
from seen import Call


def folder_of_one(folder: Path, height: int = 32, width: int = 32) -> Path:
    """A folder with one clip of just five frames."""
    folder.mkdir()
    clips.write(folder / "one.mp4", clips.quadrants(5, width, height), fps=16)
    (folder / "one.txt").write_text("four colours")
    return folder


def cached(cache: Path, kind: str) -> list[dict[str, torch.Tensor]]:
    """Every entry of a kind."""
    return [load_file(path) for path in sorted((cache / kind).glob("*.safetensors"))]


def steps(folder: Path) -> list[dict[str, Any]]:
    """Of a run's log."""
    return [line for line in read_metrics(folder / FILE) if "loss" in line]


def learning(calls: list[Call]) -> list[Call]:
    return [call for call in calls if call.learning]


@dataclass(frozen=True)
class OnTwoRanks:
    """A run in one process, the same on two ranks of two micro-batches a step, and one that saves under ZeRO-3.

    `said` is what is said of each when it has ended.
    """

    whole: Path
    shared: Path
    saving: Path
    said: list[str]


def trained_on_two_ranks(where: Scene, folder: Path) -> OnTwoRanks:
    """Two runs in one launch, which takes longer than they."""
    training = {"steps": 5, "global_batch_size": 4, "micro_batch_size": 4, "warmup_steps": 2}
    data = {"validation": 0}
    whole = where.train(where.config(folder / "whole", training=training, data=data))
    shared: dict[str, Any] = {"training": training | {"micro_batch_size": 1}, "parallel": {"strategy": "ddp"}}
    saving: dict[str, Any] = {"training": {"steps": 3, "ema": 0.5}, "parallel": {"strategy": "deepspeed_stage_3"}}
    configs = [folder / "shared" / "run.toml", folder / "saving" / "run.toml"]
    for path, sections in zip(configs, (shared, saving), strict=True):
        path.parent.mkdir()
        path.write_text(to_toml(where.config(path.parent / "run", **sections, data=data, output={"keep": 9})))
    try:
        ranks = launched(2, TESTS / "distributed" / "resumed_run.py", *(f"{path},0,0" for path in configs), seconds=200)
        said = ranks.stdout.splitlines() + ranks.stderr.splitlines()
    except subprocess.TimeoutExpired as error:
        said = (error.stdout or b"").decode().splitlines()
    return OnTwoRanks(whole, *(path.parent / "run" for path in configs), said)


@contextmanager
def others_in_memory() -> Iterator[list[int]]:
    """For each pass of a transformer how many encoders are still there that were used before, and the reverse."""
    encoders: dict[int, weakref.ref[nn.Module]] = {}
    transformers: dict[int, weakref.ref[nn.Module]] = {}
    found: list[int] = []

    def see(module: nn.Module, *_: Any) -> None:
        if isinstance(module, UMT5EncoderModel | CLIPVisionModel):
            own, others = encoders, transformers
        elif isinstance(module, WanTransformer3DModel):
            own, others = transformers, encoders
        else:
            return
        own[id(module)] = weakref.ref(module)
        found.append(sum(other() is not None for other in others.values()))

    hook = register_module_forward_hook(see)
    try:
        yield found
        assert encoders
        assert transformers
    finally:
        hook.remove()


class Payload:
    """What runs code when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.folder,)
