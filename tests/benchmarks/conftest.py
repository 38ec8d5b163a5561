"""Scripts of benchmarks/, and traces of a large model that several tests look at."""

import importlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="session")
def script() -> Iterator[Callable[[str], Any]]:
    """Imports a script by name, as where it runs: beside its neighbours."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module


@pytest.fixture(scope="session")
def step_of_14b(script: Callable[[str], Any]) -> Callable[[str, int], Any]:
    """A traced step of the picture's model under a named strategy, by frames; each is traced once."""
    case, table, training = script("memory_over_time").CASE, script("trace_step"), script("meta_training")

    @cache
    def step(strategy: str, frames: int) -> Any:
        model = table.model_of(case)
        chosen = table.strategies(len(model.transformer.blocks))[strategy]
        return training.trace(model, chosen, training.meta_batch(model.spec, frames, case.size))

    return step
