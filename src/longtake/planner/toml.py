"""Writing a plan as a TOML that `longtake train` accepts. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from longtake.config.dump import to_toml
from longtake.config.schema import RunConfig
from longtake.files import write_text
from longtake.planner.plans import Plan
from longtake.planner.words import plain


def write_toml(config: RunConfig, plan: Plan, path: Path, header: Sequence[str]) -> None:
    """`config` with the strategy, the sharing among ranks and the micro-batch of `plan`, atomically to `path`.

    `header` has the lines of the comment on top. Raises RunError where the file cannot be written.
    """
    write_text(path, planned_toml(config, plan, header))


def planned_toml(config: RunConfig, plan: Plan, header: Sequence[str]) -> str:
    """The text that `write_toml` writes."""
    training = config.training.model_copy(update={"micro_batch_size": plan.micro_batch_size})
    changes = {"memory": plan.strategy, "parallel": plan.parallel, "training": training}
    lines = [line for text in header for line in text.splitlines() or [""]]
    comment = "".join(f"# {plain(line)}".rstrip() + "\n" for line in lines)
    return f"{comment}\n{to_toml(config.model_copy(update=changes))}"
