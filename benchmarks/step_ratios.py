"""How many times as long a step takes under one strategy as under another: planned, and measured on the CPU.

    OMP_NUM_THREADS=1 python benchmarks/step_ratios.py

A small fp32 Wan transformer with a LoRA is trained by each way in turn, round after round, in one process. What is
compared is each way's seconds over those of another in the same round, the median of the rounds, with the ratio of the
two steps that the planner composes and simulates for this machine (`planner.hardware.measure_cpu`). One thread, since
the copies to and from the disk have threads of their own. Seconds are those that passed less those in which the thread
waited for a core that another program had, as Linux counts them: waits for copies count, and a busy machine's do not.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from process_memory import LORA, TINY, Size, Training, training, write_weights

from longtake.config.schema import MemoryStrategy, TrainingConfig
from longtake.distributed.backend import SingleDevice
from longtake.memory.strategy import apply
from longtake.planner.hardware import Device, measure_cpu
from longtake.planner.load import Load
from longtake.planner.meta_model import Subject
from longtake.planner.plans import Bucket
from longtake.planner.timeline import simulate
from longtake.planner.tracer import Tracer
from longtake.training.batch import summed_loss

SIZE = Size(layers=4, heads=6, latents=(10, 32, 32), clips=1)
"""2,560 tokens a clip."""
ROUNDS = 5
MEASURED_SECONDS = 0.5
"""For each rate of this machine, the best of which counts: others want its cores."""
TOLERANCE = 0.15
"""Greatest difference of a measured ratio from the planned one, relative to that."""
BLOCK = "block"
SCHEDULED = Path("/proc/thread-self/schedstat")
"""Nanoseconds that this thread ran, and that it was ready and did not (Documentation/scheduler/sched-stats.rst)."""


@dataclass(frozen=True)
class Way:
    """A strategy, and a step of `micro_batches` micro-batches of `clips` clips; compared with the way `against`."""

    strategy: Mapping[str, Any] = field(default_factory=dict)
    clips: int = 1
    micro_batches: int = 1
    against: str = BLOCK

    @property
    def memory(self) -> MemoryStrategy:
        """The strategy, checked."""
        return MemoryStrategy(**self.strategy)


def ways(layers: int) -> dict[str, Way]:
    """By the names in the table; the first is what most are compared with."""
    swap = {"block_swap": layers, "block_swap_from": "disk"}
    inputs = {"activation_offload": "disk"}
    keep = {"gradient_checkpointing": "block_keep_attention"}
    return {
        BLOCK: Way(),
        "no checkpointing": Way({"gradient_checkpointing": "none"}),
        "attention kept": Way(keep),
        "attention kept, all to disk": Way(keep | inputs),
        "inputs to disk": Way(inputs),
        "weights on disk": Way(swap),
        "4 slices": Way({"slices": 4}),
        "16 slices": Way({"slices": 16}),
        "16 slices, all on disk": Way({"slices": 16} | inputs | swap),
        "two micro-batches of 1 clip": Way(micro_batches=2),
        "one micro-batch of 2 clips": Way(clips=2, against="two micro-batches of 1 clip"),
    }


@dataclass(frozen=True)
class Row:
    """A way, its seconds and those planned, and how many times those of the way `against` both are."""

    name: str
    against: str
    planned_seconds: float
    measured_seconds: float
    planned: float
    measured: float

    @property
    def agrees(self) -> bool:
        """Whether the measured ratio is the planned one, to TOLERANCE."""
        return abs(self.measured - self.planned) <= TOLERANCE * self.planned

    def __str__(self) -> str:
        shown = f"{self.planned_seconds:.2f} | {self.measured_seconds:.2f} | {self.planned:.3f} | {self.measured:.3f}"
        return f"| {self.name} | {self.against} | {shown} | {self.measured / self.planned:.3f} |"


def planned_seconds(size: Size, device: Device) -> dict[str, float]:
    """Of a step of each way on `device`."""
    subject = Subject(
        replace(TINY, spec=size.spec, transformer_config=size.config),
        LORA,
        TrainingConfig(precision="fp32"),
        dtype="fp32",
        device_type="cpu",
    )
    tracer = Tracer(subject)
    return {name: _planned(tracer, way, _bucket(size), device) for name, way in ways(size.layers).items()}


def measured_seconds(size: Size, rounds: int, folder: Path) -> dict[str, list[float]]:
    """Of a step of each way in each round, after one that is not counted; `folder` takes weights and offloaded bytes.

    All models are there from the start, so that a round is steps and nothing else.
    """
    write_weights(size, folder / "weights")
    with ExitStack() as stack:
        own = {name: _prepared(size, way, folder, stack) for name, way in ways(size.layers).items()}
        for name, way in ways(size.layers).items():
            _timed(own[name], way)
        seconds: dict[str, list[float]] = {name: [] for name in own}
        for _ in range(rounds):
            for name, way in ways(size.layers).items():
                seconds[name].append(_timed(own[name], way))
    return seconds


def rows(size: Size, device: Device, rounds: int, folder: Path) -> Iterator[Row]:
    """One for each way but the first."""
    planned, measured = planned_seconds(size, device), measured_seconds(size, rounds, folder)
    for name, way in ways(size.layers).items():
        if name == BLOCK:
            continue
        other = way.against
        ratios = [mine / its for mine, its in zip(measured[name], measured[other], strict=True)]
        ratio = planned[name] / planned[other]
        yield Row(name, other, planned[name], median(measured[name]), ratio, median(ratios))


def _bucket(size: Size) -> Bucket:
    """Whose latents are those of `size`."""
    frames, height, width = size.latents
    spatial, temporal = size.spec.spatial_stride, size.spec.temporal_stride
    return (frames - 1) * temporal + 1, height * spatial, width * spatial


def _planned(tracer: Tracer, way: Way, bucket: Bucket, device: Device) -> float:
    step = tracer.composed(way.memory, Load(bucket, way.clips, way.micro_batches > 1))
    passes, update = simulate(step.micro_batch, device), simulate(step.update, device)
    return way.micro_batches * passes.seconds + update.seconds


def _prepared(size: Size, way: Way, folder: Path, stack: ExitStack) -> Training:
    given = training(replace(size, clips=way.clips), way.memory, folder / "weights")
    scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder)))
    stack.enter_context(apply(given.transformer, given.spec, way.memory, scratch, given.files))
    return given


def _timed(given: Training, way: Way) -> float:
    """Seconds of a step, as `training.trainer.Trainer` does it."""
    started, queued = time.perf_counter(), _queued_seconds()
    backend = SingleDevice(given.transformer, given.parameters, given.optimizer, fp16=False)
    for _ in range(way.micro_batches):
        backend.backward(summed_loss(given.transformer, given.spec, given.batch) / way.micro_batches)
    backend.clip(1.0)
    backend.step(skip=False)
    return time.perf_counter() - started - (_queued_seconds() - queued)


def _queued_seconds() -> float:
    """How long this thread has waited for a core so far; 0 where the system does not say."""
    return int(SCHEDULED.read_text().split()[1]) / 1e9 if SCHEDULED.exists() else 0.0


def main() -> None:
    """Prints the table; the exit status is 1 where a ratio is off."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"of all ways in turn; {ROUNDS} without it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = measure_cpu("fp32", MEASURED_SECONDS)
    print("| | against | planned, s | measured, s | ratio planned | ratio measured | of that |")
    print("|---|---|--:|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as folder:
        found = [*rows(SIZE, device, options.rounds, Path(folder))]
    print(*found, sep="\n")
    print(f"\n{SIZE}, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}, {options.rounds} rounds")
    rates = device.tensor_flops, device.memory_bytes_per_second, device.host_bytes_per_second
    print("measured here: {:.1f} GFLOP/s, {:.1f} and {:.1f} GB/s".format(*(rate / 1e9 for rate in rates)))
    sys.exit(not all(row.agrees for row in found))


if __name__ == "__main__":
    main()
