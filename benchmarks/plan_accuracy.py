"""Bytes that the planner says a training step takes, against what the operating system counts when it is run.

    python benchmarks/plan_accuracy.py [--only NAME ...]

Each case is a small Wan transformer, a batch and a memory strategy. It is planned as a large model is, from a recording
of three blocks on `meta` tensors, and then one step (forward, loss and backward of every micro-batch, clipping, the
optimiser) is run on the CPU in a process of its own, whose greatest resident size (VmHWM) is read. On the CPU host
and device are one memory, so what is planned is the sum of both; what is on disk is not the process's.
"""

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accuracy_cases import CASES, HEAD_DIM, Case
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from process_memory import AT_A_TIME, CPU, ENVIRONMENT
from torch import Tensor, nn

from longtake.distributed.backend import SingleDevice
from longtake.memory.optimizer_offload import OffloadedAdamW
from longtake.memory.strategy import apply
from longtake.memory_gauge import MemoryGauge
from longtake.models.wan.conditioning import Conditioning
from longtake.planner.load import Load
from longtake.planner.meta_model import Subject, build, meta_batch
from longtake.planner.tracer import Tracer
from longtake.training.batch import Batch, summed_loss
from longtake.training.optimizer import allocate_states, build_optimizer, trained_parameters
from longtake.training.precision import compute_in

FP32_MEDIAN, FP32_WORST, FP32_UNDER, BF16_WORST = 0.02, 0.06, 0.02, 0.12
"""Greatest differences, relative to what was planned; FP32_UNDER is how much more than planned may be measured."""


@dataclass(frozen=True)
class Planned:
    """Bytes of device and host, and how long it took to plan them."""

    nbytes: int
    seconds: float


def planned(case: Case) -> Planned:
    """From a recording of three blocks, or of all where several are checkpointed together."""
    started = time.perf_counter()
    load = Load(case.bucket, case.clips, case.micro_batches > 1)
    step = Tracer(case.subject).composed(case.memory, load)
    return Planned(step.peak_bytes + step.host_bytes, time.perf_counter() - started)


@dataclass(frozen=True)
class Measured:
    """Bytes that the process grew by at its peak, and the step's seconds of processor time."""

    nbytes: int
    seconds: float


def measured(name: str) -> Measured:
    """VmHWM during a step of the case `name` in a new process, less its resident size before it built the model."""
    command = [sys.executable, __file__, "--child", name]
    child = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=False)
    if child.returncode:
        raise RuntimeError(child.stderr)
    return Measured(**json.loads(child.stdout))


def of_this_process(case: Case) -> Measured:
    """`measured` of this process, which must be new."""
    _run(case.warm_up, MemoryGauge(CPU))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _run(case, MemoryGauge(CPU))


def _run(case: Case, gauge: MemoryGauge) -> Measured:
    """A step, as `training.trainer.Trainer` does it."""
    torch.manual_seed(0)
    subject = case.subject
    transformer = with_values(subject)
    parameters = trained_parameters(transformer)
    optimizer = build_optimizer(parameters, subject.training, case.memory)
    offloaded = isinstance(optimizer, OffloadedAdamW)
    if not offloaded:
        allocate_states(optimizer)
    backend = SingleDevice(transformer, parameters, optimizer, fp16=False)
    with (
        tempfile.TemporaryDirectory() as scratch,
        closing(optimizer) if offloaded else nullcontext(),
        apply(transformer, subject.spec, case.memory, Path(scratch)),
    ):
        gauge.begin_stage()
        started = time.process_time()
        for _ in range(case.micro_batches):
            batch = batch_of(case)
            with compute_in(transformer, subject.spec, subject.training.precision, CPU):
                loss = summed_loss(transformer, subject.spec, batch) / subject.training.global_batch_size
                backend.backward(loss)
        assert backend.clip(subject.training.clip_norm) > 0
        backend.step(skip=False)
        # before the strategy is taken off, which reads weights back from the disk
        return Measured(gauge.stage_peak()[0], time.process_time() - started)


