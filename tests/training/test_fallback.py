"""Going on after running out of device memory: the step is made again under the next strategy, to the bit."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from failing_allocator import MESSAGE, REHEARSAL, FailingAllocator, Failure, When
from longtake.config.schema import MemoryStrategy, RunConfig
from longtake.errors import ConfigError, RunError
from longtake.memory.accounting import Workload
from longtake.training.checkpoint import checkpoint_path
from longtake.training.fallback import StrategyInForce, in_words
from longtake.training.metrics import FILE, read_metrics
from longtake.training.model import build_model, find_model
from runs import CPU, Scene, assert_same_run
from saved import read

Scenes = Callable[[str], Scene]
BLOCKS = 4
TRAINING = {"steps": 5, "global_batch_size": 2, "micro_batch_size": 1}
RUNGS: tuple[dict[str, Any], ...] = (
    {"activation_offload": "host"},
    {"activation_offload": "disk", "activation_offload_fraction": 0.5},
    {"checkpoint_every": 2},
    {"block_swap": 4, "block_swap_from": "disk"},
)
IN_WORDS = (
    'gradient_checkpointing = "block"',
    'gradient_checkpointing = "block", activation_offload = "host"',
    'gradient_checkpointing = "block", activation_offload = "disk", activation_offload_fraction = 0.5',
    'gradient_checkpointing = "block", checkpoint_every = 2',
    'gradient_checkpointing = "block", block_swap = 4, block_swap_from = "disk"',
)


def config_of(scene: Scene, run: Path, steps: int = 5, **memory: Any) -> RunConfig:
    """Accumulation 2, dropout, all random."""
    return scene.config(
        run,
        data={"caption_dropout": 0.3},
        lora={"dropout": 0.2},
        training={**TRAINING, "steps": steps},
        memory=memory,
        output={"save_every": 1, "keep": 2},
    )


@pytest.fixture(scope="module")
def whole(scenes: Scenes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in which memory never runs out."""
    scene = scenes("tiny-i2v")
    return scene.train(config_of(scene, tmp_path_factory.mktemp("whole") / "run"))


def steps_of(run: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run / FILE) if "loss" in line]


@pytest.mark.parametrize("micro_batch", [0, 1])
@pytest.mark.parametrize("when", ["forward", "recomputation", "backward"])
def test_a_block_for_which_memory_ran_out_is_computed_again_to_the_bit(
    scenes: Scenes, tmp_path: Path, whole: Path, when: When, micro_batch: int
) -> None:
    scene = scenes("tiny-i2v")
    failures = [Failure(block + 1, block, when, micro_batch) for block in range(BLOCKS)]
    with FailingAllocator(failures).installed() as said:
        run = scene.train(config_of(scene, tmp_path / "run", fallbacks=RUNGS), reporter=said)
    assert_same_run(whole, run, step=5)
    assert said.survivors == 0, "a failed attempt's activations are gone when the next one begins"
    told = [line for line in said.lines if "out of device memory" in line or "going on" in line]
    assert told == [
        line
        for step, (before, after) in enumerate(pairwise(IN_WORDS), 2)
        for line in (
            f"step {step}: out of device memory (2.00 GiB asked for) with {before}",
            f"step {step}: going on with {after}",
        )
    ]
    lines = steps_of(run)
    assert [line.get("out_of_memory") for line in lines] == [None, 1, 1, 1, 1]
    assert [line.get("strategy") for line in lines] == [None, *RUNGS]
    assert not (run / "scratch").exists()


def test_it_may_run_out_several_times_in_a_step(scenes: Scenes, tmp_path: Path, whole: Path) -> None:
    scene = scenes("tiny-i2v")
    failures = [Failure(2, 3, "forward", 1), Failure(2, 0, "recomputation", 1), Failure(2, 2, "backward")]
    with FailingAllocator(failures).installed() as said:
        run = scene.train(config_of(scene, tmp_path / "run", fallbacks=RUNGS), reporter=said)
    assert_same_run(whole, run, step=5)
    assert said.survivors == 0
    lines = steps_of(run)
    assert [line.get("out_of_memory") for line in lines] == [None, None, 3, None, None]
    assert [line.get("strategy") for line in lines] == [None, None, *[RUNGS[2]] * 3]


