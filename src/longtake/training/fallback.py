"""The memory strategy in force: the configured one, and, after running out of device memory, the next fallback."""

import gc
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from longtake.config.schema import MemoryStrategy
from longtake.distributed.ranks import ALONE, Ranks
from longtake.errors import ConfigError, Problem, RunError, agreed
from longtake.memory.accounting import Workload, check, free_for, needs, together
from longtake.memory.copies import copies_for
from longtake.memory.strategy import ALONE as NO_OTHERS
from longtake.memory.strategy import Among, apply, ladder
from longtake.memory.turns import Turns
from longtake.training.model import TrainedModel
from longtake.training.run_folder import SCRATCH

Computed = TypeVar("Computed")


class StrategyInForce:
    """A context in which a memory strategy is applied to the models that `run` trains; `current` is the one in force.

    Several models with frozen weights take turns on the device. After the strategy come the configured strategy's
    `fallbacks`, or the fixed ladder where it has none.
    """

    def __init__(
        self,
        models: Sequence[TrainedModel],
        configured: MemoryStrategy,
        workload: Workload,
        run: Path,
        say: Callable[[str], None],
        ranks: Ranks = ALONE,
        among: Among = NO_OTHERS,
    ) -> None:
        self.models = models
        self.configured = self.current = configured
        first = models[0]
        self.waiting = [*(configured.fallbacks or ladder(configured, first.transformer, first.spec))]
        self.workload = workload
        self.run = run
        self.say = say
        self.ranks = ranks
        self.among = among
        self.scratch = run / SCRATCH if ranks.world == 1 else run / SCRATCH / f"rank-{ranks.rank}"
        self.applied = ExitStack()

    def check(self) -> None:
        """Raises ConfigError where host or disk cannot hold what the configured strategy moves there.

        To be asked before the optimiser's states are allocated, which are counted.
        """
        self._check(self.configured)

    def __enter__(self) -> "StrategyInForce":
        """Applies the configured strategy, or a fallback where the device has no room for what it holds itself.

        Raises ConfigError where the model does not allow it, RunError where host or disk refuse.
        """
        moment = "before the first step"
        if failure := self._apply(self.configured, moment):
            self._fall_back(moment, failure)
        return self

    def __exit__(self, *_: object) -> None:
        """Takes the strategy off."""
        self.applied.close()

    def attempt(
        self, compute: Callable[[], Computed], moment: str, drop: Callable[[], None] | None
    ) -> tuple[Computed, int]:
        """What `compute` gives, a forward and backward pass that can be made again, and how often memory ran out in it.

        Each time `drop` drops the gradients and the next fallback is applied. All ranks go the same way; where they
        wait for each other inside of `compute` none can be called back, and `drop` is None. `moment` says in the log
        when it happened. Raises RunError where no fallback is left, or none can be gone to.
        """
        retries = 0
        while True:
            tried = _tried(compute)
            # Here the exception is gone, and with it the frames that held the failed attempt's activations.
            failed = isinstance(tried, OutOfMemory)
            if drop is None:
                if isinstance(tried, OutOfMemory):
                    raise out_of_memory(f"{tried.message}, in {moment}, on rank {self.ranks.rank}", self.run)
                return tried, retries
            if not self.ranks.any(failed):
                assert not isinstance(tried, OutOfMemory)
                return tried, retries
            failure = tried if isinstance(tried, OutOfMemory) else ELSEWHERE
            del tried
            retries += 1
            self.say(f"{moment}: {failure.described()} with {in_words(self.current)}")
            drop()
            self.applied.close()
            self._fall_back(moment, failure)

    def difference(self) -> dict[str, Any]:
        """The fields of [memory] in which the strategy in force is not the configured one."""
        before, now = settings(self.configured), settings(self.current)
        return {field: value for field, value in now.items() if before[field] != value}

    def _fall_back(self, moment: str, failure: "OutOfMemory") -> None:
        """Applies the next fallback that the model, host and disk allow; none is applied when this is called."""
        while self.waiting:
            strategy = self.waiting.pop(0)
            try:
                self._refuse(strategy)
                failed = self._apply(strategy, moment)
            except ConfigError as error:
                self.say(f"{moment}: not going on with {in_words(strategy)}: {error}")
                continue
            if failed is None:
                self.say(f"{moment}: going on with {in_words(strategy)}")
                return
        raise agreed(out_of_memory(f"{failure.message}; no other memory strategy is left", self.run))

    def _apply(self, strategy: MemoryStrategy, moment: str) -> "OutOfMemory | None":
        """None, or how the device had no room for what `strategy` itself holds there; then nothing is applied."""
        _release()
        self.current = strategy
        tried = _tried(lambda: self._enter(strategy))
        failed = isinstance(tried, OutOfMemory)
        if not self.ranks.any(failed):
            return None
        self.applied.close()
        failure = tried if isinstance(tried, OutOfMemory) else ELSEWHERE
        self.say(f"{moment}: {failure.described()} when applying {in_words(strategy)}")
        return failure

    def _enter(self, strategy: MemoryStrategy) -> None:
        """Applies `strategy` to every model."""
        among = self.among
        if self.turns:
            turns = self.applied.enter_context(closing(Turns(copies_for(self.device))))
            among = replace(among, turns=turns)
        for model in self.models:
            scratch = self.scratch / model.expert.noise
            places = (scratch, model.weight_files)
            self.applied.enter_context(apply(model.transformer, model.spec, strategy, *places, among=among))

    def _refuse(self, strategy: MemoryStrategy) -> None:
        """Raises ConfigError on every rank where host or disk of one cannot hold what a fallback moves there."""
        refusal = ConfigError(Problem("another rank has no room for it", code="rank-without-room"))
        try:
            self._check(strategy.model_copy(update={"optimizer_offload": False}))  # its states are there already
            refused = False
        except ConfigError as error:
            refusal, refused = error, True
        if self.ranks.any(refused):
            raise refusal

    def _check(self, strategy: MemoryStrategy) -> None:
        """The models' needs together: only one computes at a time, whose activations are counted once."""
        of_each = [
            needs(each.transformer, each.spec, strategy, self.workload, each.weight_files, self.turns)
            for each in self.models
        ]
        free = free_for(self.device, self.scratch)
        beside = self.ranks.local_world  # each of them needs as much
        check(
            together(of_each),
            replace(free, host_bytes=free.host_bytes // beside, disk_bytes=free.disk_bytes // beside),
        )

    @property
    def device(self) -> torch.device:
        """Where the models compute."""
        return next(iter(self.models[0].parameters.values())).device

    @property
    def turns(self) -> bool:
        """Whether models take turns on the device: frozen ones can, where no engine moves their weights."""
        blocks = [getattr(model.transformer, model.spec.blocks) for model in self.models]
        frozen = all(not all(each.requires_grad for each in own.parameters()) for own in blocks)
        return len(blocks) > 1 and frozen and not self.among.weights


@dataclass(frozen=True)
class OutOfMemory:
    """What is left of a torch.OutOfMemoryError: the first line of its message, without advice and statistics."""

    message: str

    def described(self) -> str:
        """In a log's words, with the bytes that were asked for where the message has them."""
        if self is ELSEWHERE:
            return self.message
        wanted = re.search(r"Tried to allocate ([\d.]+ \w+)", self.message)
        return f"out of device memory{f' ({wanted[1]} asked for)' if wanted else ''}"


ELSEWHERE = OutOfMemory("another rank ran out of device memory")


def settings(strategy: MemoryStrategy) -> dict[str, Any]:
    """The fields of [memory] that say what is applied: all but the budget and the fallbacks."""
    return strategy.model_dump(exclude={"budget", "fallbacks"})


def in_words(strategy: MemoryStrategy) -> str:
    """The fields of [memory] that differ from their defaults, and always `gradient_checkpointing`."""
    told = {
        name: value
        for name, value in settings(strategy).items()
        if name == "gradient_checkpointing" or value != MemoryStrategy.model_fields[name].default
    }
    return ", ".join(f"{name} = {_toml(value)}" for name, value in told.items())


def out_of_memory(message: str, run: Path) -> RunError:
    """The error that ends a run for which the device is too small."""
    remedy = (
        "use fewer data.num_frames, a smaller training.micro_batch_size or memory.activation_offload, then --resume"
    )
    return RunError(Problem(f"the device ran out of memory ({message})", str(run), remedy, code="memory-device-full"))


def first_line(error: torch.OutOfMemoryError) -> str:
    """What the allocator said, without its advice and statistics."""
    return (str(error).splitlines() or [""])[0]


def _tried(run: Callable[[], Computed]) -> Computed | OutOfMemory:
    """What `run` returns; where the device has no room, nothing of the exception outlives the call."""
    try:
        return run()
    except torch.OutOfMemoryError as error:
        return OutOfMemory(first_line(error))


def _release() -> None:
    """Gives back what a failed attempt held: checkpointing and exceptions leave cycles, the allocator keeps blocks."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)
