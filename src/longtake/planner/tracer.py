"""Steps of one subject under any strategy, each part recorded once."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property

from longtake.config.schema import MemoryStrategy, ParallelConfig
from longtake.config.sharing import SHARDED
from longtake.models.spec import ModelSpec
from longtake.planner.allocator import CUBLAS_WORKSPACE_BYTES, replay
from longtake.planner.composition import Composed, compose
from longtake.planner.load import Load
from longtake.planner.meta_model import MetaModel, Subject, build, meta_batch
from longtake.planner.parallel import distribute
from longtake.planner.rank_items import rounded
from longtake.planner.recorded import Recording, Update, structure_of
from longtake.planner.recording import record
from longtake.planner.sequence import exchange_of
from longtake.planner.sizes import sizes_of
from longtake.planner.storages import Storages
from longtake.planner.turns import Idle, with_idle
from longtake.planner.update import record_update
from longtake.training.flow_matching import quantile_of
from longtake.training.precision import DTYPES

RECORDED_BLOCKS = 3
"""The first, the last and one that stands for all between them."""
BLOCKS_FOR_SLACK = 12
"""What the allocator reserves beyond what is allocated is found on a model of so many blocks: it is made in the first
ones, as all blocks allocate alike."""


class Tracer:
    """Records what is asked for; `subject` is what everything is about."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.recordings: dict[tuple[MemoryStrategy, Load], Recording] = {}
        self.updates: dict[tuple[str, bool], Update] = {}
        self.slack: dict[tuple[MemoryStrategy, Load, bool, str, bool], int] = {}

    @property
    def spec(self) -> ModelSpec:
        """The model's."""
        return self.subject.spec

    @property
    def blocks(self) -> int:
        """Of the whole model."""
        return self.subject.blocks

    @property
    def frozen(self) -> bool:
        """Whether the model's own weights are."""
        return self.subject.lora is not None

    @property
    def drops_out(self) -> bool:
        """Whether adapters draw dropout."""
        return self.subject.lora is not None and self.subject.lora.dropout > 0

    @cached_property
    def few(self) -> MetaModel:
        """The model with as many blocks as stand for all."""
        return build(self.subject, min(RECORDED_BLOCKS, self.blocks))

    @cached_property
    def whole(self) -> MetaModel:
        """The model with all blocks."""
        return build(self.subject)

    @cached_property
    def trained_values(self) -> int:
        """Parameters that are trained, in the whole model."""
        own = self.few.parameters
        per_block = sum(each.numel() for name, each in own.items() if name.startswith(f"{self.spec.blocks}.0."))
        return sum(each.numel() for each in own.values()) + (self.blocks - self.few.blocks) * per_block

    def composed(self, strategy: MemoryStrategy, load: Load, storages: Storages | None = None) -> Composed:
        """The step of the whole model."""
        recording, update = self.recording(strategy, load), self.update(strategy)
        return compose(recording, update, strategy, self.blocks, load.accumulating, storages)

    def distributed(self, strategy: MemoryStrategy, load: Load, parallel: ParallelConfig, gpus: int) -> Composed:
        """The step of one of `gpus` ranks; of two experts that take turns, either's."""
        composed = self._on_a_rank(strategy, load, parallel, gpus)
        return composed if self.subject.experts == 1 else with_idle(composed, self._idle(strategy, load, parallel))

    def _on_a_rank(self, strategy: MemoryStrategy, load: Load, parallel: ParallelConfig, gpus: int) -> Composed:
        if parallel.strategy in ("single", "auto"):
            return self.composed(strategy, load)
        # the buckets in which DDP reduces gradients are there from the start
        keep_casts = self.frozen or parallel.strategy not in SHARDED
        own = replace(load, accumulating=load.accumulating or parallel.strategy == "ddp", keep_casts=keep_casts)
        sizes = sizes_of(self.few, self.update(strategy))
        itemsize = DTYPES[self.subject.training.precision].itemsize
        exchange = exchange_of(self.spec, load.bucket, load.clips, load.sp, itemsize) if load.sp > 1 else None
        return distribute(self.composed(strategy, own), parallel, gpus, sizes, exchange)

    def _idle(self, strategy: MemoryStrategy, load: Load, parallel: ParallelConfig) -> Idle:
        """Frozen blocks take turns on the device, unless an engine moves weights."""
        recording, training = self.recording(strategy, load), self.subject.training
        turns = self.frozen and parallel.strategy not in SHARDED
        one, swapped = recording.layout.nbytes, strategy.block_swap
        waiting, away = (self.blocks * one, swapped * one) if turns else (0, 0)
        host = strategy.block_swap_from == "host"
        disk = not host and strategy.quantization != "none"  # else the weights are in the model's own files
        boundary = self.spec.boundary_ratio
        share = 1 - quantile_of(boundary, training) if boundary else 0.5
        return Idle(
            resident_bytes=(self.blocks - swapped) * recording.block_weights if turns else 0,
            shared_bytes=(self.blocks - swapped) * rounded(one) if turns else 0,
            host_bytes=waiting if host else 0,
            disk_bytes=waiting if disk else 0,
            swapped_host_bytes=away if host else 0,
            swapped_disk_bytes=away if disk else 0,
            states_host_bytes=self.update(strategy).host_bytes,
            keeps_gradients=parallel.strategy == "ddp",
            changes=2 * min(share, 1 - share),
        )

    def recording(self, strategy: MemoryStrategy, load: Load) -> Recording:
        """The passes of a few blocks; of all, where blocks are recomputed several at a time."""
        key = structure_of(strategy), load
        if key not in self.recordings:
            model = self.few if strategy.checkpoint_every == 1 else self.whole
            with _without_collection():
                batch = meta_batch(self.spec, load.bucket, load.clips, sp=load.sp)
                self.recordings[key] = record(model, key[0], batch, load.accumulating, load.keep_casts)
        return self.recordings[key]

    def update(self, strategy: MemoryStrategy) -> Update:
        """The update of the whole model."""
        key = strategy.optimizer, strategy.optimizer_offload
        if key not in self.updates:
            with _without_collection():
                self.updates[key] = record_update(self.few, strategy)
        return self.updates[key]

    def slack_bytes(self, strategy: MemoryStrategy, load: Load, generation: str, expandable: bool) -> int:
        """What CUDA's allocator reserves for a step beyond the bytes of its tensors, cuBLAS's workspaces included."""
        moves = strategy.activation_offload != "none"
        key = structure_of(strategy), load, moves, generation, expandable
        if key not in self.slack:
            self.slack[key] = self._slack_bytes(strategy, load, generation, expandable)
        return self.slack[key]

    def _slack_bytes(self, strategy: MemoryStrategy, load: Load, generation: str, expandable: bool) -> int:
        recording = self.recording(strategy, load)
        blocks = min(self.blocks, BLOCKS_FOR_SLACK) if recording.blocks < self.blocks else self.blocks
        fewer = strategy.model_copy(update={"block_swap": min(strategy.block_swap, blocks)})
        storages = Storages(recording, blocks)
        storages.hold([CUBLAS_WORKSPACE_BYTES[generation]] * 2)
        composed = compose(recording, self.update(strategy), fewer, blocks, load.accumulating, storages)
        return replay(storages.events, expandable).reserved_bytes - composed.peak_bytes


@contextmanager
def _without_collection() -> Iterator[None]:
    """Searching a model for garbage all the time takes a third of a recording's."""
    enabled = gc.isenabled()
    gc.collect(0)
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
