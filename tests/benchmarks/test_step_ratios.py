"""Ratios between steps' times that the planner's simulation gives, and those measured on this CPU."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from longtake.planner.hardware import DEVICES, measure_cpu


@pytest.fixture(scope="module")
def ratios(script: Callable[[str], Any]) -> Any:
    return script("step_ratios")


@pytest.fixture(scope="module")
def tiny(ratios: Any) -> Any:
    return replace(ratios.SIZE, layers=4, heads=1, latents=(2, 8, 8))


@pytest.fixture
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_what_is_computed_again_makes_a_planned_step_longer(ratios: Any) -> None:
    seconds = ratios.planned_seconds(ratios.SIZE, DEVICES["cpu"])
    rising = ("no checkpointing", "attention kept", "block", "4 slices", "16 slices", "two micro-batches of 1 clip")
    assert sorted(rising, key=seconds.__getitem__) == list(rising)


def test_on_a_disk_that_hides_nothing_a_planned_step_waits(ratios: Any) -> None:
    slow = replace(DEVICES["cpu"], disk_bytes_per_second=1e6, duplex=False)
    seconds = ratios.planned_seconds(ratios.SIZE, slow)
    for name in ("inputs to disk", "weights on disk", "attention kept, all to disk", "16 slices, all on disk"):
        assert seconds[name] > 5 * seconds["block"]


def test_every_way_is_timed_in_every_round(ratios: Any, tiny: Any, tmp_path: Path) -> None:
    rows = [*ratios.rows(tiny, DEVICES["cpu"], 1, tmp_path)]
    assert [row.name for row in rows] == [*ratios.ways(tiny.layers)][1:]
    assert all(row.measured_seconds > 0 for row in rows)


def test_a_ratio_that_is_off_by_more_than_the_tolerance_disagrees(ratios: Any) -> None:
    assert ratios.Row("slower", "block", 1.0, 1.0, 1.0, 1.14).agrees
    assert ratios.Row("faster", "block", 1.0, 1.0, 1.0, 0.86).agrees
    assert not ratios.Row("slower", "block", 1.0, 1.0, 1.0, 1.16).agrees
    assert not ratios.Row("faster", "block", 1.0, 1.0, 1.0, 0.84).agrees


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("one_thread")
def test_at_least_six_ratios_are_measured_as_planned(ratios: Any, tmp_path: Path) -> None:
    device = measure_cpu("fp32", ratios.MEASURED_SECONDS)
    rows = [*ratios.rows(ratios.SIZE, device, ratios.ROUNDS, tmp_path)]
    assert len(rows) >= 6
    assert all(row.agrees for row in rows), "\n".join(map(str, rows))
