"""What the search may ask of the model that it plans for, whatever it is."""

from __future__ import annotations

from typing import Protocol

from longtake.config.schema import MemoryStrategy, ParallelConfig
from longtake.models.spec import ModelSpec
from longtake.planner.composition import Composed
from longtake.planner.load import Load
from longtake.planner.recorded import Recording


class Parts(Protocol):
    """Gives the search steps of the model that is planned, whatever it is."""

    @property
    def spec(self) -> ModelSpec:
        """The model's."""

    @property
    def blocks(self) -> int:
        """Of the whole model."""

    @property
    def drops_out(self) -> bool:
        """Whether blocks draw dropout, which no slices may."""

    @property
    def frozen(self) -> bool:
        """Whether there are frozen weights that can be streamed or quantised."""

    def distributed(self, strategy: MemoryStrategy, load: Load, parallel: ParallelConfig, gpus: int) -> Composed:
        """The step of one of `gpus` ranks."""

    def recording(self, strategy: MemoryStrategy, load: Load) -> Recording:
        """The passes of a few blocks."""

    def slack_bytes(self, strategy: MemoryStrategy, load: Load, generation: str, expandable: bool) -> int:
        """What the allocator reserves beyond what is allocated."""
