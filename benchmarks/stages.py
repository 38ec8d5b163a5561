"""What the encoders take of the operating system on the CPU, against the plan; and how long the plan of them takes.

    python benchmarks/stages.py

Each VAE encodes and decodes one clip of noise, with random weights, in a process of its own whose greatest resident
size (VmHWM) is read, less its size before the VAE was built. The plan is `planner.stages` for the CPU. The seconds are
those of all encoders' plans for one bucket of the published models, in a new process, beyond the imports.
"""

import argparse
import gc
import os
import subprocess
import sys
import time
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLWan

from longtake.memory_gauge import MemoryGauge
from longtake.models.wan.encoders import decode_latents, encode_video
from longtake.models.wan.variants import variant
from longtake.planner import encoders, stages

CPU = torch.device("cpu")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
"""Of a measured process. glibc maps every allocation from the threshold on, and unmaps it when it is freed."""


@dataclass(frozen=True)
class Case:
    """A model whose VAE is measured, and the clip: frames, height, width."""

    model: str
    bucket: tuple[int, int, int]

    @property
    def arguments(self) -> list[str]:
        """Of the process that measures it."""
        return ["--measure", self.model, *map(str, self.bucket)]


MEASURED = (
    Case("wan2.1-t2v-1.3b", (9, 128, 128)),
    Case("wan2.1-t2v-1.3b", (17, 96, 160)),
    Case("wan2.2-ti2v-5b", (9, 64, 64)),
    Case("tiny-t2v", (17, 192, 320)),
    Case("tiny-ti2v", (17, 192, 320)),
)
TIMED = (
    Case("wan2.1-i2v-14b-480p", (129, 480, 832)),
    Case("wan2.1-i2v-14b-720p", (81, 720, 1280)),
    Case("wan2.2-ti2v-5b", (121, 704, 1280)),
)


def measure(case: Case) -> tuple[int, int]:
    """Bytes at the peak of encoding and of decoding, in this process."""
    config = {key: value for key, value in encoders.vae(variant(case.model)).config.items() if key[0] != "_"}
    _round_trip(_vae(config | {"base_dim": 8, "decoder_base_dim": 8}), (9, 64, 64))  # libraries load their code
    gc.collect()
    gauge = MemoryGauge(CPU)
    vae = _vae(config)
    gauge.begin_stage()
    latents = encode_video(vae, torch.rand(1, 3, *case.bucket) * 2 - 1)
    encoded = gauge.stage_peak()[0]
    gauge.begin_stage()
    decode_latents(vae, latents)
    return encoded, gauge.stage_peak()[0]


def plan(case: Case) -> float:
    """Seconds for all encoders of a bucket; prints what they need."""
    started = time.perf_counter()
    found = [*stages.prepare_peaks(variant(case.model), [case.bucket])]
    found += stages.sampling_peaks(variant(case.model), case.bucket, 0)
    seconds = time.perf_counter() - started
    needs = ", ".join(f"{each.stage} {each.what} {each.device_bytes / 2**30:.2f}" for each in found)
    print(f"{case.model}: {seconds:.2f} s; GiB: {needs}")
    return seconds


def _vae(config: dict[str, object]) -> AutoencoderKLWan:
    return AutoencoderKLWan(**config).eval().requires_grad_(False)


def _round_trip(vae: AutoencoderKLWan, bucket: tuple[int, int, int]) -> None:
    decode_latents(vae, encode_video(vae, torch.zeros(1, 3, *bucket)))


def _child(*arguments: str) -> str:
    command = [sys.executable, __file__, *arguments]
    return subprocess.run(command, env=os.environ | ENVIRONMENT, check=True, text=True, stdout=subprocess.PIPE).stdout


def _row(case: Case) -> str:
    chosen = variant(case.model)
    measured = [int(text) for text in _child(*case.arguments).split()]
    peaks = [peak(chosen, case.bucket, "cpu") for peak in (stages.vae_encode_peak, stages.vae_decode_peak)]
    cells = [
        f"{peak.peak_bytes / 2**20:.0f} | {found / 2**20:.0f} | {found / peak.peak_bytes:.3f}"
        for peak, found in zip(peaks, measured, strict=True)
    ]
    frames, height, width = case.bucket
    return f"| {case.model} | {width}x{height}x{frames} | {' | '.join(cells)} |"


def main() -> None:
    """The table, and the seconds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--plan", nargs=4, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    for values, run in ((chosen.measure, lambda case: print(*measure(case))), (chosen.plan, plan)):
        if values:
            model, *bucket = values
            run(Case(model, tuple(int(side) for side in bucket)))
            return
    print("| VAE of | clip | encoding planned, MiB | measured | ratio | decoding planned, MiB | measured | ratio |")
    print("|---|---|--:|--:|--:|--:|--:|--:|")
    for case in MEASURED:
        print(_row(case))
    for case in TIMED:
        print(_child("--plan", *case.arguments[1:]), end="")


if __name__ == "__main__":
    main()
