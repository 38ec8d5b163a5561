from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

GIB = 2**30
MEMORY = Path(__file__).parents[2] / "docs" / "memory.md"
RANK = 8
FRAMES = (49, 81)


@pytest.fixture(scope="module")
def table(script: Callable[[str], Any]) -> Any:
    return script("trace_step")


@pytest.fixture(scope="module")
def tiny(table: Any) -> Any:
    return table.Case("tiny-i2v", (160, 96), RANK)


@pytest.fixture(scope="module")
def found(table: Any, tiny: Any) -> Iterator[Any]:
    with ThreadPoolExecutor(1) as workers:
        yield table.steps(tiny, [*table.strategies(4)], FRAMES, workers)


def test_every_named_strategy_is_traced_at_every_length(table: Any, found: Any) -> None:
    assert set(found) == {(name, frames) for name in table.strategies(4) for frames in FRAMES}
    assert all(step.peak.total() > 0 and step.flops > 0 for step in found.values())


def test_the_most_frugal_strategy_takes_least(table: Any, found: Any) -> None:
    totals = {name: found[name, FRAMES[-1]].peak.total() for name in table.strategies(4)}
    assert min(totals, key=lambda name: totals[name]) == table.MOST_FRUGAL
    assert max(totals, key=lambda name: totals[name]) == "no checkpointing"


def test_every_exact_strategy_quantises_nothing(table: Any) -> None:
    quantised = {name for name, strategy in table.strategies(40).items() if strategy.quantization != "none"}
    assert quantised == set(table.QUANTISED)


def test_the_tables_have_a_line_for_each_strategy(table: Any, tiny: Any, found: Any) -> None:
    names = [*table.strategies(4)]
    peaks = [*table.peaks(found, tiny, names, FRAMES)]
    assert peaks[2] == "| tokens | 780 | 1,260 | |"
    for lines in (peaks[3:], [*table.breakdown(found, names, 81)][2:], [*table.costs(found, names, 81)][2:]):
        assert [line.split(" | ")[0] for line in lines] == [f"| {name}" for name in names]


def test_a_card_gets_the_exact_strategy_that_fits_and_computes_least(table: Any, found: Any) -> None:
    names = [*table.strategies(4)]
    large, *_, small = [*table.cards(found, names, (81,))][2:]
    assert large.startswith("| 80 | no checkpointing: ")
    assert small.startswith("| 16 | no checkpointing: ")
    peak = found["per block, attention kept", 81].peak.total()
    chosen = table._for_card(found, names, 81, peak / (1 - table.SPARE) / GIB * 1.0001)
    assert chosen.startswith("per block, attention kept: ")
    assert table._for_card(found, names, 81, 0) == "none"


def test_growth_is_bytes_over_tokens(table: Any, tiny: Any, found: Any) -> None:
    fewer, more = (found[table.PLAIN, frames].peak.total() for frames in (49, 81))
    assert table.bytes_a_token(found, tiny, table.PLAIN, (49, 81)) == (more - fewer) / 480


def test_the_reconciliation_ends_at_the_table(table: Any, tiny: Any, found: Any) -> None:
    changes = [*table.reconciliation(table.model_of(tiny), tiny, 81)]
    assert [what for what, _ in changes[1:]] == [what for what, _ in table.CHANGES]
    assert changes[-1][1] == found[table.PLAIN, 81].peak.total()
    assert [*table.way(changes)][-1].endswith(f" {table.gib(changes[-1][1])} |")


def test_what_is_alive_at_the_peak_is_told_with_what_made_it(table: Any, tiny: Any) -> None:
    lines = [*table.explained(tiny, table.MOST_FRUGAL, 81)]
    assert len(lines) == 40
    assert any("weights    held" in line for line in lines)


def test_the_first_table_can_have_one_length_alone(table: Any, tiny: Any, found: Any) -> None:
    assert [*table.peaks(found, tiny, [table.PLAIN], (81,))][-1].endswith("|  |")


@pytest.mark.long
def test_plain_checkpointing_of_the_14b_reconciles_with_another_trace_to_half_a_gib(
    table: Any, script: Callable[[str], Any], step_of_14b: Callable[[str, int], Any]
) -> None:
    case = script("memory_over_time").CASE
    changes = [*table.reconciliation(table.model_of(case), case, 129)]
    assert abs(changes[0][1] - table.OF_ANOTHER_TRACE * GIB) < 0.5 * GIB
    assert changes[-1][1] == step_of_14b(table.PLAIN, 129).peak.total()
    assert abs(changes[-1][1] - table.OF_ANOTHER_TRACE * GIB) < 0.5 * GIB


@pytest.mark.long
@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("checkpointing by block", "per block"),
        ("by block, inputs to the host, 40 blocks swapped", "inputs to host, all swapped"),
        ("… not keeping it, AdamW's states in host memory", "most frugal"),
    ],
)
def test_the_page_on_memory_has_the_numbers_of_the_trace(
    line: str, name: str, step_of_14b: Callable[[str, int], Any]
) -> None:
    cells = next(row for row in MEMORY.read_text(encoding="utf-8").splitlines() if row.startswith(f"| {line} |"))
    step, plain_flops = step_of_14b(name, 129), step_of_14b("no checkpointing", 129).flops
    moved = [step.host_bytes, step.moved["inward"], step.moved["outward"]]
    found = [f"{count / GIB:.1f}" if count else "" for count in (step.peak.total(), *moved)]
    assert [cell.strip() for cell in cells.split("|")[2:7]] == [*found, f"{100 * (step.flops / plain_flops - 1):.1f} %"]


@pytest.mark.long
def test_the_most_frugal_step_of_the_14b_at_129_frames_fits_into_12_gib(
    table: Any, step_of_14b: Callable[[str, int], Any]
) -> None:
    peak = step_of_14b(table.MOST_FRUGAL, 129).peak
    on_device = 2 * peak["adapters"]  # Adam's two moments, which this strategy has in host memory
    assert peak.total() + on_device < 12 * GIB


@pytest.mark.long
def test_the_most_frugal_peak_of_the_14b_grows_by_at_most_130_kb_a_token(
    table: Any, script: Callable[[str], Any], step_of_14b: Callable[[str, int], Any]
) -> None:
    names, frames = (table.PLAIN, table.MOST_FRUGAL), (81, 129)
    found = {(name, each): step_of_14b(name, each) for name in names for each in frames}
    plain, frugal = (table.bytes_a_token(found, script("memory_over_time").CASE, name, frames) for name in names)
    assert frugal < 0.13e6
    assert plain > 5 * frugal
