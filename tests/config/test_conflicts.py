"""What cannot go together: each conflict by its key and with a way out, all of them at once."""

from typing import Any

import pytest

from longtake.config.conflicts import check, conflicts
from longtake.config.schema import RunConfig
from longtake.errors import ConfigError

SMALLEST: dict[str, dict[str, Any]] = {
    "model": {"name": "tiny-t2v"},
    "data": {"source": "clips"},
    "lora": {},
    "output": {"run": "run"},
}


def config(**changes: Any) -> RunConfig:
    """SMALLEST with the keys of `changes` (by section) in it; a section that is None is left out."""
    table = {section: changes.get(section, {}) for section in {**SMALLEST, **changes}}
    merged = {name: {**SMALLEST.get(name, {}), **keys} for name, keys in table.items() if keys is not None}
    return RunConfig.model_validate(merged)


def said(world_size: int = 1, **changes: Any) -> list[str]:
    return [str(problem) for problem in conflicts(config(**changes), world_size)]


def test_the_defaults_go_together() -> None:
    assert said() == []
    assert said(lora=None) == []
    check(config())


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "nearest"),
    [(5, 2, 1, "4 or 6"), (1, 4, 1, "4"), (4, 1, 3, "3 or 6"), (10, 2, 3, "6 or 12"), (7, 7, 2, "14")],
)
def test_a_global_batch_that_does_not_divide_names_the_nearest_that_do(
    batch: int, micro: int, ranks: int, nearest: str
) -> None:
    lines = said(ranks, training={"global_batch_size": batch, "micro_batch_size": micro})
    (line,) = [line for line in lines if line.startswith("training.global_batch_size")]
    what = f"{batch} is no multiple of {ranks} ranks x micro-batch {micro}"
    assert line == f"training.global_batch_size: {what}; the nearest that work: {nearest} [batch-not-divisible]"


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_a_micro_batch_that_divides_is_fine(micro: int) -> None:
    assert said(training={"global_batch_size": 4, "micro_batch_size": micro}) == []


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"memory": {"budget": "24"}}, "memory.budget: cannot read '24' as a size; write a number with a unit, for ex"),
        ({"memory": {"budget": "0GiB"}}, "memory.budget: a budget of no bytes leaves nothing to train with; give more"),
        (
            {"memory": {"gradient_checkpointing": "none", "activation_offload": "host"}},
            "memory.activation_offload: there are no kept block inputs to offload without gradient checkpointing; set",
        ),
        (
            {"memory": {"activation_offload_fraction": 0.5}},
            'memory.activation_offload_fraction: the fraction would be ignored; set memory.activation_offload = "host"',
        ),
        (
            {"memory": {"gradient_checkpointing": "none", "block_swap": 9}},
            "memory.block_swap: autograd would keep the weights that are streamed without gradient checkpointing; set",
        ),
        (
            {"memory": {"gradient_checkpointing": "none", "checkpoint_every": 2}},
            "memory.checkpoint_every: there are no segments without gradient checkpointing; set memory.gradient_check",
        ),
        ({"memory": {"block_swap": 2}}, "memory.block_swap: 2 blocks through a ring of 2 buffers save nothing; use 0,"),
        (
            {"memory": {"block_swap": 4, "checkpoint_every": 3}},
            "memory.block_swap: 4 blocks through a ring of 4 buffers save nothing; use 0, or at least 5",
        ),
        (
            {"memory": {"slices": 2, "checkpoint_every": 2}},
            "memory.checkpoint_every: a block in slices is a segment of its own; leave it out, or memory.slices and",
        ),
        (
            {"memory": {"optimizer": "adamw8bit", "optimizer_offload": True}},
            "memory.optimizer_offload: 8-bit states are small and stay on the device; leave it out, or use memory.opt",
        ),
        (
            {"memory": {"fallbacks": [{"fallbacks": [{}]}]}},
            "memory.fallbacks[0].fallbacks: fallbacks have none of their own; write them one after the other",
        ),
        (
            {"memory": {"fallbacks": [{}, {"quantization": "int8"}]}},
            "memory.fallbacks[1].quantization: a run cannot change it on its way from 'none'; make them equal",
        ),
        ({"memory": {"fallbacks": [{"budget": "1GiB"}]}}, "memory.fallbacks[0].budget: a run has one budget; leave it"),
        (
            {"memory": {"fallbacks": [{"block_swap": 1}]}},
            "memory.fallbacks[0].block_swap: 1 blocks through a ring of 2 buffers save nothing; use 0, or at least 3 ",
        ),
        ({"lora": None, "memory": {"block_swap": 9}}, "memory.block_swap: all weights are trained, none can be stream"),
        (
            {"lora": None, "memory": {"fallbacks": [{"block_swap": 9}]}},
            "memory.fallbacks[0].block_swap: all weights are trained, none can be streamed; leave it out",
        ),
        (
            {"lora": None, "memory": {"quantization": "nf4"}},
            "memory.quantization: weights that are trained cannot be quantised; leave it out, or add a section [lora]",
        ),
        (
            {"lora": {"dropout": 0.1}, "memory": {"slices": 2}},
            "memory.slices: a block in slices would draw its dropout differently; leave it out, or lora.dropout",
        ),
        ({"data": {"frames_schedule": [[5, 81]]}}, "data.frames_schedule: the first stage must start at step 0; write"),
        (
            {"data": {"frames_schedule": [[0, 17], [9, 33], [9, 81]]}},
            "data.frames_schedule: the stages' first steps must rise; sort them",
        ),
        (
            {"data": {"frames_schedule": [[0, 17], [2000, 81]]}},
            "data.frames_schedule: the last stage starts at step 2000 of 2000; raise training.steps or drop the stage",
        ),
        (
            {"data": {"frames_schedule": [[0, 17], [9, 49]]}},
            "data.frames_schedule: the last stage has 49 frames, data.num_frames says 81; make them equal",
        ),
        (
            {"training": {"precision": "fp32"}},
            'training.precision: frozen weights in bf16 cannot be computed with in fp32; use "bf16", or model.dtype =',
        ),
        (
            {"training": {"steps": 50}},
            "training.warmup_steps: the warm-up of 50 steps is as long as the run; at mo",
        ),
        ({"parallel": {"sp": 2}}, "parallel.sp: 1 ranks cannot be shared out 2 ways; use one of 1"),
        (
            {"parallel": {"strategy": "fsdp2", "offload": "optimizer"}},
            "parallel.offload: fsdp2 does not keep it in host memory; leave it out, or use",
        ),
        (
            {"parallel": {"strategy": "deepspeed_stage_3"}, "memory": {"block_swap": 40}},
            "memory.block_swap: deepspeed_stage_3 moves the weights itself; leave it out, or use",
        ),
        ({"lora": None, "output": {"formats": ["kohya"]}}, "output.formats: full fine-tuning writes no adapter; leave"),
        ({"validation": {"sample_steps": 4}}, "validation.sample_steps: there are no samples that it would apply to;"),
        ({"validation": {"guidance_scale": 1.0}}, "validation.guidance_scale: there are no samples that it would app"),
    ],
)
def test_each_conflict_is_one_line_with_a_way_out(changes: dict[str, Any], line: str) -> None:
    (found,) = said(**changes)
    assert found.startswith(line)
    assert ";" in found


