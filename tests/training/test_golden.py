"""The losses of twenty steps are those that are committed: whoever changes the objective has to say so."""

from collections.abc import Callable
from pathlib import Path

import pytest

from golden import BOUND, RUNS, farthest, read, run


@pytest.mark.parametrize("name", RUNS)
def test_losses_are_those_that_are_committed(tiny_root: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    found = run(name, tiny_root(name), tmp_path)
    assert len(found["loss"]) == 20
    assert farthest(found, read()[name]) <= BOUND, f"`python tests/golden.py` writes them anew; now they are {found}"


@pytest.mark.parametrize("name", RUNS)
def test_what_is_committed_is_of_runs_that_learn(name: str) -> None:
    before, after = read()[name]["validation_loss"]
    assert after < 0.95 * before
