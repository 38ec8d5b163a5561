"""Models trained from random weights for less than a minute follow first images that they were not trained on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.long


def test_less_than_a_minute_of_training_is_enough_to_follow_held_out_first_images(
    script: Callable[[str], Any], tmp_path: Path
) -> None:
    benchmark = script("follows_conditions")
    row = next(row for row in benchmark.SHORT if row.name == "tiny-i2v")
    found = benchmark.measured(row, tmp_path, ("untrained", "trained"))
    assert all(result.holds for result in found), found
