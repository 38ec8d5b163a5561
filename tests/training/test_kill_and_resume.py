"""A run that is killed at any moment and resumed ends as the one that was left alone, to the bit."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

from longtake import files
from longtake.config.dump import to_toml
from longtake.config.schema import RunConfig
from longtake.training.checkpoint import load_newest
from runs import Scene, assert_same_run

STEPS = 5
KILLS = 20
SAMPLED = 29
"""Every so many of the moments of a run before and after an operation are tried in `make test`, all in `make bench`."""
SERVER = Path(__file__).with_name("forked_runs.py")


class Ask(Protocol):
    """Has a config run in a fork, which is killed after `kill_after` seconds or at the `die_at`th word of the disk."""

    def __call__(
        self, config: RunConfig, resume: bool, kill_after: float | None = None, die_at: int | None = None
    ) -> dict[str, Any]: ...


def config_of(scene: Scene, run: Path) -> RunConfig:
    """A checkpoint after every step, in a curriculum, with all that a checkpoint has to hold."""
    return scene.config(
        run,
        data={"num_frames": 9, "frames_schedule": ((0, 5), (3, 9)), "caption_dropout": 0.3},
        lora={"dropout": 0.1},
        training={"steps": STEPS, "ema": 0.9, "warmup_steps": 2},
        validation={"every": 2},
        memory={"activation_offload": "disk"},
        output={"keep": 2},
    )


@pytest.fixture
def ask(scenes: Callable[[str], Scene], tmp_path: Path) -> Iterator[Ask]:
    """Runs a config in a fork of a process that has done a run already."""
    config = config_of(scenes("tiny-i2v"), tmp_path / "warm")
    scenes("tiny-i2v").prepare(config)
    first = tmp_path / "warm.toml"
    files.write_text(first, to_toml(config))
    command = [sys.executable, str(SERVER), str(first)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    errors = tmp_path / "errors.txt"
    with errors.open("w") as stderr, subprocess.Popen(command, stderr=stderr, env=os.environ, **pipes) as server:
        assert server.stdin is not None
        assert server.stdout is not None

        def run(
            config: RunConfig, resume: bool, kill_after: float | None = None, die_at: int | None = None
        ) -> dict[str, Any]:
            path = Path(f"{config.output.run}.toml")
            files.write_text(path, to_toml(config))
            request = {"config": str(path), "resume": resume, "kill_after": kill_after, "die_at": die_at}
            server.stdin.write(json.dumps(request) + "\n")
            server.stdin.flush()
            answer = server.stdout.readline()
            assert answer, errors.read_text()
            return json.loads(answer)

        yield run
        server.stdin.close()
        server.stdout.read()


@pytest.mark.long
@pytest.mark.timeout(900)  # 40 seconds on idle cores
def test_a_run_killed_at_any_moment_and_resumed_ends_to_the_bit_as_without(
    scenes: Callable[[str], Scene], tmp_path: Path, ask: Ask
) -> None:
    scene = scenes("tiny-i2v")
    whole = config_of(scene, tmp_path / "whole")
    uninterrupted = ask(whole, False)
    assert uninterrupted["status"] == 0
    seconds, killed = uninterrupted["seconds"], 0
    moments = random.Random(0)
    for trial in range(2 * KILLS):
        config = config_of(scene, tmp_path / f"trial-{trial}")
        run = Path(config.output.run)
        answer = ask(config, False, moments.uniform(0, seconds))
        if answer["status"] == 0:  # the machine has become faster, and the run was over before
            seconds = answer["seconds"]
            continue
        assert answer["status"] == -9
        begun = (run / "config.toml").exists()  # else the kill came before anything was
        assert ask(config, begun)["status"] == 0
        assert_same_run(Path(whole.output.run), run, STEPS)
        assert not [*run.rglob("*.staged-*"), *run.rglob("activations-*")]
        assert len([*(run / "checkpoints").iterdir()]) == 2
        killed += 1
        if killed == KILLS:
            break
    assert killed == KILLS


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("every", [SAMPLED, pytest.param(1, marks=pytest.mark.slow)])
def test_a_run_killed_before_and_after_an_operation_on_the_disk_and_resumed_ends_to_the_bit_as_without(
    scenes: Callable[[str], Scene], tmp_path: Path, ask: Ask, every: int
) -> None:
    scene = scenes("tiny-t2v")

    def config_in(run: Path) -> RunConfig:
        return scene.config(run, training={"ema": 0.5}, output={"keep": 1, "formats": ("comfyui", "kohya")})

    scene.prepare(config_in(tmp_path / "whole"))
    whole = ask(config_in(tmp_path / "whole"), False)
    assert whole["status"] == 0
    assert whole["told"] > 100
    for die_at in range(1, whole["told"] + 1, every):
        config = config_in(tmp_path / f"died-{die_at}")
        run = Path(config.output.run)
        assert ask(config, False, die_at=die_at)["status"] == -9
        newest = load_newest(run, pytest.fail)  # nothing that is damaged has a checkpoint's name
        assert newest is None or newest.step in (1, 2)
        assert ask(config, (run / "config.toml").exists())["status"] == 0
        assert_same_run(tmp_path / "whole", run, step=2)
        assert not [*run.rglob("*.staged-*")]
        # the one before the last stays where the kill came between the two, since nothing more is saved
        assert len([*(run / "checkpoints").iterdir()]) in (1, 2)
