"""The transformers of a run, each with its engine, and which of them a step trains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import count as count_from

from longtake.config.schema import TrainingConfig
from longtake.distributed.backend import Backend, Held
from longtake.training.average import MovingAverage
from longtake.training.model import Expert, TrainedModel
from longtake.training.samples import share_of_range, turn_of_step


@dataclass(frozen=True)
class Trained:
    """A transformer with what trains it; `average` is that of its weights, if there is one."""

    model: TrainedModel
    backend: Backend
    average: MovingAverage | None


def share_of(expert: Expert, training: TrainingConfig) -> float:
    """The probability that a sigma of the whole distribution is one of the expert's."""
    return share_of_range(expert.sigma_range, training)


def expert_of_step(step: int, experts: Sequence[Expert], training: TrainingConfig) -> int:
    """Which of the experts optimiser step `step` trains, as a function of it alone: see `turn_of_step`."""
    return turn_of_step(step, [expert.sigma_range for expert in experts], training)


def turns_in_words(experts: Sequence[Expert], training: TrainingConfig) -> str:
    """How many of a run's steps each of two experts has; what to do where one has none."""
    counts = [0] * len(experts)
    for step in range(training.steps):
        counts[expert_of_step(step, experts, training)] += 1
    told = ", ".join(f"{count} of the {each.noise}-noise one" for each, count in zip(experts, counts, strict=True))
    if all(counts):
        return f"{training.steps} steps: {told}"
    idle = counts.index(0)
    needed = next(step + 1 for step in count_from(0) if expert_of_step(step, experts, training) == idle)
    left = f"the {experts[idle].noise}-noise one stays as it is, and would have its first step in a run of {needed}"
    return f"{training.steps} steps: {told}; {left}"


@contextmanager
def averages_in_use(trained: Sequence[Trained]) -> Iterator[None]:
    """Inside the context the weights are their averages, where there are some."""
    with ExitStack() as held:
        for each in trained:
            if each.average is not None:
                held.enter_context(each.average.in_use())
        yield


@contextmanager
def held_of(trained: Sequence[Trained]) -> Iterator[Held]:
    """What this rank holds of all of them, averages included, as a checkpoint names it: `prefix_of` before each."""
    with ExitStack() as held:
        found: Held = {}
        for each in trained:
            groups = {**held.enter_context(each.backend.tensors())}
            if each.average is not None:
                groups["ema"] = each.average.pieces
            prefix = prefix_of(each.model.expert)
            for group, pieces in groups.items():
                found.setdefault(group, []).extend(replace(piece, name=prefix + piece.name) for piece in pieces)
        yield found


def prefix_of(expert: Expert) -> str:
    """What a checkpoint has before the names of an expert's parameters: nothing where there is one transformer."""
    return f"{expert.component}:" if expert.noise else ""
