"""What cannot go together in a config: the one function that loading, search, `apply` and pages ask. Needs no torch."""

from collections.abc import Iterator

from longtake.config.schema import (
    DataConfig,
    MemoryStrategy,
    OutputConfig,
    RunConfig,
    TrainingConfig,
    ValidationConfig,
)
from longtake.errors import ConfigError, Problem
from longtake.units import parse_bytes

NOT_YET = {
    "checkpoint_every": 1,
    "block_swap": 0,
    "block_swap_from": "host",
    "slices": 1,
    "attention_head_groups": 1,
    "quantization": "none",
    "optimizer": "adamw",
    "optimizer_offload": False,
    "fallbacks": (),
}
"""Fields of [memory] that this version reads but can only run at these values."""


def check(config: RunConfig, world_size: int = 1) -> None:
    """Raises ConfigError with every conflict of `config` when it runs on `world_size` ranks."""
    if found := [*conflicts(config, world_size)]:
        raise ConfigError(found)


def conflicts(config: RunConfig, world_size: int = 1) -> Iterator[Problem]:
    """Every combination of settings that cannot work, or in which one would be ignored."""
    yield from memory_conflicts(config.memory)
    yield from _batch(config.training, world_size)
    yield from _schedule(config.data, config.training)
    yield from _precision(config)
    yield from _parallel(config, world_size)
    yield from _ignored(config)


def memory_conflicts(memory: MemoryStrategy) -> Iterator[Problem]:
    """Conflicts inside [memory]."""
    if memory.budget != "auto":
        yield from _budget(memory.budget)
    if memory.gradient_checkpointing == "block_keep_attention":
        yield Problem("this version cannot keep attention's output", "memory.gradient_checkpointing", 'use "block"')
    for field, only in NOT_YET.items():
        if getattr(memory, field) != only:
            yield Problem(f"this version runs only with {only!r}", f"memory.{field}", "leave the key out")
    if memory.activation_offload != "none" and memory.gradient_checkpointing == "none":
        yield Problem(
            "there are no kept block inputs to offload without gradient checkpointing",
            "memory.activation_offload",
            'set memory.gradient_checkpointing = "block"',
        )
    if memory.activation_offload_fraction != 1.0 and memory.activation_offload == "none":
        yield Problem(
            "the fraction would be ignored",
            "memory.activation_offload_fraction",
            'set memory.activation_offload = "host" or "disk"',
        )


def _budget(text: str) -> Iterator[Problem]:
    where = "memory.budget"
    try:
        if not parse_bytes(text, where):
            yield Problem("a budget of no bytes leaves nothing to train with", where, 'give more, or "auto"')
    except ConfigError as error:
        yield from error.problems


def _batch(training: TrainingConfig, world_size: int) -> Iterator[Problem]:
    unit = world_size * training.micro_batch_size
    if training.global_batch_size % unit == 0:
        return
    lower = training.global_batch_size // unit * unit
    nearest = [value for value in (lower, lower + unit) if value]
    yield Problem(
        f"{training.global_batch_size} is no multiple of {world_size} ranks x micro-batch {training.micro_batch_size}",
        "training.global_batch_size",
        f"the nearest that work: {' or '.join(map(str, nearest))}",
    )


def _schedule(data: DataConfig, training: TrainingConfig) -> Iterator[Problem]:
    where = "data.frames_schedule"
    steps = [step for step, _ in data.frames_schedule]
    if steps and steps[0] != 0:
        yield Problem("the first stage must start at step 0", where, f"write [[0, {data.frames_schedule[0][1]}], ...]")
    if steps != sorted(set(steps)):
        yield Problem("the stages' first steps must rise", where, "sort them")
    if steps and steps[-1] >= training.steps:
        remedy = "raise training.steps or drop the stage"
        yield Problem(f"the last stage starts at step {steps[-1]} of {training.steps}", where, remedy)
    if steps and data.frames_schedule[-1][1] != data.num_frames:
        yield Problem(
            f"the last stage has {data.frames_schedule[-1][1]} frames, data.num_frames says {data.num_frames}",
            where,
            "make them equal",
        )


def _precision(config: RunConfig) -> Iterator[Problem]:
    if config.lora is not None and config.training.precision == "fp32" and config.model.dtype != "fp32":
        yield Problem(
            f"frozen weights in {config.model.dtype} cannot be computed with in fp32",
            "training.precision",
            f'use "{config.model.dtype}", or model.dtype = "fp32"',
        )
    if config.training.warmup_steps >= config.training.steps:
        remedy = f"at most {config.training.steps - 1}"
        yield Problem("the warm-up is as long as the run", "training.warmup_steps", remedy)


def _parallel(config: RunConfig, world_size: int) -> Iterator[Problem]:
    parallel = config.parallel
    if parallel.strategy not in ("auto", "single"):
        yield Problem("this version trains on one device", "parallel.strategy", 'use "auto" or "single"')
    if parallel.sp != 1:
        yield Problem("this version trains on one device", "parallel.sp", "use 1")
    if parallel.offload != "none":
        yield Problem("this version trains on one device", "parallel.offload", 'use "none"')
    if world_size != 1:
        yield Problem(f"{world_size} ranks were started", "WORLD_SIZE", "this version trains on one device: start one")


def _ignored(config: RunConfig) -> Iterator[Problem]:
    """Settings that would have no effect."""
    if config.lora is None and config.output.formats != OutputConfig.model_fields["formats"].default:
        remedy = "leave it out, or add a section [lora]"
        yield Problem("full fine-tuning writes no adapter", "output.formats", remedy)
    for key in ("sample_steps", "guidance_scale"):
        default = ValidationConfig.model_fields[key].default
        if not config.validation.samples and getattr(config.validation, key) != default:
            remedy = "leave it out, or add validation.samples"
            yield Problem("there are no samples that it would apply to", f"validation.{key}", remedy)
