"""Every engine trains as one process does, on two ranks and on four; a gradient of the wrong size is noticed."""

from collections.abc import Sequence
from typing import Any

import pytest

from engine_cases import BOUNDS, ENGINES, Case, Compared, compared, matrix

FULL: dict[str, Any] = {"lora": False, "optimizer": "adamw", "clip_norm": 1.0}
SLICED: dict[str, Any] = {"memory": {"slices": 3, "attention_head_groups": 2}, "steps": 6}
KEPT: dict[str, Any] = {"memory": {"gradient_checkpointing": "block_keep_attention", "activation_offload": "host"}}
FP16: dict[str, Any] = {"precision": "fp16", "steps": 6}
UNLIKE: dict[str, Any] = {"adapters": {"dora": True, "rslora": True, "block_ranks": [[1, 2, 6]]}, "steps": 6}
"""Every kind of adapter at once, and B learns faster than A."""
CLASSES = {
    "ddp": ("DataParallel", "DistributedDataParallel"),
    "fsdp2": ("FullyShardedData", "FSDPWanTransformer3DModel"),
    **{f"deepspeed_stage_{stage}": ("ZeRO", "DeepSpeedEngine") for stage in (1, 2, 3)},
}


def case(strategy: str, way: dict[str, Any] | None = None, **parallel: Any) -> Case:
    """LoRA under SGD in fp32, or another way."""
    return Case({"strategy": strategy, **parallel}, **(way or {}))


def wrong(optimizer: str) -> Case:
    """Ranks that share clips, and a loss that one factor too many was put on."""
    return case("ddp", {"optimizer": optimizer, "gradient_factor": 2.0}, sp=2)


ON_TWO = [
    case("ddp", FULL | {"memory": {"activation_offload": "host"}}),
    case("ddp", FP16),
    case("fsdp2", FULL),
    case("fsdp2", SLICED),
    case("fsdp2", {"precision": "bf16"}),
    case("deepspeed_stage_1"),
    case("deepspeed_stage_2", FULL, offload="optimizer"),
    case("deepspeed_stage_2", FP16),
    case("deepspeed_stage_3", KEPT),
    case("deepspeed_stage_3", FULL, offload="parameters"),
    case("ddp", sp=2),
    case("ddp", SLICED, sp=2),
    case("fsdp2", KEPT | {"steps": 6}, sp=2),
    case("ddp", FULL | UNLIKE | {"lora": True}, sp=2),
    case("fsdp2", SLICED | FULL | UNLIKE | {"lora": True}),
    case("deepspeed_stage_3", FULL | UNLIKE | {"lora": True}),
]
WRONG = [wrong("sgd"), wrong("adamw")]
ON_FOUR = [
    case("ddp", sp=2),
    case("fsdp2", FULL, dp_replicate=2),
    case("fsdp2", sp=2, dp_replicate=2),
]


@pytest.fixture(scope="module")
def on_two() -> list[Compared]:
    """One launch for all tests."""
    return compared(2, [*ON_TWO, *WRONG], 800)


@pytest.fixture(scope="module")
def on_four() -> list[Compared]:
    """Likewise."""
    return compared(4, ON_FOUR, 800)


def assert_agreement(found: Sequence[Compared]) -> None:
    assert {str(each.case): str(each) for each in found if not each.agrees} == {}


@pytest.mark.long
@pytest.mark.timeout(900)
def test_every_engine_on_two_ranks_trains_as_one_process(on_two: list[Compared]) -> None:
    assert_agreement(on_two[: len(ON_TWO)])


@pytest.mark.long
@pytest.mark.timeout(900)
def test_ranks_that_share_clips_beside_others_and_replicas_of_shards_train_as_one_process(
    on_four: list[Compared],
) -> None:
    assert_agreement(on_four)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_engine_in_force_is_the_one_that_was_asked_for_and_shares_out_what_it_should(
    on_two: list[Compared], on_four: list[Compared]
) -> None:
    for ranks, found in ((2, on_two), (4, on_four)):
        for each in found:
            parallel, outcome = each.case.parallel, each.outcome
            assert (outcome.engine, outcome.module) == CLASSES[parallel["strategy"]]
            assert outcome.ranks == ranks
            assert len(outcome.held) == ranks
            parts = 1 if parallel["strategy"] == "ddp" else ranks // parallel.get("dp_replicate", 1)
            whole = sum(outcome.held) * parts / ranks
            assert max(outcome.held) <= 1.02 * whole / parts, str(each.case)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_an_overflow_in_fp16_skips_the_same_steps_under_every_engine(on_two: list[Compared]) -> None:
    found = [each for each in on_two if each.case.precision == "fp16"]
    assert {each.case.parallel["strategy"] for each in found} == {"ddp", "deepspeed_stage_2"}
    for each in found:
        assert any(each.expected.skipped)
        assert not all(each.expected.skipped)
        assert each.outcome.skipped == each.expected.skipped


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_gradient_of_the_wrong_size_is_noticed_under_sgd_and_nearly_missed_under_adamw(
    on_two: list[Compared],
) -> None:
    plain, adamw = on_two[len(ON_TWO) :]
    loss, _, weight = BOUNDS["fp32"]
    assert not plain.agrees
    assert plain.loss > 1000 * loss
    assert plain.weight > 1000 * weight
    assert adamw.loss < plain.loss / 1000
    assert adamw.weight < plain.weight / 1000
    assert adamw.norm > 0.9  # the norm alone tells


@pytest.mark.slow
@pytest.mark.timeout(5400)
@pytest.mark.parametrize("ranks", ENGINES)
def test_the_whole_matrix_trains_as_one_process(ranks: int) -> None:
    assert_agreement(compared(ranks, matrix(ranks), 5400))
