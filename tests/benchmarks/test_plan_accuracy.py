from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

CHOSEN = ("i2v, slices, all on disk", "t2v full, block", "t2v bf16, none")
"""The script measures all."""


@pytest.fixture(scope="module")
def benchmark(script: Callable[[str], Any]) -> Any:
    return script("plan_accuracy")


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_process_takes_the_bytes_that_were_planned(benchmark: Any) -> None:
    """fp32 to 2 % in the median and 6 % at worst, no more than 2 % above the plan; bf16 to 12 %."""
    assert not benchmark.disagreements([*benchmark.rows(CHOSEN)])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # bf16 under trained fp32 norms, on a CPU
def test_every_case_takes_the_bytes_that_were_planned(benchmark: Any) -> None:
    assert not benchmark.disagreements([*benchmark.rows(benchmark.CASES)])


def test_the_cases_are_of_every_kind(benchmark: Any) -> None:
    cases = [*benchmark.CASES.values()]
    assert len(cases) >= 30
    assert {case.subject.spec.task for case in cases} == {"t2v", "i2v", "ti2v"}
    assert {case.clips for case in cases} == {1, 2, 3, 4}
    assert {case.micro_batches for case in cases} == {1, 2}
    assert {(case.rank > 0, case.precision) for case in cases} == {
        (lora, precision) for lora in (True, False) for precision in ("fp32", "bf16")
    }
    for field in ("gradient_checkpointing", "activation_offload", "block_swap_from", "optimizer", "optimizer_offload"):
        values = {getattr(case.memory, field) for case in cases}
        assert len(values) == (3 if field in ("gradient_checkpointing", "activation_offload") else 2), field
    assert any(case.memory.slices > 1 for case in cases)


def test_the_cases_reach_from_0_3_to_4_gib(benchmark: Any) -> None:
    smallest, largest = (benchmark.planned(benchmark.CASES[name]) for name in ("t2v, block", "t2v full, block, larger"))
    assert 0.29 * 2**30 < smallest.nbytes < 0.4 * 2**30
    assert 3.5 * 2**30 < largest.nbytes < 4.2 * 2**30


def test_the_step_that_is_run_has_the_tensors_that_are_planned(benchmark: Any) -> None:
    """The model, its types and what is trained."""
    case = replace(benchmark.CASES["i2v bf16, block"], heads=1)
    meta, real = benchmark.build(case.subject).transformer, benchmark.with_values(case.subject)
    described = [
        {name: (each.shape, each.dtype, each.requires_grad) for name, each in model.named_parameters()}
        for model in (meta, real)
    ]
    assert described[0] == described[1]
    assert {each.device.type for each in (*real.parameters(), *real.buffers())} == {"cpu"}


def test_the_first_run_has_few_blocks_and_all_else_as_it_is(benchmark: Any) -> None:
    for name, blocks in {"i2v full, inputs to disk": 1, "t2v, inputs and weights on disk": 3}.items():
        case = benchmark.CASES[name]
        first = case.warm_up
        assert (first.blocks, first.memory.block_swap, first.micro_batches) == (blocks, blocks - blocks % 3, 1)
        assert (first.heads, first.bucket, first.clips) == (case.heads, case.bucket, case.clips)
        assert first.memory.activation_offload == "disk"


def row(benchmark: Any, precision: str, measured: int) -> Any:
    case = replace(benchmark.CASES["t2v, block"], precision=precision)
    return benchmark.Row("a case", case, benchmark.Planned(1000, 1.0), benchmark.Measured(measured, 1.0))


def test_a_measurement_outside_of_the_bounds_disagrees(benchmark: Any) -> None:
    exact = row(benchmark, "fp32", 1000)

    def disagrees(precision: str, measured: int) -> bool:
        return bool(benchmark.disagreements([exact, exact, row(benchmark, precision, measured)]))

    assert [disagrees("fp32", measured) for measured in (939, 941, 1019, 1021)] == [True, False, False, True]
    assert [disagrees("bf16", measured) for measured in (879, 881, 1119, 1121)] == [True, False, False, True]
    assert benchmark.disagreements([row(benchmark, "fp32", 970)]) == ["median of fp32: 0.030"]


def test_a_row_shows_both_numbers_and_their_ratio(benchmark: Any) -> None:
    case = benchmark.CASES["t2v, block"]
    shown = str(
        benchmark.Row("a case", case, benchmark.Planned(100 * 2**20, 1.0), benchmark.Measured(101 * 2**20, 2.5))
    )
    assert shown == "| a case | 6 x 64, 4 | 4 x 1280 x 1 | 100.0 | 101.0 | 1.010 | 2.5 |"


def test_random_batches_have_the_planned_shapes(benchmark: Any) -> None:
    case = benchmark.CASES["i2v, block"]
    batch, like = benchmark.batch_of(case), benchmark.meta_batch(case.subject.spec, case.bucket, case.clips)
    assert batch.latents.shape == like.latents.shape
    assert batch.conditioning.condition.shape == like.conditioning.condition.shape
    assert bool(((batch.sigma >= 0) & (batch.sigma < 1)).all())
    assert batch.latents.dtype == torch.float32
