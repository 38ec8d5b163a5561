"""What a run is made of, as its loop needs it."""

from dataclasses import dataclass
from pathlib import Path

import torch

from longtake.config.schema import RunConfig
from longtake.distributed.ranks import Ranks
from longtake.memory_gauge import MemoryGauge
from longtake.models.spec import ModelSpec
from longtake.progress import Reporter
from longtake.training.experts import Trained
from longtake.training.fallback import StrategyInForce
from longtake.training.metrics import Metrics
from longtake.training.planned import Forecast
from longtake.training.run_events import RunEvents
from longtake.training.samples import SampleReader
from longtake.training.validation import Validation


@dataclass(frozen=True)
class Parts:
    """Each part is usable on its own. Of several ranks each has its own."""

    config: RunConfig
    run: Path
    trained: tuple[Trained, ...]
    strategy: StrategyInForce
    ranks: Ranks
    samples: SampleReader
    validation: Validation
    metrics: Metrics
    gauge: MemoryGauge
    forecast: Forecast
    device: torch.device
    reporter: Reporter
    events: RunEvents

    @property
    def spec(self) -> ModelSpec:
        """The model's."""
        return self.trained[0].model.spec
