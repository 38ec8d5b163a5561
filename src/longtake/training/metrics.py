"""What a run writes down while it goes: metrics.jsonl, TensorBoard events, and Weights & Biases where asked for."""

import json
import math
from pathlib import Path
from typing import Any

from longtake import files
from longtake.errors import ConfigError, Problem
from longtake.training.events import Events

FILE = "metrics.jsonl"


class Metrics:
    """The run's log. Lines after the checkpoint that a run resumes from are dropped, so none is there twice.

    `resumed_step` is that checkpoint's, None where there is none: then every line is dropped. Of several ranks one
    `writes`, the others only know what there is.
    """

    def __init__(
        self, run: Path, resumed_step: int | None, wandb_project: str, settings: dict[str, Any], writes: bool = True
    ) -> None:
        self.path = run / FILE
        self.writes = writes
        first_dropped = 0 if resumed_step is None else resumed_step + 1
        self.kept = [line for line in read_metrics(self.path) if line["step"] < first_dropped]
        if not writes:
            return
        self.wandb = _wandb(wandb_project, run, settings) if wandb_project else None
        files.write_text(self.path, "".join(json.dumps(line) + "\n" for line in self.kept))
        self.file = files.Appended(self.path)
        self.events = Events(run, first_dropped)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One line for `step`, null where a number is not finite; numbers go to TensorBoard and W&B too.

        Raises RunError where the disk refuses it.
        """
        if not self.writes:
            return
        values = {key: None if _not_finite(value) else value for key, value in values.items()}
        self.file.write((json.dumps({"step": step, **values}) + "\n").encode())
        numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
        self.events.write(step, numbers)
        if self.wandb is not None:
            self.wandb.log(numbers, step=step)

    def flush(self) -> None:
        """Has every line written so far on the disk, as a checkpoint that follows it will be."""
        if not self.writes:
            return
        self.file.sync()

    def has_validation(self, step: int) -> bool:
        """Whether the lines kept from before hold a validation at `step`."""
        return any(line["step"] == step and "validation_loss" in line for line in self.kept)

    def close(self) -> None:
        """Ends all logs."""
        if not self.writes:
            return
        self.file.close()
        self.events.close()
        if self.wandb is not None:
            self.wandb.finish()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; the last may be cut off by a kill and is then left out."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def _not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _wandb(project: str, run: Path, settings: dict[str, Any]) -> Any:
    try:
        import wandb
    except ImportError:
        remedy = "pip install 'longtake[logging]', or leave the key out"
        raise ConfigError(
            Problem("wandb is not installed", "output.wandb", remedy, code="wandb-not-installed")
        ) from None
    return wandb.init(project=project, name=run.name, dir=str(run), config=settings, id=run.name, resume="allow")
