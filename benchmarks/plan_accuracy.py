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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from process_memory import AT_A_TIME, CPU, ENVIRONMENT
from torch import Tensor, nn

from longtake.config.schema import LoraConfig, MemoryStrategy, TrainingConfig
from longtake.distributed.backend import SingleDevice
from longtake.memory.optimizer_offload import OffloadedAdamW
from longtake.memory.strategy import apply
from longtake.memory_gauge import MemoryGauge
from longtake.models.wan.conditioning import Conditioning
from longtake.models.wan.variants import variant
from longtake.planner.composition import compose
from longtake.planner.meta_model import Subject, build, meta_batch
from longtake.planner.plans import Bucket
from longtake.planner.recorded import structure_of
from longtake.planner.recording import record
from longtake.planner.update import record_update
from longtake.training.batch import Batch, summed_loss
from longtake.training.optimizer import allocate_states, build_optimizer, trained_parameters
from longtake.training.precision import compute_in

HEAD_DIM = 64
RECORDED_BLOCKS = 3
FP32_MEDIAN, FP32_WORST, FP32_UNDER, BF16_WORST = 0.02, 0.06, 0.02, 0.12
"""Greatest differences, relative to what was planned; FP32_UNDER is how much more than planned may be measured."""


@dataclass(frozen=True)
class Case:
    """A model of `blocks` blocks of `heads` heads, a batch of `clips` clips, `micro_batches` of which make a step.

    `tiny` names the tiny variant whose task, channels and conditioning the model has; `rank` 0 trains all weights.
    """

    tiny: str
    heads: int
    blocks: int
    bucket: Bucket
    clips: int = 1
    micro_batches: int = 1
    rank: int = 8
    precision: Literal["bf16", "fp32"] = "fp32"
    strategy: Mapping[str, Any] = field(default_factory=dict)

    @property
    def memory(self) -> MemoryStrategy:
        """The strategy, checked."""
        return MemoryStrategy(**self.strategy)

    @property
    def subject(self) -> Subject:
        """What is planned, and what is run."""
        found, dim = variant(self.tiny), self.heads * HEAD_DIM
        wide: dict[str, Any] = {"num_attention_heads": self.heads, "attention_head_dim": HEAD_DIM, "ffn_dim": 4 * dim}
        wide |= {"num_layers": self.blocks}
        if found.transformer_config["added_kv_proj_dim"]:
            wide |= {"added_kv_proj_dim": dim}
        spec = replace(found.spec, heads=self.heads, head_dim=HEAD_DIM)
        training = TrainingConfig(
            precision=self.precision,
            micro_batch_size=self.clips,
            global_batch_size=self.clips * self.micro_batches,
        )
        return Subject(
            replace(found, spec=spec, transformer_config=found.transformer_config | wide),
            LoraConfig(rank=self.rank) if self.rank else None,
            training,
            dtype=self.precision,
            device_type="cpu",
        )

    @property
    def tokens(self) -> int:
        """Of a clip."""
        return self.subject.spec.tokens(*self.bucket)

    @property
    def warm_up(self) -> "Case":
        """One block of it: at the first call with operands of a shape libraries make code and buffers and keep them."""
        swap = {"block_swap": 1} if "block_swap" in self.strategy else {}
        return replace(self, blocks=1, micro_batches=1, strategy={**self.strategy, **swap})


_T2V, _I2V, _TI2V = "tiny-t2v", "tiny-i2v", "tiny-ti2v"
_KEEP = {"gradient_checkpointing": "block_keep_attention"}
_NONE = {"gradient_checkpointing": "none"}
_DISK, _HOST = {"activation_offload": "disk"}, {"activation_offload": "host"}
_HALF: dict[str, Any] = {"activation_offload_fraction": 0.5}
_SLICED = {"slices": 4, "attention_head_groups": 2}
_LONG, _SHORT, _STILL = (17, 256, 256), (9, 192, 192), (1, 256, 256)
"""1,280, 432 and 256 tokens at stride 8."""
_TI_LONG = (17, 512, 512)
"""1,280 at stride 16."""


def _swap(blocks: int, place: str) -> dict[str, Any]:
    return {"block_swap": blocks, "block_swap_from": place}


