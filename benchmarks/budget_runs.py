"""Whole CPU runs under a budget that their plan says they keep: planned beside measured peak, ten configurations.

    python benchmarks/budget_runs.py

For each configuration a plan without a budget gives the strategies worth having; the budget is what one of them needs,
and one per cent more. `longtake train --budget` then plans again, trains two steps in a process of its own, and its
`metrics.jsonl` says what the process took at its peak, less its size before the model was built.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np

from longtake.config.dump import to_toml
from longtake.config.load import load_config
from longtake.config.schema import RunConfig
from longtake.models.libraries import quiet_libraries
from longtake.planner.planning import plan
from longtake.planner.request import Where, request_of

MIB = 2**20
CLIPS = 4
MARGIN = 1.01


@dataclass(frozen=True)
class Case:
    """A configuration; `place` says which of the plans' needs its budget is, counted from the fastest on."""

    model: str
    method: str
    precision: str
    frames: int
    size: tuple[int, int]
    micro_batch_size: int
    place: int

    def __str__(self) -> str:
        width, height = self.size
        clips = f"micro-batch {self.micro_batch_size}"
        return f"{self.model}, {self.method}, {self.precision}, {width}x{height}x{self.frames}, {clips}"


CASES = (
    Case("tiny-t2v", "lora", "fp32", 17, (320, 192), 4, 0),
    Case("tiny-t2v", "lora", "fp32", 33, (320, 192), 2, 1),
    Case("tiny-t2v", "full", "fp32", 33, (320, 192), 1, 0),
    Case("tiny-t2v", "lora", "bf16", 33, (320, 192), 2, 0),
    Case("tiny-i2v", "lora", "fp32", 33, (320, 192), 2, 0),
    Case("tiny-i2v", "full", "fp32", 17, (320, 192), 4, 2),
    Case("tiny-i2v", "lora", "bf16", 49, (320, 192), 1, 1),
    Case("tiny-ti2v", "lora", "fp32", 49, (320, 192), 4, 0),
    Case("tiny-ti2v", "full", "bf16", 49, (320, 192), 2, 1),
    Case("tiny-flf2v", "lora", "fp32", 33, (320, 192), 2, 2),
)


def config_of(case: Case, folder: Path) -> RunConfig:
    """Two steps of four clips each; the strategy is the planner's to choose."""
    table: dict[str, Any] = {
        "model": {"name": case.model, "dtype": case.precision},
        "data": {
            "source": str(folder / "clips"),
            "cache": str(folder / f"cache-{case.model}-{case.frames}"),
            "validation": 0.0,
            "num_frames": case.frames,
            "size": list(case.size),
        },
        "lora": {"rank": 8, "alpha": 8.0} if case.method == "lora" else None,
        "training": {
            "steps": 2,
            "warmup_steps": 0,
            "global_batch_size": CLIPS,
            "micro_batch_size": case.micro_batch_size,
            "precision": case.precision,
        },
        "output": {"run": str(folder / "runs" / str(abs(hash(case))))},
    }
    return RunConfig.model_validate({name: section for name, section in table.items() if section is not None})


def write_config(config: RunConfig, path: Path) -> Path:
    """Without its [memory], which is left open."""
    text = to_toml(config)
    before, _, rest = text.partition("[memory]\n")
    path.write_text(before + rest.partition("\n\n")[2])
    return path


def budget_bytes(case: Case, file: Path) -> int:
    """What one of the plans needs, and a little more."""
    request, _ = request_of(load_config(file), Where("cpu"))
    plans = [each for each in plan(request).plans if each.fits]
    return int(MARGIN * plans[min(case.place, len(plans) - 1)].peak_bytes["device"])


@dataclass(frozen=True)
class Row:
    """Bytes of one run."""

    case: Case
    budget: int
    planned: int
    measured: int

    @property
    def kept(self) -> bool:
        """Whether the run stayed below its budget."""
        return self.measured <= self.budget

    def __str__(self) -> str:
        shown = " | ".join(f"{value / MIB:.0f}" for value in (self.budget, self.planned, self.measured))
        return f"| {self.case} | {shown} | {self.measured / self.planned:.3f} |"


def rows(cases: Sequence[Case], folder: Path) -> Iterator[Row]:
    """Prepares and trains each case."""
    longest = max(case.frames for case in cases)
    write_clips(folder / "clips", longest, cases[0].size)
    for index, case in enumerate(cases):
        config = config_of(case, folder)
        file = write_config(config, folder / f"case-{index}.toml")
        _longtake("prepare", file)
        budget = budget_bytes(case, file)
        _longtake("train", file, "--budget", f"{budget / MIB:.2f}MiB")
        lines = [json.loads(line) for line in (Path(config.output.run) / "metrics.jsonl").read_text().splitlines()]
        steps = [line for line in lines if "loss" in line]
        yield Row(case, budget, steps[-1]["planned_peak_bytes"], max(line["device_peak_bytes"] for line in steps))


def write_clips(folder: Path, frames: int, size: tuple[int, int]) -> None:
    """Moving bars with captions."""
    folder.mkdir(parents=True)
    width, height = size
    time, row, column = np.mgrid[:frames, :height, :width]
    for index in range(CLIPS):
        grey = (column * (3 + index) - time * 5 + row * index) % 64 * 3 + 20
        pixels = np.stack([grey, grey[:, ::-1], 255 - grey], axis=-1).astype(np.uint8)
        with av.open(str(folder / f"{index}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=24)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for picture in pixels:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
        (folder / f"{index}.txt").write_text(f"bars, number {index}")


def _longtake(*arguments: object) -> None:
    command = [sys.executable, "-m", "longtake", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)


def main() -> None:
    """Prints the table; the exit status is 1 where a run exceeded its budget."""
    argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0]).parse_args()
    print("| configuration | budget, MiB | planned, MiB | measured, MiB | measured / planned |")
    print("|---|--:|--:|--:|--:|")
    quiet_libraries()
    kept = True
    with tempfile.TemporaryDirectory() as folder:
        for row in rows(CASES, Path(folder)):
            print(row, flush=True)
            kept = kept and row.kept
    sys.exit(not kept)


if __name__ == "__main__":
    main()
