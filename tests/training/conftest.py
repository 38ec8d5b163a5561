"""One scene of drawn clips a model, prepared once for all tests of training."""

import os
import secrets
from collections.abc import Callable
from pathlib import Path

import pytest

from runs import Scene, scene


@pytest.fixture
def seed() -> int:
    """Another one each time; pytest shows what is printed here where the test fails."""
    chosen = int(os.environ.get("LONGTAKE_SEED") or secrets.randbelow(2**32))
    print(f"LONGTAKE_SEED={chosen} repeats this")
    return chosen


@pytest.fixture(scope="session")
def scenes(tiny_root: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Scene]:
    """`scenes("tiny-i2v")` is the scene of that model; its clips and its cache are only added to."""
    made: dict[str, Scene] = {}

    def of(model: str) -> Scene:
        if model not in made:
            made[model] = scene(model, tiny_root(model), tmp_path_factory.mktemp(model))
        return made[model]

    return of