def test_without_checkpointing_nothing_of_the_failed_attempt_stays_either(
    scenes: Scenes, tmp_path: Path, whole: Path
) -> None:
    scene = scenes("tiny-i2v")
    with FailingAllocator([Failure(1, 1, "backward", 1)]).installed() as said:
        run = scene.train(config_of(scene, tmp_path / "run", gradient_checkpointing="none"), reporter=said)
    assert_same_run(whole, run, step=5)
    assert said.survivors == 0
    assert steps_of(run)[1]["strategy"] == {"gradient_checkpointing": "block"}, "the first rung of the ladder"


def test_a_run_that_is_resumed_begins_with_the_configured_strategy(scenes: Scenes, tmp_path: Path, whole: Path) -> None:
    scene = scenes("tiny-i2v")
    config = config_of(scene, tmp_path / "run", fallbacks=RUNGS[:1])
    allocator = FailingAllocator([Failure(1, 0, "forward")], failing_update=3)
    with allocator.installed() as said, pytest.raises(RunError) as raised:
        scene.train(config, reporter=said)
    (problem,) = raised.value.problems
    assert raised.value.exit_status == 1
    assert problem.what == f"the device ran out of memory in the update of step 4 ({MESSAGE.splitlines()[0]})"
    assert f"the last checkpoint is {tmp_path / 'run' / 'checkpoints' / 'step-00000003'}" in problem.remedy
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"step-00000002", "step-00000003"}
    run = scene.train(config, resume=True)
    assert_same_run(whole, run, step=5)
    assert [line.get("strategy") for line in steps_of(run)] == [None, RUNGS[0], RUNGS[0], None, None]


def test_an_update_without_room_before_the_first_checkpoint_says_that_there_is_none(
    scenes: Scenes, tmp_path: Path
) -> None:
    scene = scenes("tiny-i2v")
    line = r"in the update of step 1 .*; no checkpoint is there; set memory\.optimizer_offload = true"
    with FailingAllocator([], failing_update=0).installed() as said, pytest.raises(RunError, match=line):
        scene.train(config_of(scene, tmp_path / "run"), reporter=said)


@pytest.mark.parametrize("step", [REHEARSAL, 1])
def test_a_run_ends_with_status_1_when_no_strategy_is_left(scenes: Scenes, tmp_path: Path, step: int) -> None:
    scene = scenes("tiny-i2v")
    config = config_of(scene, tmp_path / "run", fallbacks=RUNGS[:2])
    with FailingAllocator([Failure(step, 2, "forward")] * 3).installed() as said, pytest.raises(RunError) as raised:
        scene.train(config, reporter=said)
    (problem,) = raised.value.problems
    assert raised.value.exit_status == 1
    assert problem.where == config.output.run
    first = MESSAGE.splitlines()[0]
    assert problem.what == f"the device ran out of memory ({first}; no other memory strategy is left)"
    assert not (tmp_path / "run" / "scratch").exists()
    assert len(steps_of(tmp_path / "run")) == max(0, step)


def test_the_largest_bucket_finds_the_strategy_before_the_run_counts(
    scenes: Scenes, tmp_path: Path, whole: Path
) -> None:
    scene = scenes("tiny-i2v")
    with FailingAllocator([Failure(REHEARSAL, 3, "recomputation")]).installed() as said:
        run = scene.train(config_of(scene, tmp_path / "run", fallbacks=RUNGS), reporter=said)
    assert_same_run(whole, run, step=5)
    assert said.having("the largest bucket: going on with") == [f"the largest bucket: going on with {IN_WORDS[1]}"]
    lines = steps_of(run)
    assert [line.get("out_of_memory") for line in lines] == [None] * 5
    assert [line.get("strategy") for line in lines] == [RUNGS[0]] * 5


def in_force(scene: Scene, folder: Path, say: Callable[[str], None], tokens: int, **memory: Any) -> StrategyInForce:
    """The strategies over a model of the scene, as if a clip had `tokens`."""
    config = scene.config(folder, memory=memory)
    model = build_model(config, find_model(config, print), CPU)
    return StrategyInForce([model], config.memory, Workload(tokens, 1, 4), folder, say)


