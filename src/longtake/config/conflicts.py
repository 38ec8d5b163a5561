"""What cannot go together in a config: the one function that loading, search, `apply` and pages ask. Needs no torch."""

from collections.abc import Iterator
from dataclasses import replace

from longtake.config.schema import (
    DataConfig,
    MemoryStrategy,
    OutputConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
    ValidationConfig,
)
from longtake.config.sharing import sharing_conflicts
from longtake.errors import ConfigError, Problem
from longtake.units import parse_bytes


def check(config: RunConfig, world_size: int = 1) -> None:
    """Raises ConfigError with every conflict of `config` when it runs on `world_size` ranks."""
    if found := [*conflicts(config, world_size)]:
        raise ConfigError(found)


def conflicts(config: RunConfig, world_size: int = 1) -> Iterator[Problem]:
    """Every combination of settings that cannot work, or in which one would be ignored."""
    yield from memory_conflicts(config.memory)
    yield from _batch(config.training, config.parallel, world_size)
    yield from _schedule(config.data, config.training)
    yield from _precision(config)
    yield from _trained_weights(config)
    yield from _adapters(config)
    yield from sharing_conflicts(config.memory, config.parallel, world_size)
    yield from _ignored(config)


def memory_conflicts(memory: MemoryStrategy) -> Iterator[Problem]:
    """Conflicts inside [memory]."""
    if memory.budget != "auto":
        yield from _budget(memory.budget)
    if memory.gradient_checkpointing == "none":
        yield from _needs_checkpointing(memory)
    yield from _block_swap(memory)
    yield from _slices(memory)
    if memory.optimizer == "adamw8bit" and memory.optimizer_offload:
        what = "8-bit states are small and stay on the device"
        remedy = 'leave it out, or use memory.optimizer = "adamw"'
        yield Problem(what, "memory.optimizer_offload", remedy, code="optimizer-8bit-offloaded")
    for index, rung in enumerate(memory.fallbacks):
        yield from _fallback(memory, rung, f"memory.fallbacks[{index}]")
    if memory.activation_offload_fraction != 1.0 and memory.activation_offload == "none":
        yield Problem(
            "the fraction would be ignored",
            "memory.activation_offload_fraction",
            'set memory.activation_offload = "host" or "disk"',
            code="config-key-ignored",
        )


def _needs_checkpointing(memory: MemoryStrategy) -> Iterator[Problem]:
    remedy = 'set memory.gradient_checkpointing = "block"'
    reasons = {
        "checkpoint_every": (memory.checkpoint_every != 1, "there are no segments"),
        "activation_offload": (memory.activation_offload != "none", "there are no kept block inputs to offload"),
        "block_swap": (memory.block_swap != 0, "autograd would keep the weights that are streamed"),
        "slices": (memory.slices != 1, "a slice's activations would be kept"),
        "attention_head_groups": (memory.attention_head_groups != 1, "a group's activations would be kept"),
    }
    for field, (set_, reason) in reasons.items():
        if set_:
            what = f"{reason} without gradient checkpointing"
            yield Problem(what, f"memory.{field}", remedy, code="memory-needs-checkpointing")


def _block_swap(memory: MemoryStrategy) -> Iterator[Problem]:
    ring = memory.checkpoint_every + 1
    if 0 < memory.block_swap <= ring:
        what = f"{memory.block_swap} blocks through a ring of {ring} buffers save nothing"
        yield Problem(what, "memory.block_swap", f"use 0, or at least {ring + 1}", code="block-swap-too-few")


def _slices(memory: MemoryStrategy) -> Iterator[Problem]:
    sliced = memory.slices > 1 or memory.attention_head_groups > 1
    if sliced and memory.checkpoint_every > 1:
        what = "a block in slices is a segment of its own"
        remedy = "leave it out, or memory.slices and attention_head_groups"
        yield Problem(what, "memory.checkpoint_every", remedy, code="slices-in-segments")


def _fallback(memory: MemoryStrategy, rung: MemoryStrategy, where: str) -> Iterator[Problem]:
    """A fallback is a strategy that a run can change to."""
    if rung.fallbacks:
        what, remedy = "fallbacks have none of their own", "write them one after the other"
        yield Problem(what, f"{where}.fallbacks", remedy, code="fallback-nested")
    for field in ("quantization", "optimizer", "optimizer_offload"):
        if getattr(rung, field) != getattr(memory, field):
            what = f"a run cannot change it on its way from {getattr(memory, field)!r}"
            yield Problem(what, f"{where}.{field}", "make them equal", code="fallback-not-reachable")
    if rung.budget not in ("auto", memory.budget):
        yield Problem("a run has one budget", f"{where}.budget", "leave it out", code="fallback-with-budget")
    for problem in memory_conflicts(rung.model_copy(update={"fallbacks": ()})):
        yield replace(problem, where=problem.where.replace("memory", where, 1))


def _budget(text: str) -> Iterator[Problem]:
    where = "memory.budget"
    try:
        if not parse_bytes(text, where):
            what = "a budget of no bytes leaves nothing to train with"
            yield Problem(what, where, 'give more, or "auto"', code="budget-zero")
    except ConfigError as error:
        yield from error.problems


