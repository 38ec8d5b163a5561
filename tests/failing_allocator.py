"""An allocator that has no room at chosen moments of a run: hooks of torch raise what CUDA's allocator raises."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook

from longtake.progress import Advance, TimeLeft
from runs import Recorder

MESSAGE = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1.00 GiB of which none is free.\n"
    "If reserved but unallocated memory is large try setting an option."
)
REHEARSAL = -1
When = Literal["forward", "recomputation", "backward"]


@dataclass(frozen=True)
class Failure:
    """One refusal: in step `step` (from 0, or REHEARSAL), in a block of a micro-batch of the step."""

    step: int
    block: int
    when: When
    micro_batch: int = 0


@dataclass
class Progress:
    """Where the run is: micro-batch of the attempt, and how often each block was called for it."""

    step: int = REHEARSAL
    micro_batch: int = -1
    calls: dict[int, int] = field(default_factory=dict)


class FailingAllocator(Recorder):
    """A reporter, which so knows the step, and the allocator that fails once for each of `planned`, in order."""

    def __init__(self, planned: Sequence[Failure], failing_update: int | None = None) -> None:
        super().__init__()
        self.planned = [*planned]
        self.failing_update = failing_update
        self.at = Progress()
        self.attempted: list[StorageWeakRef] = []
        self.survivors = 0

    def bar(
        self, title: str, total: int, unit: str, done: int = 0, left: TimeLeft = lambda _done: None
    ) -> AbstractContextManager[Advance]:
        """Follows the steps."""
        return self._following(done)

    @contextmanager
    def _following(self, done: int) -> Iterator[Advance]:
        def advance(done: int, _text: str) -> None:
            self.at = Progress(done)

        advance(done, "")
        yield advance

    @contextmanager
    def installed(self) -> Iterator["FailingAllocator"]:
        """It fails inside the context."""
        handles = [
            register_module_forward_pre_hook(self._before),
            register_module_forward_hook(self._after),
            register_optimizer_step_pre_hook(self._update),
        ]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()
        assert not self.planned, "the run never came there"

    def _before(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if not torch.is_grad_enabled():
            return
        if isinstance(module, WanTransformer3DModel):
            self.blocks = {id(block): index for index, block in enumerate(module.blocks)}
            self.at.micro_batch += 1
            self.at.calls.clear()
            if self.at.micro_batch == 0:
                self.survivors += sum(not storage.expired() for storage in self.attempted)
                self.attempted.clear()
        elif (index := self._index(module)) is not None:
            calls = self.at.calls[index] = self.at.calls.get(index, 0) + 1
            if calls <= 2:
                self._perhaps_fail(index, "forward" if calls == 1 else "recomputation")

    def _after(self, module: nn.Module, _arguments: tuple[Any, ...], output: Any) -> None:
        index = self._index(module) if torch.is_grad_enabled() else None
        if index is None:
            return
        assert isinstance(output, Tensor)
        self.attempted.append(StorageWeakRef(output.untyped_storage()))
        if output.requires_grad and self.at.calls[index] == 1:
            output.register_hook(lambda _gradient: self._perhaps_fail(index, "backward"))

    def _index(self, module: nn.Module) -> int | None:
        return getattr(self, "blocks", {}).get(id(module))

    def _perhaps_fail(self, block: int, when: When) -> None:
        if self.planned and self.planned[0] == Failure(self.at.step, block, when, self.at.micro_batch):
            del self.planned[0]
            self.at = Progress(self.at.step)
            raise torch.OutOfMemoryError(MESSAGE)

    def _update(self, *_: Any) -> None:
        if self.at.step == self.failing_update:
            raise torch.OutOfMemoryError(MESSAGE)
