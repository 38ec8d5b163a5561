"""The whole plan of a run: the search for its largest bucket, the other buckets and stages, and what to change."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from longtake.config.conflicts import memory_conflicts
from longtake.config.schema import MemoryStrategy
from longtake.config.sharing import sharing_conflicts
from longtake.errors import ConfigError, Problem
from longtake.models.wan.variants import WanVariant
from longtake.planner.advice import advice, most_frames
from longtake.planner.allocator import CONTEXT_BYTES
from longtake.planner.candidates import CUTS, Freedom, allowed, frugal
from longtake.planner.events import KINDS, Compute
from longtake.planner.load import Load
from longtake.planner.machine import Machine
from longtake.planner.meta_model import Subject
from longtake.planner.naming import name_of, sharing_notes
from longtake.planner.plans import Bucket, BucketNeeds, Plan, Report, StagePeak
from longtake.planner.search import Candidate, Question, Search
from longtake.planner.stages import image_encoder_peak, prepare_peaks, sampling_peaks, save_peak, text_encoder_peak
from longtake.planner.tracer import Tracer

MOST_PLANS = 6
MOST_FALLBACKS = 3


@dataclass(frozen=True)
class Request:
    """What is planned: `subject` on `machine`, for clips of `buckets`; `samples` says that a run samples videos.

    `stages` says that the other stages are wanted too, which are traced for the published encoders. `as_asked` is a
    strategy whose needs are told beside the plans', whatever is left open.
    """

    subject: Subject
    machine: Machine
    buckets: tuple[Bucket, ...]
    freedom: Freedom
    samples: bool = False
    stages: bool = True
    as_asked: MemoryStrategy | None = None

    @property
    def variant(self) -> WanVariant:
        """The model."""
        return self.subject.variant

    @property
    def worst(self) -> Bucket:
        """The bucket with the most tokens."""
        return max(self.buckets, key=lambda bucket: self.subject.spec.tokens(*bucket))


def plan(request: Request, tracer: Tracer | None = None) -> Report:
    """The report; its plans are of the worst bucket, which the budgets are for."""
    began = time.perf_counter()
    tracer = tracer or Tracer(request.subject)
    search = Search(tracer, question_of(request, request.worst))
    candidates = search.found()[:MOST_PLANS]
    if not candidates:
        raise ConfigError([*_impossible(request, search)])
    prepared = prepare_peaks(request.variant, request.buckets, request.subject.device_type) if request.stages else ()
    plans = tuple(
        _plan(request, tracer, search, each, prepared, detailed=index == 0) for index, each in enumerate(candidates)
    )
    plans = tuple(sorted(plans, key=lambda each: not each.fits))
    fits = bool(plans) and plans[0].fits
    if fits:
        plans = (_with_fallbacks(plans, request, tracer), *plans[1:])
    spec, bucket, machine = request.subject.spec, request.worst, request.machine
    return Report(
        model=request.variant.name,
        task=spec.task,
        method="lora" if request.subject.lora else "full",
        tokens=spec.tokens(*bucket),
        bucket=bucket,
        budget_bytes=machine.budget_bytes,
        host_budget_bytes=machine.host_bytes,
        disk_budget_bytes=machine.disk_bytes,
        gpu=machine.device.name,
        gpus=machine.gpus,
        chosen=0 if fits else None,
        plans=plans,
        references=_references(request, tracer, search) if request.stages else (),
        advice=() if fits else advice(search, question_of(request, bucket)),
        notes=_notes(request, prepared),
        seconds=time.perf_counter() - began,
    )


def _impossible(request: Request, search: Search) -> Iterator[Problem]:
    """Why no engine that comes into question takes what is pinned of [memory]."""
    pinned = MemoryStrategy(**request.freedom.pinned)
    yield from sharing_conflicts(pinned, search.sharings()[0], request.machine.gpus, request.subject.spec.heads)


def longest_clip(request: Request, tracer: Tracer | None = None) -> int | None:
    """The most frames, 4n+1, of the worst bucket's size of which a clip fits under some strategy; None if none does."""
    return most_frames(tracer or Tracer(request.subject), question_of(request, request.worst))


def question_of(request: Request, bucket: Bucket) -> Question:
    """What the search is asked for `bucket`."""
    beside = 0
    if request.samples and request.stages:
        peaks = sampling_peaks(request.variant, bucket, 0, request.subject.device_type)
        beside = max(peak.device_bytes for peak in peaks)
    training = request.subject.training
    return Question(request.machine, bucket, training.global_batch_size, request.freedom, beside)


