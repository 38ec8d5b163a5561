"""The flags that people carry over from existing recipes, as overrides of the config's keys."""

import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longtake.config.load import Override, Table
from longtake.config.schema import DataConfig


@dataclass(frozen=True)
class Flags:
    """Flags of `longtake train`; None or False where not given. Each field is the flag's name."""

    budget: str | None = None
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    use_gradient_checkpointing: bool = False
    use_gradient_checkpointing_offload: bool = False
    training_strategy: str | None = None
    lora_rank: int | None = None
    lora_target_modules: str | None = None
    learning_rate: float | None = None
    gradient_accumulation_steps: int | None = None


def overrides(flags: Flags, path: Path, assignments: Sequence[Override] = (), world_size: int = 1) -> list[Override]:
    """What `flags` set in the config at `path`.

    A size takes its other half, and an accumulation its micro-batch, from `assignments`, else from the file.
    """
    table = _table(path)
    given = {override.key: override.value for override in assignments}
    return [
        *_plain(flags),
        *_checkpointing(flags),
        *_size(flags, table, given),
        *_batch(flags, table, given, world_size),
    ]


def _plain(flags: Flags) -> Iterator[Override]:
    values = {
        "memory.budget": (flags.budget, "--budget"),
        "data.num_frames": (flags.num_frames, "--num-frames"),
        "parallel.strategy": (flags.training_strategy, "--training-strategy"),
        "lora.rank": (flags.lora_rank, "--lora-rank"),
        "lora.targets": (_split(flags.lora_target_modules), "--lora-target-modules"),
        "training.learning_rate": (flags.learning_rate, "--learning-rate"),
    }
    for key, (value, flag) in values.items():
        if value is not None:
            yield Override(key, value, flag)


def _checkpointing(flags: Flags) -> Iterator[Override]:
    offload = "--use-gradient-checkpointing-offload"
    if flags.use_gradient_checkpointing or flags.use_gradient_checkpointing_offload:
        flag = "--use-gradient-checkpointing" if flags.use_gradient_checkpointing else offload
        yield Override("memory.gradient_checkpointing", "block", flag)
    if flags.use_gradient_checkpointing_offload:
        yield Override("memory.activation_offload", "host", offload)


def _size(flags: Flags, table: Table, given: Table) -> Iterator[Override]:
    if flags.width is None and flags.height is None:
        return
    size = given.get("data.size", _get(table, "data", "size", DataConfig.model_fields["size"].default))
    if flags.width is None or flags.height is None:
        if not isinstance(size, list | tuple) or len(size) != 2:
            return  # what is no size is named when the file is loaded
        width, height = size
    sides = [width if flags.width is None else flags.width, height if flags.height is None else flags.height]
    flag = "/".join(name for name in ("width", "height") if getattr(flags, name) is not None)
    yield Override("data.size", sides, f"--{flag.replace('/', '/--')}")


def _batch(flags: Flags, table: Table, given: Table, world_size: int) -> Iterator[Override]:
    if flags.gradient_accumulation_steps is None:
        return
    micro = given.get("training.micro_batch_size", _get(table, "training", "micro_batch_size", 1))
    sp = given.get("parallel.sp", _get(table, "parallel", "sp", 1))
    # what is no number is named when the file is loaded; ranks that share a clip count as one
    groups = world_size // sp if type(sp) is int and sp > 0 else world_size
    size = flags.gradient_accumulation_steps * (micro if type(micro) is int else 1) * max(1, groups)
    yield Override("training.global_batch_size", size, "--gradient-accumulation-steps")


def _split(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def _get(table: Table, section: str, key: str, default: Any) -> Any:
    found = table.get(section, {})
    return found.get(key, default) if isinstance(found, dict) else default


def _table(path: Path) -> Table:
    """The file's table, or an empty one where loading it will say what is wrong with it."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError):
        return {}
