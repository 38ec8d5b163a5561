"""The flags that people carry over from existing recipes, as overrides of the config's keys."""

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longtake.config.load import Override


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


def overrides(flags: Flags, path: Path, world_size: int = 1) -> list[Override]:
    """What `flags` set in the config at `path`; a size and an accumulation take their other half from the file."""
    table = _table(path)
    plain = {
        "memory.budget": (flags.budget, "--budget"),
        "data.num_frames": (flags.num_frames, "--num-frames"),
        "parallel.strategy": (flags.training_strategy, "--training-strategy"),
        "lora.rank": (flags.lora_rank, "--lora-rank"),
        "training.learning_rate": (flags.learning_rate, "--learning-rate"),
    }
    found = [Override(key, value, flag) for key, (value, flag) in plain.items() if value is not None]
    if flags.width is not None or flags.height is not None:
        found.append(_size(flags, table))
    if flags.use_gradient_checkpointing or flags.use_gradient_checkpointing_offload:
        found.append(Override("memory.gradient_checkpointing", "block", "--use-gradient-checkpointing"))
    if flags.use_gradient_checkpointing_offload:
        found.append(Override("memory.activation_offload", "host", "--use-gradient-checkpointing-offload"))
    if flags.lora_target_modules is not None:
        targets = [target.strip() for target in flags.lora_target_modules.split(",") if target.strip()]
        found.append(Override("lora.targets", targets, "--lora-target-modules"))
    if flags.gradient_accumulation_steps is not None:
        micro = _get(table, "training", "micro_batch_size", 1)
        size = flags.gradient_accumulation_steps * int(micro) * world_size
        found.append(Override("training.global_batch_size", size, "--gradient-accumulation-steps"))
    return found


def _size(flags: Flags, table: dict[str, Any]) -> Override:
    size = _get(table, "data", "size", [832, 480])
    width, height = size if isinstance(size, list) and len(size) == 2 else (832, 480)
    return Override("data.size", [flags.width or width, flags.height or height], "--width/--height")


def _get(table: dict[str, Any], section: str, key: str, default: Any) -> Any:
    found = table.get(section, {})
    return found.get(key, default) if isinstance(found, dict) else default


def _table(path: Path) -> dict[str, Any]:
    """The file's table, or an empty one where loading it will say what is wrong with it."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
        return {}
