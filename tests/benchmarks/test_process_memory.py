import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from longtake.memory.strategy import apply

CHOSEN = ("none", "block, inputs and weights on disk")
"""The first is what the other is compared with; the script measures seven."""
TRACED_ALIKE = (*CHOSEN, "4 slices, inputs and weights on disk", "block_keep_attention, all of it on disk")


@pytest.fixture(scope="module")
def benchmark(script: Callable[[str], Any]) -> Any:
    return script("process_memory")


@pytest.mark.slow  # test_plan_accuracy looks at processes in `make test`
@pytest.mark.timeout(900)
def test_the_process_holds_and_saves_the_bytes_of_the_trace(benchmark: Any, tmp_path: Path) -> None:
    """More than 2 GiB in the plain step; bytes and their fall to 5 %. Kernels' own buffers are not in the trace."""
    rows = [*benchmark.rows(CHOSEN, tmp_path)]
    assert min(rows[0].traced, rows[0].measured) > 2 * 2**30
    assert all(row.agrees for row in rows), "\n".join(map(str, rows))
    assert all(row.traced_fall > 0.7 * rows[0].traced for row in rows[1:])


@pytest.mark.parametrize("name", TRACED_ALIKE)
def test_fake_tensors_are_traced_like_real_ones(benchmark: Any, tmp_path: Path, name: str) -> None:
    size = replace(benchmark.WARM_UP, heads=1, latents=(2, 8, 8), clips=1)
    strategy = benchmark.strategies(size.layers)[name]
    benchmark.write_weights(size, tmp_path)
    given = benchmark.training(size, strategy, tmp_path)
    ledger = benchmark.Ledger("cpu", workspaces=False)
    ledger.hold("held", benchmark.tensors(given))
    with (
        tempfile.TemporaryDirectory() as scratch,
        ledger,
        apply(given.transformer, given.spec, strategy, Path(scratch), given.files),
    ):
        benchmark.step(given)
    assert ledger.peak.total() == benchmark.traced_bytes(size, strategy)


def test_a_number_that_is_off_by_more_than_the_tolerance_disagrees(benchmark: Any) -> None:
    assert benchmark.Row("all of it", 1000, 1050, 0, 0).agrees
    assert benchmark.Row("part of it", 1000, 950, 2000, 2100).agrees
    assert not benchmark.Row("too much", 1000, 1051, 2000, 2000).agrees
    assert not benchmark.Row("too little", 1000, 949, 2000, 2000).agrees
    assert not benchmark.Row("falls less", 1000, 1000, 2000, 1899).agrees
