"""What of [memory] and [parallel] cannot go together on so many ranks."""

from typing import Any

import pytest

from longtake.config.schema import MemoryStrategy, ParallelConfig
from longtake.config.sharing import sharing_conflicts

ENGINES = ("ddp", "fsdp2", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3")


def said(parallel: dict[str, Any], ranks: int = 4, heads: int | None = 12, **memory: Any) -> list[str]:
    found = sharing_conflicts(MemoryStrategy(**memory), ParallelConfig(**parallel), ranks, heads)
    return [str(problem) for problem in found]


@pytest.mark.parametrize(
    ("parallel", "memory", "line"),
    [
        ({"strategy": "single"}, {}, "parallel.strategy: 4 ranks under 'single'; use"),
        (
            {"strategy": "ddp", "offload": "optimizer"},
            {},
            "parallel.offload: ddp does not keep it in host memory; leave",
        ),
        ({"strategy": "fsdp2", "offload": "parameters"}, {}, "parallel.offload: fsdp2 does not keep it in host"),
        (
            {"strategy": "deepspeed_stage_2", "offload": "parameters"},
            {},
            "parallel.offload: deepspeed_stage_2 does not keep it in host memory; leave it out, or use "
            'parallel.strategy = "deepspeed_stage_3"',
        ),
        (
            {"strategy": "fsdp2", "sp": 3},
            {},
            "parallel.sp: 4 ranks and 12 heads cannot be shared out 3 ways; use one of",
        ),
        (
            {"strategy": "fsdp2", "sp": 4},
            {"attention_head_groups": 4},
            "memory.attention_head_groups: a rank has 3 heads in attention; at most 3",
        ),
        (
            {"strategy": "ddp", "dp_replicate": 2},
            {},
            "parallel.dp_replicate: ddp has no groups that each have all shards; use 1",
        ),
        (
            {"strategy": "fsdp2", "dp_replicate": 3},
            {},
            "parallel.dp_replicate: 4 ranks that share clips 1 ways are no 3",
        ),
        (
            {"strategy": "fsdp2", "sp": 4, "dp_replicate": 2},
            {},
            "parallel.dp_replicate: 4 ranks that share clips 4 ways",
        ),
        (
            {"strategy": "deepspeed_stage_3"},
            {"slices": 4},
            "memory.slices: deepspeed_stage_3 gathers the weights of a layer while it is called, and a slice calls it",
        ),
        (
            {"strategy": "deepspeed_stage_3"},
            {"attention_head_groups": 4},
            "memory.attention_head_groups: deepspeed_sta",
        ),
    ],
)
def test_what_cannot_be_shared_is_one_line_with_a_way_out(
    parallel: dict[str, Any], memory: dict[str, Any], line: str
) -> None:
    (found,) = said(parallel, **memory)
    assert found.startswith(line)
    assert ";" in found


@pytest.mark.parametrize("strategy", [name for name in ENGINES if name != "ddp"])
@pytest.mark.parametrize(
    ("memory", "where"),
    [
        ({"block_swap": 20}, "memory.block_swap"),
        ({"quantization": "int8"}, "memory.quantization"),
        ({"optimizer_offload": True}, "memory.optimizer_offload"),
        ({"optimizer": "adamw8bit"}, "memory.optimizer"),
    ],
)
@pytest.mark.parametrize("ranks", [1, 4])
def test_what_moves_or_changes_weights_itself_is_under_ddp_alone(
    strategy: str, memory: dict[str, Any], where: str, ranks: int
) -> None:
    (found,) = said({"strategy": strategy}, ranks, **memory)
    assert found.startswith(f"{where}: {strategy} ")
    assert said({"strategy": "ddp"}, ranks, **memory) == []


def test_segments_of_several_blocks_are_refused_where_blocks_are_gathered() -> None:
    refused = {name for name in ENGINES if said({"strategy": name}, checkpoint_every=2)}
    assert refused == {"fsdp2", "deepspeed_stage_3"}


@pytest.mark.parametrize("strategy", ["auto", "single", *ENGINES])
def test_every_engine_runs_on_one_rank(strategy: str) -> None:
    assert said({"strategy": strategy}, ranks=1) == []


@pytest.mark.parametrize(
    ("parallel", "ranks"),
    [
        ({"strategy": "auto", "sp": 2}, 4),
        ({"strategy": "auto", "offload": "parameters"}, 4),
        ({"strategy": "deepspeed_stage_2", "offload": "optimizer"}, 4),
        ({"strategy": "deepspeed_stage_3", "offload": "parameters", "sp": 2}, 4),
        ({"strategy": "fsdp2", "dp_replicate": 2}, 4),
        ({"strategy": "fsdp2", "dp_replicate": 2, "sp": 4}, 16),
        ({"strategy": "fsdp2", "sp": 8}, 8),
    ],
)
def test_what_can_be_shared_is_let_through(parallel: dict[str, Any], ranks: int) -> None:
    assert said(parallel, ranks) == []
    assert said(parallel, ranks, heads=None) == []


def test_ranks_may_have_unequal_numbers_of_heads_but_each_has_one() -> None:
    assert said({"strategy": "ddp", "sp": 8}, ranks=8, heads=12) == []
    (found,) = said({"strategy": "ddp", "sp": 16}, ranks=16, heads=12)
    assert found.startswith("parallel.sp: 16 ranks and 12 heads cannot be shared out 16 ways; use one of 1, 2, 4, 8 [")


def test_a_degree_needs_ranks_and_says_so_where_there_is_one() -> None:
    (found,) = said({"sp": 2}, ranks=1, heads=None)
    assert found == "parallel.sp: 1 ranks cannot be shared out 2 ways; use one of 1 [rank-share-uneven]"