def _plan(
    request: Request,
    tracer: Tracer,
    search: Search,
    candidate: Candidate,
    prepared: tuple[StagePeak, ...],
    detailed: bool,
) -> Plan:
    """A candidate as a plan; a `detailed` one has its other buckets."""
    worst = request.worst
    stages = (*prepared, *_stages_of(request, tracer, candidate)) if request.stages else ()
    own = max((each for each in stages if each.stage != "prepare"), key=lambda each: each.device_bytes, default=None)
    elsewhere = own is not None and own.device_bytes > candidate.device_bytes
    held = dict(zip(KINDS, candidate.composed.peak, strict=True))
    device = candidate.device_bytes
    host = max([candidate.host_bytes, *(each.host_bytes for each in stages if each.stage != "prepare")])
    if elsewhere and own is not None:
        held = _at_rest(candidate, own.device_bytes - candidate.context_bytes)
        device = own.device_bytes
    return Plan(
        name=name_of(candidate.strategy, candidate.parallel, tracer.blocks, candidate.load.clips),
        strategy=candidate.strategy,
        parallel=candidate.parallel,
        micro_batch_size=candidate.load.clips,
        fits=search.fits(candidate) and (request.machine.is_cpu or host <= request.machine.host_bytes),
        stage=own.stage if elsewhere and own is not None else "train",
        bucket=worst,
        peak_bytes={"device": device, "host": host, "disk": candidate.composed.disk_bytes},
        allocated_bytes=sum(held.values()),
        step_seconds=candidate.seconds,
        stalled_seconds=candidate.stalled_seconds,
        bound_by=candidate.timeline.bound_by,
        breakdown_bytes={
            **held,
            "allocator_slack": 0 if elsewhere else candidate.slack_bytes,
            "context": candidate.context_bytes,
        },
        stages=stages,
        buckets=_buckets(request, search, candidate) if detailed and len(request.buckets) > 1 else (),
        timeline=candidate.timeline,
    )


def _buckets(request: Request, search: Search, candidate: Candidate) -> tuple[BucketNeeds, ...]:
    """Every bucket under the plan, the largest first."""
    spec, found = request.subject.spec, []
    for bucket in sorted(request.buckets, key=lambda each: -spec.tokens(*each)):
        load = replace(candidate.load, bucket=bucket)
        own = candidate
        if bucket != candidate.load.bucket:
            own = search.candidate(candidate.strategy, load, 0, candidate.parallel)
        found.append(BucketNeeds(bucket, own.device_bytes, own.seconds))
    return tuple(found)


def _stages_of(request: Request, tracer: Tracer, candidate: Candidate) -> tuple[StagePeak, ...]:
    """The stages of training beside its steps."""
    subject, resident = request.subject, candidate.resident_bytes + candidate.context_bytes
    values = tracer.trained_values * subject.experts
    average = 4 * values if subject.training.ema else 0
    forward = max(
        (sum(item.held) for item in _computes(candidate) if item.label.startswith("forward")),
        default=0,
    )
    saved = save_peak(
        values, "lora" if subject.lora else "full", candidate.strategy, bool(average), subject.device_type
    )
    host = candidate.host_bytes
    found = [
        # Its forward pass keeps nothing, and is bounded by that of a step.
        StagePeak("validation", "held-out clips", forward + candidate.context_bytes + average, host),
        StagePeak("save", "checkpoints and results", resident + saved.device_bytes, host + saved.host_bytes),
    ]
    if request.samples:
        found += sampling_peaks(request.variant, request.worst, resident + average, subject.device_type)
    return tuple(found)


def _computes(candidate: Candidate) -> Iterator[Compute]:
    return (item for item in candidate.composed.micro_batch if isinstance(item, Compute))


def _at_rest(candidate: Candidate, nbytes: int) -> dict[str, int]:
    """The kinds of `nbytes` bytes in a stage between steps: what is resident, the rest counted as `block`."""
    first = next(_computes(candidate))
    held = dict.fromkeys(KINDS, 0)
    for kind, own in zip(KINDS, first.held, strict=True):
        if kind in ("weights", "adapters", "optimizer", "buffers"):
            held[kind] = own
    held["block"] = nbytes - sum(held.values())
    return held