def _cases() -> dict[str, Case]:
    full, bf16 = 0, "bf16"
    mixed: dict[str, Any] = {"precision": "bf16"}
    states8: dict[str, Any] = {"optimizer": "adamw8bit"}
    states_away: dict[str, Any] = {"optimizer_offload": True}
    return {
        "t2v, none": Case(_T2V, 4, 5, _LONG, 2, strategy=_NONE),
        "t2v, none, larger": Case(_T2V, 6, 6, _LONG, 4, strategy=_NONE),
        "t2v, none, short clips": Case(_T2V, 8, 4, _SHORT, 4, 2, strategy=_NONE),
        "t2v, block": Case(_T2V, 6, 4, _LONG, 4),
        "t2v, block, stills": Case(_T2V, 16, 5, _STILL, 1, 2),
        "t2v, every 2 blocks": Case(_T2V, 4, 6, _LONG, 3, strategy={"checkpoint_every": 2}),
        "t2v, attention kept": Case(_T2V, 6, 4, _LONG, 3, strategy=_KEEP),
        "t2v, inputs to disk": Case(_T2V, 6, 4, _LONG, 4, strategy=_DISK),
        "t2v, inputs to host": Case(_T2V, 4, 5, _LONG, 4, 2, strategy=_HOST),
        "t2v, attention kept, all to disk": Case(_T2V, 6, 5, _LONG, 3, strategy=_KEEP | _DISK),
        "t2v, attention kept, half to host": Case(_T2V, 4, 6, _LONG, 4, strategy=_KEEP | _HOST | _HALF),
        "t2v, inputs and weights on disk": Case(_T2V, 16, 5, _SHORT, 2, strategy=_DISK | _swap(5, "disk")),
        "t2v, weights on disk, some": Case(_T2V, 16, 6, _STILL, 2, strategy=_swap(4, "disk")),
        "t2v, slices": Case(_T2V, 12, 4, _LONG, 1, strategy=_SLICED),
        "i2v, none": Case(_I2V, 6, 4, _LONG, 3, strategy=_NONE),
        "i2v, block": Case(_I2V, 6, 4, _LONG, 4),
        "i2v, inputs and weights to host": Case(_I2V, 12, 5, _SHORT, 3, strategy=_HOST | _swap(4, "host")),
        "i2v, slices, all on disk": Case(_I2V, 16, 4, _SHORT, 3, strategy=_DISK | _SLICED | _swap(4, "disk")),
        "ti2v, block": Case(_TI2V, 6, 4, _TI_LONG, 4),
        "ti2v, attention kept, slices, disk": Case(_TI2V, 12, 4, _TI_LONG, 1, strategy=_SLICED | _KEEP | _DISK),
        "t2v full, block": Case(_T2V, 12, 6, _SHORT, 1, rank=full),
        "t2v full, none": Case(_T2V, 8, 5, _SHORT, 4, rank=full, strategy=_NONE),
        "t2v full, block, larger": Case(_T2V, 24, 5, _STILL, 1, rank=full),
        "t2v full, 8-bit states": Case(_T2V, 12, 5, _STILL, 1, 2, full, strategy=states8),
        "t2v full, states in host memory": Case(_T2V, 16, 5, _STILL, 2, rank=full, strategy=states_away),
        "i2v full, inputs to disk": Case(_I2V, 12, 5, _SHORT, 1, 2, full, strategy=_DISK),
        "ti2v full, slices": Case(_TI2V, 12, 5, (9, 384, 384), 2, rank=full, strategy=_SLICED),
        "t2v bf16, none": Case(_T2V, 6, 5, _LONG, 3, **mixed, strategy=_NONE),
        "t2v bf16, block": Case(_T2V, 8, 4, _LONG, 4, **mixed),
        "t2v bf16, block, 16 heads": Case(_T2V, 16, 4, _SHORT, 3, 2, **mixed),
        "t2v bf16, attention kept, disk": Case(_T2V, 8, 4, _LONG, 4, **mixed, strategy=_KEEP | _DISK),
        "i2v bf16, block": Case(_I2V, 8, 4, _LONG, 4, **mixed),
        "i2v bf16, slices, weights on disk": Case(_I2V, 16, 4, _LONG, 2, **mixed, strategy=_SLICED | _swap(4, "disk")),
        "ti2v bf16, inputs to host": Case(_TI2V, 8, 4, _TI_LONG, 4, **mixed, strategy=_HOST),
        "t2v bf16 full": Case(_T2V, 12, 6, _SHORT, 2, rank=full, precision=bf16),
        "i2v bf16 full, attention kept": Case(_I2V, 12, 5, _SHORT, 2, 2, full, bf16, _KEEP),
        "ti2v bf16 full, 8-bit states": Case(_TI2V, 12, 5, (9, 384, 384), 1, rank=full, **mixed, strategy=states8),
    }


CASES = _cases()


@dataclass(frozen=True)
class Planned:
    """Bytes of device and host, and how long it took to plan them."""

    nbytes: int
    seconds: float


def planned(case: Case) -> Planned:
    """From a recording of three blocks, or of all where segments of several are checkpointed, as the planner does."""
    started = time.perf_counter()
    subject, memory = case.subject, case.memory
    few = build(subject, RECORDED_BLOCKS if memory.checkpoint_every == 1 else None)
    accumulating = case.micro_batches > 1
    recording = record(few, structure_of(memory), meta_batch(subject.spec, case.bucket, case.clips), accumulating)
    step = compose(recording, record_update(few, memory), memory, subject.blocks, accumulating)
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
    transformer = _with_values(subject)
    parameters = trained_parameters(transformer)
    optimizer = build_optimizer(parameters, subject.training, case.memory)
    offloaded = isinstance(optimizer, OffloadedAdamW)
    if not offloaded:
        allocate_states(optimizer)
    backend = SingleDevice([*parameters.values()], optimizer, CPU, fp16=False)
    with (
        tempfile.TemporaryDirectory() as scratch,
        closing(optimizer) if offloaded else nullcontext(),
        apply(transformer, subject.spec, case.memory, Path(scratch)),
    ):
        gauge.begin_stage()
        started = time.process_time()
        for _ in range(case.micro_batches):
            batch = _batch(case)
            with compute_in(transformer, subject.spec, subject.training.precision, CPU):
                loss = summed_loss(transformer, subject.spec, batch) / subject.training.global_batch_size
                backend.backward(loss)
        assert backend.clip(subject.training.clip_norm) > 0
        backend.step(skip=False)
        # before the strategy is taken off, which reads weights back from the disk
        return Measured(gauge.stage_peak()[0], time.process_time() - started)


def _with_values(subject: Subject) -> Any:
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


def _batch(case: Case) -> Batch:
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
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        children = [pool.submit(measured, name) for name in plans]
        for (name, plan), child in zip(plans.items(), children, strict=True):
            yield Row(name, CASES[name], plan, child.result())


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