@pytest.mark.parametrize(
    "changes",
    [
        {"data": {"frames_schedule": [[0, 17], [200, 49], [500, 81]]}},
        {"memory": {"activation_offload": "disk", "activation_offload_fraction": 0.5}},
        {"memory": {"gradient_checkpointing": "none"}},
        {"memory": {"gradient_checkpointing": "block_keep_attention", "block_swap": 40, "block_swap_from": "disk"}},
        {"memory": {"slices": 8, "attention_head_groups": 2, "quantization": "int8", "optimizer": "adamw8bit"}},
        {"memory": {"fallbacks": [{"block_swap": 40}, {"block_swap": 40, "slices": 16}], "optimizer_offload": False}},
        {"lora": None, "memory": {"optimizer_offload": True, "slices": 4, "checkpoint_every": 1}},
        {"memory": {"budget": "24 GiB"}},
        {"lora": None, "training": {"precision": "fp32"}},
        {"model": {"dtype": "fp32"}, "training": {"precision": "fp32"}},
        {"validation": {"samples": [{"prompt": "x"}], "sample_steps": 4, "guidance_scale": 1.0}},
        {"output": {"formats": ["kohya", "diffusers"]}},
        {"parallel": {"strategy": "deepspeed_stage_3", "offload": "parameters"}},
        {"parallel": {"strategy": "ddp"}},
    ],
)
def test_what_goes_together_is_let_through(changes: dict[str, Any]) -> None:
    assert said(**changes) == []


