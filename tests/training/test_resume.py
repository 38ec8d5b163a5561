"""Continuing a run: nothing is lost, nothing is there twice, and every bit is as without the interruption."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from longtake.config.load import load_config
from longtake.errors import RunError
from longtake.training.checkpoint import checkpoint_path
from longtake.training.metrics import FILE, read_metrics
from runs import Recorder, Scene, Stopper, assert_same_run, learnt, scene
from saved import read, save

Scenes = Callable[[str], Scene]
CURRICULUM = {"num_frames": 49, "frames_schedule": ((0, 17), (2, 33), (4, 49)), "validation": 0.25}


def test_a_curriculum_moves_through_its_stages_and_resumes_inside_one(
    scenes: Scenes, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    long = scene("tiny-t2v", scenes("tiny-t2v").root, tmp_path_factory.mktemp("long"), count=3, frames=50)
    training = {"steps": 6, "global_batch_size": 1, "ema": 0.9, "warmup_steps": 2}
    whole = long.train(long.config(tmp_path / "whole", data=CURRICULUM, training=training))
    assert [line["num_frames"] for line in learnt(whole) if "loss" in line] == [17, 17, 33, 33, 49, 49]
    config = long.config(tmp_path / "cut", data=CURRICULUM, training=training)
    for expected in (3, 5):
        with pytest.raises(RunError, match=f"stopped by SIGTERM after step {expected}, which is saved"):
            long.train(config, resume=expected > 3, reporter=Stopper(expected))
    assert_same_run(whole, long.train(config, resume=True), step=6)


def test_sigterm_saves_and_leaves_with_a_line_and_status_1(scenes: Scenes, tmp_path: Path) -> None:
    scene = scenes("tiny-i2v")
    training = {"steps": 4, "ema": 0.5}
    output = {"save_every": 100}
    whole = scene.train(scene.config(tmp_path / "whole", training=training, output=output))
    config = scene.config(tmp_path / "cut", training=training, output=output)
    with pytest.raises(RunError) as raised:
        scene.train(config, reporter=Stopper(2))
    (problem,) = raised.value.problems
    assert raised.value.exit_status == 1
    assert problem.where == str(tmp_path / "cut")
    assert problem.what == "stopped by SIGTERM after step 2, which is saved"
    assert problem.remedy == "continue with --resume"
    said = Recorder()
    assert_same_run(whole, scene.train(config, resume=True, reporter=said), step=4)
    assert "resumed after step 2" in said.lines


def test_a_damaged_checkpoint_falls_back_to_the_one_before(scenes: Scenes, tmp_path: Path) -> None:
    scene = scenes("tiny-i2v")
    config = scene.config(tmp_path / "run", training={"steps": 3})
    whole = scene.train(scene.config(tmp_path / "whole", training={"steps": 3}))
    run = scene.train(config)
    damaged = checkpoint_path(run, 3) / "optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    said = Recorder()
    assert_same_run(whole, scene.train(config, resume=True, reporter=said), step=3)
    assert said.having("step-00000003: the checkpoint is damaged (optimizer.safetensors has")
    assert "resumed after step 2" in said.lines


def test_a_finished_run_that_is_resumed_stays_as_it_is(scenes: Scenes, tmp_path: Path) -> None:
    scene = scenes("tiny-i2v")
    config = scene.config(tmp_path / "run")
    run = scene.train(config)
    before, log = (run / "adapter.safetensors").read_bytes(), (run / FILE).read_text()
    scene.train(config, resume=True)
    assert (run / "adapter.safetensors").read_bytes() == before
    assert (run / FILE).read_text() == log


def test_a_validation_that_a_kill_prevented_is_made_up_for(scenes: Scenes, tmp_path: Path) -> None:
    scene = scenes("tiny-i2v")
    config = scene.config(tmp_path / "run")
    run = scene.train(config)
    log, lines = learnt(run), (run / FILE).read_text().splitlines(keepends=True)
    assert "validation_loss" in lines[-1]
    (run / FILE).write_text("".join(lines[:-1]))
    scene.train(config, resume=True)
    assert learnt(run) == log


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(scenes: Scenes, tmp_path: Path) -> None:
    scene = scenes("tiny-i2v")
    config = scene.config(tmp_path / "run")
    run = scene.train(config)
    log = learnt(run)
    shutil.rmtree(run / "checkpoints")
    scene.train(config, resume=True)
    assert learnt(run) == log


def test_more_steps_can_be_asked_for_and_the_log_goes_on(scenes: Scenes, tmp_path: Path) -> None:
    scene = scenes("tiny-i2v")
    run = scene.train(scene.config(tmp_path / "run", training={"schedule": "constant"}))
    said = Recorder()
    longer = scene.config(run, training={"schedule": "constant", "steps": 3}, output={"keep": 9})
    scene.train(longer, resume=True, reporter=said)
    assert said.having("resumed with another training.steps: 3 instead of 2")
    assert [line["step"] for line in learnt(run)] == [0, 1, 2, 2, 3, 3]
    assert load_config(run / "config.toml") == longer


def test_fp16_goes_on_with_its_scale_and_skips_an_overflow(scenes: Scenes, tmp_path: Path) -> None:
    scene = scenes("tiny-i2v")
    training = {"precision": "fp16", "ema": 0.5, "steps": 4}
    config = scene.config(tmp_path / "run", training=training, output={"keep": 9}, model={"dtype": "fp16"})
    with pytest.raises(RunError, match="stopped by SIGTERM after step 1"):
        scene.train(config, reporter=Stopper(1))
    run = Path(config.output.run)
    first = read(checkpoint_path(run, 1))
    assert first.state["backend"]["scale"] == 65536
    raised = first.state["backend"] | {"scale": 2.0**40}  # the next gradients overflow fp16
    save(run, replace(first, state={"backend": raised}), keep=9)
    said = Recorder()
    scene.train(config, resume=True, reporter=said)
    lines = [line for line in read_metrics(run / FILE) if "loss" in line][1:]
    assert lines[0]["loss"] is None
    assert len(lines[0]["skipped"]) == 2
    assert [line["scale"] for line in lines] == [2.0**39, 2.0**38, 2.0**37]
    assert said.having("step 2: loss or gradient is not finite; the update is skipped")
    second = read(checkpoint_path(run, 2))
    assert second.state["backend"]["scale"] == 2.0**39
    for part in ("trained", "optimizer", "ema"):
        before, after = getattr(first, part), getattr(second, part)
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_mixed_precision_resumes_to_the_bit(scenes: Scenes, tmp_path: Path, precision: str) -> None:
    scene = scenes("tiny-i2v")
    sections = {"training": {"precision": precision, "steps": 3}, "model": {"dtype": "bf16"}, "lora": {"dropout": 0.1}}
    if precision == "fp16":
        sections["model"] = {"dtype": "fp16"}
    whole = scene.train(scene.config(tmp_path / "whole", **sections))
    config = scene.config(tmp_path / "cut", **sections)
    with pytest.raises(RunError, match="after step 2"):
        scene.train(config, reporter=Stopper(2))
    assert_same_run(whole, scene.train(config, resume=True), step=3)


def test_three_updates_in_a_row_that_are_not_finite_end_the_run(scenes: Scenes, tmp_path: Path) -> None:
    scene = scenes("tiny-i2v")
    config = scene.config(tmp_path / "run", training={"steps": 9, "learning_rate": 1e30, "ema": 0.5})
    with pytest.raises(RunError) as raised:
        scene.train(config)
    (problem,) = raised.value.problems
    assert "3 updates in a row had a loss or gradient that is not finite, the last at step 4" in problem.what
    run = Path(config.output.run)
    assert [line["loss"] for line in learnt(run) if "loss" in line][1:] == [None, None, None]
    kept = [read(checkpoint_path(run, step)) for step in (1, 2, 3)]
    for part in ("trained", "optimizer", "ema"):
        for name, tensor in getattr(kept[0], part).items():
            assert tensor.isfinite().all()
            assert all(torch.equal(tensor, getattr(later, part)[name]) for later in kept[1:])
