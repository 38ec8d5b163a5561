"""Looks for the fastest strategy that fits, from traced parts; knows no model family."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from typing import Any, Literal

from longtake.config.schema import MemoryStrategy, ParallelConfig
from longtake.config.sharing import sharing_conflicts
from longtake.planner.candidates import (
    CUTS,
    LAST_RESORTS,
    SAVED_BY,
    Freedom,
    bases,
    cuts,
    micro_batches,
    sharings,
    swaps,
)
from longtake.planner.composition import Composed
from longtake.planner.events import KINDS, Compute, Timeline
from longtake.planner.hardware import Device
from longtake.planner.load import Load
from longtake.planner.machine import HOST_PROCESS_BYTES, Machine
from longtake.planner.naming import MACHINE_GPUS
from longtake.planner.parallel import engines
from longtake.planner.parts import Parts
from longtake.planner.plans import Bucket
from longtake.planner.timeline import simulate

ONE = ParallelConfig(strategy="single")
NO_STALLS = 0.005
"""Share of a step that waits for copies, below which a finer cut, which computes more, is not looked at."""


@dataclass(frozen=True)
class Question:
    """What is asked: which strategy of a `freedom` for clips of `bucket`, `global_batch_size` of them a step."""

    machine: Machine
    bucket: Bucket
    global_batch_size: int
    freedom: Freedom
    beside_resident_bytes: int = 0
    """What another stage, such as sampling while training, needs beside what a run keeps between two steps."""


@dataclass(frozen=True)
class Candidate:
    """A strategy with all that a plan says of it."""

    strategy: MemoryStrategy
    parallel: ParallelConfig
    load: Load
    composed: Composed
    slack_bytes: int
    context_bytes: int
    host_bytes: int
    micro_batches: int
    device: Device

    @property
    def device_bytes(self) -> int:
        """What the driver shows at the peak."""
        return self.composed.peak_bytes + self.slack_bytes + self.context_bytes

    @property
    def resident_bytes(self) -> int:
        """What stays on the device between two steps: all that is there when one begins but its batch and gradients."""
        first = next(item for item in self.composed.micro_batch if isinstance(item, Compute))
        held = dict(zip(KINDS, first.held, strict=True))
        return sum(held[kind] for kind in ("weights", "adapters", "optimizer", "buffers"))

    @cached_property
    def timeline(self) -> Timeline:
        """Of a micro-batch."""
        return simulate(self.composed.micro_batch, self.device)

    @cached_property
    def update(self) -> Timeline:
        """Of the update."""
        return simulate(self.composed.update, self.device)

    @property
    def seconds(self) -> float:
        """Of an optimiser step."""
        return self.micro_batches * self.timeline.seconds + self.update.seconds

    @property
    def stalled_seconds(self) -> float:
        """Of those, waits for copies."""
        return self.micro_batches * self.timeline.stalled_seconds + self.update.stalled_seconds


class Search:
    """One question, answered from `parts`."""

    def __init__(self, parts: Parts, question: Question) -> None:
        self.parts, self.question = parts, question
        self.machine = question.machine
        self.device = _one_of(self.machine)

    def found(self) -> list[Candidate]:
        """Candidates, fastest first among those that fit; then, where none does, the nearest to fitting."""
        candidates = self._of({})
        for rounding in LAST_RESORTS:
            if not candidates or any(self.fits(each) for each in candidates):
                break
            if self._may_help(rounding, candidates):
                candidates += self._of(rounding)
        fitting = sorted((each for each in candidates if self.fits(each)), key=_rank)
        return frontier(fitting) or sorted(candidates, key=self.excess)[:3]

    def fits(self, candidate: Candidate) -> bool:
        """Whether the device, the host and the disk have room for it."""
        return self.excess(candidate) <= 0

    def excess(self, candidate: Candidate) -> int:
        """Bytes by which it exceeds the budget that it exceeds most; not above 0 where it fits."""
        beside = self.question.beside_resident_bytes
        needed = max(
            candidate.device_bytes, candidate.resident_bytes + candidate.context_bytes + beside if beside else 0
        )
        over = needed - self.machine.budget_bytes
        if not self.machine.is_cpu:
            over = max(over, candidate.host_bytes - self.machine.host_bytes)
        return max(over, candidate.composed.disk_bytes * self.machine.gpus - self.machine.disk_bytes)

    def _may_help(self, rounding: Mapping[str, Any], candidates: Sequence[Candidate]) -> bool:
        """Whether a smaller type of what is on the device could make the nearest candidate fit; torchao has them."""
        ((field, kind),) = rounding.items()
        if field in self.question.freedom.pinned or find_spec("torchao") is None:
            return False
        nearest = min(candidates, key=self.excess)
        if field == "optimizer":
            return self.excess(nearest) <= SAVED_BY[kind] * nearest.composed.peak[KINDS.index("optimizer")]
        if not self.parts.frozen:
            return False
        recording = self.parts.recording(nearest.strategy, nearest.load)
        resident = nearest.strategy.checkpoint_every + 1 if nearest.strategy.block_swap else self.parts.blocks
        return self.excess(nearest) <= SAVED_BY[kind] * resident * recording.block_weights

    def _of(self, quantized: Mapping[str, Any]) -> list[Candidate]:
        """Candidates of every cut, as long as nothing fits or a finer one can be faster than what does."""
        found: list[Candidate] = []
        freedom, heads = self.question.freedom, self.parts.spec.heads
        tokens = self.parts.spec.tokens(*self.question.bucket)
        ways = self.sharings()
        for cut in cuts(freedom, heads, self.parts.drops_out):
            best = self._best(found)
            if best and cut != CUTS[0] and best.stalled_seconds < NO_STALLS * best.seconds:
                break
            for parallel in ways:
                clips = self._clips(parallel)
                for size in micro_batches(freedom, clips, tokens):
                    if size > 1 and (best := self._best(found)) and best.timeline.bound_by in ("compute", "memory"):
                        break
                    load = Load(self.question.bucket, size, clips > size, parallel.sp)
                    found += self._of_load(load, parallel, cut, quantized)
        return found

    def sharings(self) -> list[ParallelConfig]:
        """The ways to share the work among the GPUs that come out even with the global batch, the simplest first.

        Raises ConfigError where there are none.
        """
        method: Literal["lora", "full"] = "lora" if self.parts.frozen else "full"
        heads, gpus = self.parts.spec.heads, self.machine.gpus
        usual = engines(MemoryStrategy(), gpus, method, heads)
        if self.parts.drops_out:  # ranks that share a clip would draw differently
            usual = tuple(each for each in usual if each.sp == 1)
        return sharings(self.question.freedom, usual, gpus, heads, self.question.global_batch_size)

    def _clips(self, parallel: ParallelConfig) -> int:
        """Of a step, on one rank."""
        return self.question.global_batch_size * parallel.sp // self.machine.gpus

    def _best(self, candidates: Sequence[Candidate]) -> Candidate | None:
        return min((each for each in candidates if self.fits(each)), key=_rank, default=None)

    def _of_load(
        self, load: Load, parallel: ParallelConfig, cut: tuple[int, int], quantized: Mapping[str, Any]
    ) -> Iterator[Candidate]:
        """Candidates of one micro-batch, one way to share it, and one cut."""
        reached: dict[str, list[Candidate]] = {}
        for base in bases(self.question.freedom, cut, quantized, coarse=self.machine.gpus > 1):
            mode = base.gradient_checkpointing
            if any(_no_faster(base, done.strategy) for done in reached.get(mode, ())):
                continue
            if any(sharing_conflicts(base, parallel, self.machine.gpus, self.parts.spec.heads)):
                continue
            if self.question.freedom.pinned.get("block_swap") and not self._swappable(base, parallel):
                continue
            candidate = self._with_swap(base, load, parallel)
            if self.fits(candidate):
                reached.setdefault(mode, []).append(candidate)
            yield candidate

    def _with_swap(self, base: MemoryStrategy, load: Load, parallel: ParallelConfig) -> Candidate:
        """The strategy with as many blocks swapped as it must, or with all."""
        resident = self.candidate(base, load, 0, parallel)
        freedom = self.question.freedom
        numbers = swaps(freedom, self.parts.blocks, base.checkpoint_every)
        if numbers == (0,) or not self._swappable(base, parallel) or (self.fits(resident) and 0 in numbers):
            return resident
        tried = []
        for place in freedom.choices("block_swap_from", "host", "disk"):
            over = self.excess(resident)
            chosen = next((n for n in numbers if n and self._saved(base, load, n) >= over), numbers[-1])
            swapped = base.model_copy(update={"block_swap": chosen, "block_swap_from": place})
            tried.append(self.candidate(swapped, load, resident.slack_bytes, parallel))
            if self.fits(tried[-1]):
                break
        return min(tried, key=self.excess)

    def _swappable(self, base: MemoryStrategy, parallel: ParallelConfig) -> bool:
        if not self.parts.frozen or base.gradient_checkpointing == "none":
            return False
        swapped = base.model_copy(update={"block_swap": self.parts.blocks})
        return not any(sharing_conflicts(swapped, parallel, self.machine.gpus, self.parts.spec.heads))

    def _saved(self, base: MemoryStrategy, load: Load, number: int) -> int:
        """Bytes on the device that swapping `number` blocks saves: their weights less the ring's buffers."""
        recording = self.parts.recording(base, load)
        ring = (base.checkpoint_every + 1) * recording.layout.nbytes
        return number * recording.block_weights - ring

    def candidate(
        self, strategy: MemoryStrategy, load: Load, slack: int, parallel: ParallelConfig | None = None
    ) -> Candidate:
        """A strategy's, with the allocator's slack where it is known; on several GPUs shared by DDP, if not said."""
        machine = self.machine
        parallel = parallel or (ONE if machine.gpus == 1 else ParallelConfig(strategy="ddp"))
        composed = self.parts.distributed(strategy, load, parallel, machine.gpus)
        if machine.is_cpu:
            composed = _one_memory(composed)
        elif not slack:
            slack = self.parts.slack_bytes(strategy, load, machine.device.generation, machine.expandable)
        micro = max(1, self._clips(parallel) // load.clips)
        return Candidate(
            strategy=strategy,
            parallel=parallel,
            load=load,
            composed=composed,
            slack_bytes=slack,
            context_bytes=machine.context_bytes(composed.peak_bytes, machine.gpus, all_to_all=parallel.sp > 1),
            host_bytes=(composed.host_bytes + HOST_PROCESS_BYTES) * machine.gpus,
            micro_batches=micro,
            device=self.device,
        )


def frontier(fitting: Sequence[Candidate]) -> list[Candidate]:
    """Those that no faster one beats in what it needs of the device, or of the host."""
    kept: list[Candidate] = []
    for each in fitting:
        if all(each.device_bytes < other.device_bytes or each.host_bytes < other.host_bytes for other in kept):
            kept.append(each)
    return kept


def _one_of(machine: Machine) -> Device:
    """The rates of one of its GPUs: those of a machine have its disk together."""
    device, sharing = machine.device, min(machine.gpus, MACHINE_GPUS)
    return replace(device, disk_bytes_per_second=device.disk_bytes_per_second / sharing)


def _rank(candidate: Candidate) -> tuple[float, int, int]:
    return candidate.seconds, candidate.host_bytes, candidate.device_bytes


def _no_faster(base: MemoryStrategy, fitting: MemoryStrategy) -> bool:
    """Whether `base`, with whatever is swapped, cannot be faster than a strategy of the same computation that fits.

    It moves no less; and a disk, or states in host memory, are never tried where it fits without.
    """
    order = {"none": 0, "host": 1, "disk": 2}
    if base.optimizer_offload > fitting.optimizer_offload:
        return True
    if base.activation_offload == "disk" and fitting.activation_offload != "disk":
        return True
    return (
        order[base.activation_offload] >= order[fitting.activation_offload]
        and base.activation_offload_fraction >= fitting.activation_offload_fraction
        and not fitting.block_swap
    )


def _one_memory(composed: Composed) -> Composed:
    """On a CPU what waits in host memory is in the same memory: it counts as buffers."""
    peak = [*composed.peak]
    peak[KINDS.index("buffers")] += composed.host_bytes
    return replace(composed, peak=tuple(peak), host_bytes=0)