def test_a_strategy_that_does_not_fit_the_host_or_the_disk_is_refused_or_passed_over(
    scenes: Scenes, tmp_path: Path
) -> None:
    lines: list[str] = []
    for tier in ("host", "disk"):
        refused = in_force(scenes("tiny-i2v"), tmp_path, lines.append, 10**15, activation_offload=tier)
        with pytest.raises(ConfigError, match="TiB for activation_offload") as raised:
            refused.check()
        assert raised.value.exit_status == 2
    rungs = RUNGS[:3]
    strategy = in_force(scenes("tiny-i2v"), tmp_path, lines.append, 10**15, fallbacks=rungs)
    strategy.check()
    left = [True]

    def compute() -> str:
        if left:
            left.clear()
            raise torch.OutOfMemoryError("no room")
        return "computed"

    with strategy:
        assert strategy.attempt(compute, "step 1", lambda: None) == ("computed", 1)
        assert strategy.difference() == {"checkpoint_every": 2}
    assert lines[0] == f"step 1: out of device memory with {IN_WORDS[0]}"
    passed_over = [f"{words}: memory.activation_offload: the strategy needs" for words in IN_WORDS[1:3]]
    for line, reason in zip(lines[1:3], passed_over, strict=True):
        assert line.startswith(f"step 1: not going on with {reason}")
    assert lines[3:] == [f"step 1: going on with {IN_WORDS[3]}"]


def test_a_strategy_that_the_model_does_not_allow_is_refused_before_the_run_is_begun(
    scenes: Scenes, tmp_path: Path
) -> None:
    scene = scenes("tiny-i2v")
    for where, memory in {
        "block_swap": {"block_swap": 5},
        "fallbacks[0].block_swap": {"fallbacks": [{"block_swap": 5}]},
    }.items():
        with pytest.raises(ConfigError) as raised:
            scene.train(config_of(scene, tmp_path / "run", **memory))
        assert str(raised.value) == f"memory.{where}: the model has 4 blocks; at most 4 [block-swap-too-many]"
    assert not (tmp_path / "run" / "config.toml").exists()


def test_full_fine_tuning_goes_on_too(scenes: Scenes, tmp_path: Path) -> None:
    scene = scenes("tiny-t2v")
    runs = []
    for failures in ([], [Failure(1, 2, "recomputation", 1)]):
        config = scene.config(tmp_path / str(len(failures)), lora=None, training={**TRAINING, "steps": 3})
        with FailingAllocator(failures).installed() as said:
            runs.append(scene.train(config, reporter=said))
    assert [line.get("out_of_memory") for line in steps_of(runs[1])] == [None, 1, None]
    trained = [read(checkpoint_path(run, 3)).trained for run in runs]
    assert all(torch.equal(tensor, trained[1][name]) for name, tensor in trained[0].items())


def test_gradients_of_a_failed_attempt_are_dropped(scenes: Scenes, tmp_path: Path) -> None:
    strategy = in_force(scenes("tiny-i2v"), tmp_path, lambda _line: None, 1, fallbacks=RUNGS[:1])
    parameters = strategy.models[0].parameters.values()
    seen = []

    def compute() -> None:
        seen.append([parameter.grad is None for parameter in parameters])
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        if len(seen) == 1:
            raise torch.OutOfMemoryError("no room")

    def drop() -> None:
        for parameter in parameters:
            parameter.grad = None

    with strategy:
        strategy.attempt(compute, "step 1", drop)
    assert all(all(attempt) for attempt in seen)
    assert len(seen) == 2


def test_other_errors_are_not_retried(scenes: Scenes, tmp_path: Path) -> None:
    strategy = in_force(scenes("tiny-i2v"), tmp_path, lambda _line: None, 1)

    def compute() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with strategy, pytest.raises(RuntimeError, match="illegal"):
        strategy.attempt(compute, "step 1", lambda: None)


def test_a_strategy_in_words_names_what_is_not_the_default() -> None:
    assert tuple(in_words(MemoryStrategy(**rung)) for rung in ({}, *RUNGS)) == IN_WORDS
    assert in_words(MemoryStrategy(optimizer_offload=True)).endswith("optimizer_offload = true")
