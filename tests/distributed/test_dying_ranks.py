"""Ranks that crash, are killed, read damage or are asked to stop: who says what, how soon, and that none is left."""

import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from command_line import succeed
from launched import ENVIRONMENT
from longtake.config.dump import to_toml
from longtake.config.schema import RunConfig
from longtake.data.cache import Cache, Entry, Manifest
from longtake.data.loader import BucketSampler
from longtake.training.checkpoint import checkpoint_path
from longtake.training.metrics import FILE
from processes import Started, started
from runs import Scene, learnt, scene

WITHIN_SECONDS = 60.0
LOST = "error: rank 0: lost another rank, whose own message says why; " + (
    "the run goes on from its last checkpoint with --resume [rank-lost]"
)
STEPS = 80

pytestmark = pytest.mark.long


@pytest.fixture
def where(tiny_root: Callable[[str], Path], tmp_path: Path) -> Scene:
    """Of so many clips that none is read twice in four steps of two ranks."""
    return scene("tiny-t2v", tiny_root("tiny-t2v"), tmp_path / "scene", count=8)


def config_of(where: Scene) -> RunConfig:
    """Long enough to be met in the middle; an engine that is named needs no plan."""
    run = where.source.parent / "run"
    sections = {"training": {"steps": STEPS, "global_batch_size": 2}, "parallel": {"strategy": "ddp"}}
    return where.config(run, **sections, data={"validation": 0}, output={"save_every": 2})


@contextmanager
def two_ranks(config: RunConfig, *arguments: str) -> Iterator[Started]:
    """`longtake train --gpus 2`; nobody is there any more when it has ended."""
    run = Path(config.output.run)
    path = run.with_name("run.toml")
    path.write_text(to_toml(config), encoding="utf-8")
    command = [sys.executable, "-m", "longtake", "train", path, "--gpus", 2, *arguments]
    with started(command, run.with_name("said"), ENVIRONMENT) as launcher:
        yield launcher
        assert launcher.process.poll() is not None
        assert launcher.alive == []


def errors(launcher: Started) -> list[str]:
    """What is said from the first trace of a failure on."""
    lines = launcher.lines
    first = next(index for index, line in enumerate(lines) if line.startswith(("Traceback", "error:")))
    return lines[first:]


def read_by_rank_1(where: Scene, config: RunConfig, manifest: Manifest) -> Entry:
    """An entry that the second rank is the first to read, in the third or fourth step."""
    sampler = BucketSampler(manifest.entries, [(0, config.data.num_frames)], config.training.seed, 2)
    (rehearsed,) = sampler.largest(where.spec.tokens, 1, 0)
    seconds = [sampler.share(step, 1, 2)[0].entry for step in (2, 3)]
    return next(entry for entry in seconds if entry != rehearsed.entry)


def seconds_since_the_last_step(run: Path) -> float:
    return time.time() - (run / FILE).stat().st_mtime


def test_a_rank_that_crashes_ends_the_run_with_its_traceback_before_what_the_other_says(where: Scene) -> None:
    config = config_of(where)
    broken = read_by_rank_1(where, config, where.prepare(config))
    Cache(where.cache).write("latents", broken.latents, {"others": torch.zeros(1)})  # whole, and without latents

    with two_ranks(config) as launcher:
        assert launcher.status() == 1
    assert seconds_since_the_last_step(Path(config.output.run)) < WITHIN_SECONDS
    said = errors(launcher)
    assert said[0] == "Traceback (most recent call last):"
    end = said.index("KeyError: 'latents'")
    assert not any(line.startswith(("Traceback", "error:")) for line in said[1:end])
    assert said[end + 1 :] in (
        ["error: rank 1: ended by the error above [rank-crashed]"],
        ["error: rank 1: ended by the error above [rank-crashed]", LOST],
    )


def test_an_entry_that_one_rank_finds_damaged_is_named_with_the_rank_and_gives_status_2(where: Scene) -> None:
    config = config_of(where)
    broken = read_by_rank_1(where, config, where.prepare(config))
    path = where.cache / "latents" / f"{broken.latents}.safetensors"
    path.write_bytes(path.read_bytes()[:-8])

    with two_ranks(config) as launcher:
        assert launcher.status() == 2
    assert seconds_since_the_last_step(Path(config.output.run)) < WITHIN_SECONDS
    first, *others = errors(launcher)
    assert first.startswith(f"error: rank 1: {path}: the entry cannot be read")
    assert others in ([], [LOST])


def test_a_rank_that_is_killed_is_named_once_and_the_other_ends_with_it(where: Scene) -> None:
    config = config_of(where)
    where.prepare(config)
    with two_ranks(config) as launcher:
        launcher.until(checkpoint_path(Path(config.output.run), 2).is_dir)
        (rank,) = (process for process in launcher.alive if process.environ().get("RANK") == "1")
        rank.kill()
        assert launcher.status(WITHIN_SECONDS) == 1
    killed = "error: rank 1: killed by SIGKILL, as the system does where host memory runs out; "
    killed += "continue with --resume from the last checkpoint [rank-killed]"
    assert errors(launcher) in ([killed], [LOST, killed])


def test_a_signal_to_the_launcher_or_to_all_at_once_has_them_save_and_say_so_once_and_the_run_can_go_on(
    where: Scene,
) -> None:
    config = config_of(where)
    where.prepare(config)
    with two_ranks(config) as launcher:
        launcher.until(checkpoint_path(Path(config.output.run), 2).is_dir)
        launcher.process.send_signal(signal.SIGTERM)
        first = saved_step(config, launcher)
    with two_ranks(config, "--resume") as launcher:
        launcher.until(checkpoint_path(Path(config.output.run), first + first % 2 + 2).is_dir)
        # as Slurm does; the launcher passes on what its ranks have had already
        for process in sorted(launcher.alive, key=lambda each: "RANK" not in each.environ()):
            process.send_signal(signal.SIGTERM)
        second = saved_step(config, launcher)
    assert first < second < STEPS
    changes = ("parallel.strategy=single", f"training.steps={second + 1}")
    path = Path(config.output.run).with_name("run.toml")
    succeed("train", path, "--resume", *(word for change in changes for word in ("--set", change)))
    assert [line["step"] for line in learnt(Path(config.output.run))] == [*range(1, second + 2)]


def saved_step(config: RunConfig, launcher: Started) -> int:
    """Of the one line with which both have left."""
    run = config.output.run
    assert launcher.status(WITHIN_SECONDS) == 1
    (line,) = errors(launcher)
    found = re.fullmatch(rf"error: {re.escape(run)}: stopped by SIGTERM after step (\d+), which is saved; (.*)", line)
    assert found is not None, line
    assert found[2] == "continue with --resume [run-stopped]"
    return int(found[1])