def with_values(subject: Subject) -> Any:
    """The planned model, on the CPU and with random weights."""
    transformer = build(subject).transformer
    for module in transformer.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                values = torch.empty_like(parameter, device=CPU).normal_(std=0.02)
                module._parameters[name] = nn.Parameter(values, parameter.requires_grad)
    config = transformer.config
    transformer.rope = WanRotaryPosEmbed(HEAD_DIM, config.patch_size, config.rope_max_seq_len)
    return transformer


def batch_of(case: Case) -> Batch:
    """One of random values."""

    def filled(tensor: Tensor | None) -> Any:
        return None if tensor is None else torch.rand(tensor.shape, dtype=tensor.dtype)

    like = meta_batch(case.subject.spec, case.bucket, case.clips)
    conditioning = Conditioning(**{name: filled(value) for name, value in vars(like.conditioning).items()})
    return Batch(*(filled(each) for each in (like.latents, like.noise, like.sigma, like.weights)), conditioning)


@dataclass(frozen=True)
class Row:
    """A case with what was planned and what was measured."""

    name: str
    case: Case
    planned: Planned
    measured: Measured

    @property
    def more(self) -> float:
        """How much more was measured than planned, relative to that."""
        return self.measured.nbytes / self.planned.nbytes - 1

    def __str__(self) -> str:
        case = self.case
        size = f"{case.heads} x {HEAD_DIM}, {case.blocks} | {case.clips} x {case.tokens} x {case.micro_batches}"
        shown = " | ".join(f"{each.nbytes / 2**20:.1f}" for each in (self.planned, self.measured))
        return f"| {self.name} | {size} | {shown} | {1 + self.more:.3f} | {self.measured.seconds:.1f} |"


def rows(names: Iterable[str]) -> Iterator[Row]:
    """All is planned first, because a step beside it would make planning look slow."""
    plans = {name: planned(CASES[name]) for name in names}
    pool = ThreadPoolExecutor(AT_A_TIME)
    try:
        children = [pool.submit(measured, name) for name in plans]
        for (name, plan), child in zip(plans.items(), children, strict=True):
            yield Row(name, CASES[name], plan, child.result())
    finally:
        pool.shutdown(cancel_futures=True)


def disagreements(found: Sequence[Row]) -> list[str]:
    """What is further off than this benchmark allows."""
    fp32 = [row for row in found if row.case.precision == "fp32"]
    bf16 = [row for row in found if row.case.precision == "bf16"]
    wrong = [str(row) for row in fp32 if not -FP32_WORST <= row.more <= FP32_UNDER]
    wrong += [str(row) for row in bf16 if abs(row.more) > BF16_WORST]
    if fp32 and (median := statistics.median(abs(row.more) for row in fp32)) > FP32_MEDIAN:
        wrong.append(f"median of fp32: {median:.3f}")
    return wrong


def main() -> None:
    """Prints the table; the exit status is 1 where plans are off."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--child", help="run this case in this process and print what was measured")
    parser.add_argument("--only", nargs="+", default=[*CASES], choices=CASES, metavar="NAME", help="names of cases")
    options = parser.parse_args()
    if options.child:
        print(json.dumps(vars(of_this_process(CASES[options.child]))))
        return
    print("| case | heads, blocks | clips x tokens x micro-batches | planned, MiB | measured, MiB | ratio | step, s |")
    print("|---|---|---|--:|--:|--:|--:|")
    found = []
    for row in rows(options.only):
        print(row, flush=True)
        found.append(row)
    seconds = statistics.median(row.planned.seconds for row in found)
    print(f"\ntorch {torch.__version__}, load {os.getloadavg()[0]:.1f}, planning a case {seconds:.2f} s (median)")
    for wrong in disagreements(found):
        print(f"off: {wrong}")
    sys.exit(bool(disagreements(found)))


if __name__ == "__main__":
    main()