@pytest.mark.parametrize(
    ("ranks", "sp", "batch", "line"),
    [
        (3, 1, 4, "4 is no multiple of 3 ranks x micro-batch 1; the nearest that work: 3 or 6"),
        (8, 1, 4, "4 is no multiple of 8 ranks x micro-batch 1; the nearest that work: 8"),
        (8, 2, 6, "6 is no multiple of 4 groups of 2 ranks x micro-batch 1; the nearest that work: 4 or 8"),
    ],
)
def test_a_batch_that_ranks_do_not_share_names_the_nearest(ranks: int, sp: int, batch: int, line: str) -> None:
    assert said(ranks, training={"global_batch_size": batch}, parallel={"sp": sp}) == [
        f"training.global_batch_size: {line} [batch-not-divisible]"
    ]


def test_ranks_that_share_a_clip_count_as_one() -> None:
    assert said(8, training={"global_batch_size": 2}, parallel={"sp": 4}) == []


def test_dropout_of_a_clip_that_ranks_share_is_refused() -> None:
    (line,) = said(2, lora={"dropout": 0.1}, parallel={"sp": 2}, training={"global_batch_size": 1})
    assert line.startswith("lora.dropout: ranks that share a clip would draw its dropout differently")


def test_all_conflicts_come_at_once() -> None:
    bad = config(
        memory={"budget": "much", "block_swap": 2},
        training={"global_batch_size": 3, "micro_batch_size": 2, "steps": 10},
        parallel={"sp": 2},
    )
    with pytest.raises(ConfigError) as caught:
        check(bad)
    assert [problem.where for problem in caught.value.problems] == [
        "memory.budget",
        "memory.block_swap",
        "training.global_batch_size",
        "training.warmup_steps",
        "parallel.sp",
    ]
    assert caught.value.exit_status == 2


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ([[3, 1, 8]], "block 1 is before block 3; write [first, last, rank] [block-ranks-reversed]"),
        ([[0, 4, 8], [4, 6, 2]], "block 4 has two ranks; let no two ranges overlap [block-ranks-overlap]"),
        ([[7, 9, 8], [0, 20, 2]], "block 7 has two ranks; let no two ranges overlap [block-ranks-overlap]"),
    ],
)
def test_ranges_of_blocks_run_upwards_and_do_not_overlap(ranks: list[list[int]], message: str) -> None:
    assert said(lora={"block_ranks": ranks}) == [f"lora.block_ranks: {message}"]
    assert said(lora={"block_ranks": [[5, 9, 8], [0, 4, 2]]}) == []


def test_a_ratio_of_learning_rates_needs_adapters() -> None:
    ratio = {"lora_plus_ratio": 16.0}
    assert said(training=ratio) == []
    message = "there are no adapters; leave it out, or add a section [lora] [config-key-ignored]"
    assert said(lora=None, training=ratio) == [f"training.lora_plus_ratio: {message}"]