def _batch(training: TrainingConfig, parallel: ParallelConfig, world_size: int) -> Iterator[Problem]:
    """Ranks that share a clip count as one."""
    groups = world_size // parallel.sp or 1
    unit = groups * training.micro_batch_size
    if training.global_batch_size % unit == 0:
        return
    lower = training.global_batch_size // unit * unit
    nearest = [value for value in (lower, lower + unit) if value]
    ranks = f"{groups} ranks" if parallel.sp == 1 else f"{groups} groups of {parallel.sp} ranks"
    yield Problem(
        f"{training.global_batch_size} is no multiple of {ranks} x micro-batch {training.micro_batch_size}",
        "training.global_batch_size",
        f"the nearest that work: {' or '.join(map(str, nearest))}",
        code="batch-not-divisible",
    )


def _schedule(data: DataConfig, training: TrainingConfig) -> Iterator[Problem]:
    where = "data.frames_schedule"
    steps = [step for step, _ in data.frames_schedule]
    if steps and steps[0] != 0:
        remedy = f"write [[0, {data.frames_schedule[0][1]}], ...]"
        yield Problem("the first stage must start at step 0", where, remedy, code="frames-schedule-late")
    if steps != sorted(set(steps)):
        yield Problem("the stages' first steps must rise", where, "sort them", code="frames-schedule-unsorted")
    if steps and steps[-1] >= training.steps:
        remedy = "raise training.steps or drop the stage"
        what = f"the last stage starts at step {steps[-1]} of {training.steps}"
        yield Problem(what, where, remedy, code="frames-schedule-past-end")
    if steps and data.frames_schedule[-1][1] != data.num_frames:
        yield Problem(
            f"the last stage has {data.frames_schedule[-1][1]} frames, data.num_frames says {data.num_frames}",
            where,
            "make them equal",
            code="frames-schedule-ends-otherwise",
        )


def _precision(config: RunConfig) -> Iterator[Problem]:
    if config.lora is not None and config.training.precision == "fp32" and config.model.dtype != "fp32":
        yield Problem(
            f"frozen weights in {config.model.dtype} cannot be computed with in fp32",
            "training.precision",
            f'use "{config.model.dtype}", or model.dtype = "fp32"',
            code="precision-above-weights",
        )
    if config.training.warmup_steps >= config.training.steps:
        remedy = f"at most {config.training.steps - 1}"
        what = f"the warm-up of {config.training.warmup_steps} steps is as long as the run"
        yield Problem(what, "training.warmup_steps", remedy, code="warmup-too-long")


def _trained_weights(config: RunConfig) -> Iterator[Problem]:
    """Fields of [memory] that depend on what is trained."""
    for index, memory in enumerate((config.memory, *config.memory.fallbacks)):
        where = f"memory.fallbacks[{index - 1}]" if index else "memory"
        if config.lora is None and memory.block_swap:
            what = "all weights are trained, none can be streamed"
            yield Problem(what, f"{where}.block_swap", "leave it out", code="weights-trained-and-streamed")
        if config.lora is None and memory.quantization != "none" and not index:
            what = "weights that are trained cannot be quantised"
            remedy = "leave it out, or add a section [lora]"
            yield Problem(what, f"{where}.quantization", remedy, code="weights-trained-and-quantized")
        if config.lora is not None and config.lora.dropout and (memory.slices > 1 or memory.attention_head_groups > 1):
            what = "a block in slices would draw its dropout differently"
            yield Problem(what, f"{where}.slices", "leave it out, or lora.dropout", code="dropout-drawn-apart")
    if config.lora is not None and config.lora.dropout and config.parallel.sp > 1:
        what = "ranks that share a clip would draw its dropout differently"
        yield Problem(what, "lora.dropout", "use 0, or sp = 1", code="dropout-drawn-apart")


def _adapters(config: RunConfig) -> Iterator[Problem]:
    """Fields of [lora], and of [training] that are about adapters."""
    if config.lora is None:
        if config.training.lora_plus_ratio != 1.0:
            remedy = "leave it out, or add a section [lora]"
            yield Problem("there are no adapters", "training.lora_plus_ratio", remedy, code="config-key-ignored")
        return
    where, end = "lora.block_ranks", -1
    for first, last, _ in sorted(config.lora.block_ranks):
        if last < first:
            what = f"block {last} is before block {first}"
            yield Problem(what, where, "write [first, last, rank]", code="block-ranks-reversed")
        elif first <= end:
            yield Problem(
                f"block {first} has two ranks", where, "let no two ranges overlap", code="block-ranks-overlap"
            )
        end = max(end, last)


def _ignored(config: RunConfig) -> Iterator[Problem]:
    """Settings that would have no effect."""
    if config.lora is None and config.output.formats != OutputConfig.model_fields["formats"].default:
        remedy = "leave it out, or add a section [lora]"
        yield Problem("full fine-tuning writes no adapter", "output.formats", remedy, code="config-key-ignored")
    for key in ("sample_steps", "guidance_scale"):
        default = ValidationConfig.model_fields[key].default
        if not config.validation.samples and getattr(config.validation, key) != default:
            remedy = "leave it out, or add validation.samples"
            what = "there are no samples that it would apply to"
            yield Problem(what, f"validation.{key}", remedy, code="config-key-ignored")
