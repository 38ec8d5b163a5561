from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.long


def test_planning_takes_no_more_memory_than_promised_and_not_much_more_time(script: Callable[[str], Any]) -> None:
    """The time's bound is the script's own, which `make bench` holds on a machine that does nothing else."""
    benchmark = script("plan_seconds")
    benchmark.REPETITIONS = 1
    row = benchmark.measured(16, 1)
    assert row["bytes"] <= benchmark.MOST_BYTES
    assert row["plan"] <= 6 * benchmark.MOST_SECONDS
