from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from longtake.memory.copies import CpuCopies

TRIES = 3
"""Other programs on the machine spoil timings; a scheduling that does not hide copies fails every time."""


@pytest.fixture(scope="module")
def benchmark(script: Callable[[str], Any]) -> Any:
    return script("prefetch")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_prefetch_hides_a_slow_disk_and_costs_nothing_on_a_fast_one(benchmark: Any, tmp_path: Path) -> None:
    """Of copies that would take 40 to 60 % of the step at least 75 % hidden; without limit at most 5 % more time."""
    benchmark.write_weights(benchmark.SIZE, tmp_path)
    strategy = benchmark.strategies(benchmark.SIZE.layers)["inputs"]
    tries = []
    for _ in range(TRIES):
        found = benchmark.compare(benchmark.SIZE, strategy, tmp_path)
        tries.append(benchmark.row("inputs", found))
        held = 0.4 <= found.waiting_share <= 0.6 and found.hidden >= 0.75 and found.unlimited_ratio <= 1.05
        if held:
            break
    assert held, "\n".join(tries)


def test_a_waiting_copy_is_done_when_it_has_been_started(benchmark: Any) -> None:
    copies = benchmark.Waiting(CpuCopies())
    source, target = (torch.full((64,), value, dtype=torch.uint8) for value in (7, 0))
    event = copies.start("inward", target, source, [])
    assert event.done()
    assert torch.equal(source, target)
    assert copies.moved_bytes == 64
    copies.close()


def test_what_is_hidden_is_a_share_of_what_waiting_costs(benchmark: Any) -> None:
    found = benchmark.Found(1e6, 10, plain=1.0, waiting=2.0, prefetched=1.25, unlimited_ratio=1.0)
    assert (found.waiting_share, found.hidden) == (0.5, 0.75)
