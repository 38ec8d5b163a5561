"""What a run writes down while it goes: metrics.jsonl, TensorBoard events, and Weights & Biases where asked for."""

import json
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from longtake import files
from longtake.errors import ConfigError, Problem

FILE = "metrics.jsonl"


class Metrics:
    """The run's log. Lines after the step that a run resumes from are dropped, so none is missing or there twice."""

    def __init__(self, run: Path, resumed_step: int, wandb_project: str, settings: dict[str, Any]) -> None:
        self.path = run / FILE
        kept = [line for line in read_metrics(self.path) if line["step"] <= resumed_step]
        files.write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self.file = self.path.open("a", encoding="utf-8")
        self.board = SummaryWriter(str(run), purge_step=resumed_step + 1)
        self.wandb = _wandb(wandb_project, run, settings) if wandb_project else None

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One line for `step`; numbers go to TensorBoard and W&B too."""
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
        for key, value in numbers.items():
            self.board.add_scalar(key, value, step)
        if self.wandb is not None:
            self.wandb.log(numbers, step=step)

    def close(self) -> None:
        """Ends all logs."""
        self.file.close()
        self.board.close()
        if self.wandb is not None:
            self.wandb.finish()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; the last may be cut off by a kill and is then left out."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def _wandb(project: str, run: Path, settings: dict[str, Any]) -> Any:
    try:
        import wandb
    except ImportError:
        remedy = "pip install 'longtake[logging]', or leave the key out"
        raise ConfigError(Problem("wandb is not installed", "output.wandb", remedy)) from None
    return wandb.init(project=project, name=run.name, dir=str(run), config=settings, id=run.name, resume="allow")