def _with_fallbacks(plans: Sequence[Plan], request: Request, tracer: Tracer) -> Plan:
    """The first plan, with those that need less as fallbacks: a run may be wrong about a device that was planned."""
    first, *others = plans
    fixed = ("quantization", "optimizer", "optimizer_offload")
    alike = [
        each
        for each in others
        if all(getattr(each.strategy, name) == getattr(first.strategy, name) for name in fixed)
        and (each.parallel, each.micro_batch_size) == (first.parallel, first.micro_batch_size)
        and each.peak_bytes["device"] < first.peak_bytes["device"]
    ]
    rungs: list[MemoryStrategy] = []
    least = first.peak_bytes["device"]
    for each in alike:
        if each.peak_bytes["device"] < least and len(rungs) < MOST_FALLBACKS:
            rungs.append(each.strategy)
            least = each.peak_bytes["device"]
    last = _most_frugal(first, request, tracer)
    if last is not None and last not in (first.strategy, *rungs):
        rungs.append(last)
    return replace(first, strategy=first.strategy.model_copy(update={"fallbacks": tuple(rungs)}))


def _most_frugal(plan: Plan, request: Request, tracer: Tracer) -> MemoryStrategy | None:
    """A plan's strategy with all moved and cut that can be, but for what a run cannot change; None where none works."""
    strategy, heads = plan.strategy, tracer.spec.heads
    whole = tracer.drops_out or strategy.checkpoint_every > 1
    cut = CUTS[0] if whole else (CUTS[-1][0], min(CUTS[-1][1], heads // plan.parallel.sp))
    wanted = frugal(tracer.blocks, tracer.frozen, cut)
    if strategy.activation_offload == "none":
        wanted["activation_offload"] = "host"
    found = strategy.model_copy(update={**wanted, **request.freedom.pinned, "fallbacks": ()})
    found = allowed(found, plan.parallel, request.machine.gpus, heads)
    return None if [*memory_conflicts(found)] else found


def _references(request: Request, tracer: Tracer, search: Search) -> tuple[Plan, ...]:
    """What was asked for; and what people do without a planner, the text and image encoders left on the device."""
    plain = _reference(request, tracer, search, MemoryStrategy())
    name = plain.name.replace("checkpointing", "plain checkpointing", 1)
    encoders = [text_encoder_peak(request.variant, request.subject.device_type)]
    if (image := image_encoder_peak(request.variant, request.subject.device_type)) is not None:
        encoders.append(image)
    more = sum(encoder.weights_bytes for encoder in encoders)
    device = plain.peak_bytes["device"] + more
    resident = replace(
        plain,
        name=f"{name}, encoders resident",
        fits=plain.fits and device <= request.machine.budget_bytes,
        peak_bytes={**plain.peak_bytes, "device": device},
        allocated_bytes=plain.allocated_bytes + more,
        breakdown_bytes={**plain.breakdown_bytes, "weights": plain.breakdown_bytes["weights"] + more},
    )
    if request.as_asked is None:
        return resident, replace(plain, name=name)
    if request.as_asked.model_copy(update={"budget": "auto"}) == MemoryStrategy():
        return replace(plain, name=f"as your flags have it ({name})"), resident
    asked = _reference(request, tracer, search, request.as_asked)
    return replace(asked, name=f"as your flags have it ({asked.name})"), resident, replace(plain, name=name)


def _reference(request: Request, tracer: Tracer, search: Search, strategy: MemoryStrategy) -> Plan:
    """Shared among GPUs in the simplest way of those that are open."""
    question, parallel = search.question, search.sharings()[0]
    clips = question.freedom.micro_batch_size or 1
    accumulating = question.global_batch_size * parallel.sp // question.machine.gpus > clips
    candidate = search.candidate(strategy, Load(question.bucket, clips, accumulating, parallel.sp), 0, parallel)
    return _plan(replace(request, stages=False), tracer, search, candidate, (), detailed=False)


def _notes(request: Request, prepared: Sequence[StagePeak]) -> tuple[str, ...]:
    machine = request.machine
    over = [peak for peak in prepared if peak.device_bytes + _context(machine) > machine.budget_bytes]
    found = [
        f"`longtake prepare` needs {peak.device_bytes / 2**30:.1f} GiB for the {peak.what}: "
        "run it on a larger device, or on the CPU (CUDA_VISIBLE_DEVICES=)"
        for peak in over
    ]
    found += sharing_notes(request.freedom.pinned_parallel, machine.gpus, machine.device.peer_bytes_per_second)
    if not machine.is_cpu:
        found.append("rates and the context's size are those of a table; nothing of it was measured on this device")
    clips = request.subject.training.global_batch_size
    found.append(f"a step is {clips} clip{'s' if clips > 1 else ''} (training.global_batch_size)")
    return tuple(found)


def _context(machine: Machine) -> int:
    return 0 if machine.is_cpu else CONTEXT_BYTES[machine.device.generation]
