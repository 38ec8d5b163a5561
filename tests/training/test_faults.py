"""Faults in the middle of a run: what is done, what is recorded, and that the result is that of a run without them."""

import contextlib
import errno
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from failing_allocator import FailingAllocator, Failure
from longtake import disk
from longtake.config.schema import RunConfig
from longtake.errors import CacheError, RunError
from longtake.progress import TimeLeft
from longtake.training.checkpoint import checkpoint_path, load_newest
from longtake.training.metrics import FILE as METRICS
from longtake.training.metrics import read_metrics
from longtake.training.run import train
from longtake.training.run_events import FILE
from runs import Recorder, Scene, Stopper, assert_same_run

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # torch's advice where cores are few
Scenes = Callable[[str], Scene]


class At(Recorder):
    """Does something when `step` steps are done."""

    def __init__(self, step: int, act: Callable[[], object]) -> None:
        super().__init__()
        self.step = step
        self.act = act

    def bar(
        self, title: str, total: int, unit: str, done: int = 0, left: TimeLeft = lambda _done: None
    ) -> AbstractContextManager[Callable[[int, str], None]]:
        return _acting(self.step, self.act)


@contextmanager
def _acting(step: int, act: Callable[[], object]) -> Iterator[Callable[[int, str], None]]:
    def advance(done: int, _text: str) -> None:
        if done == step:
            act()

    yield advance


def events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / FILE).read_text(encoding="utf-8").splitlines()]


def kinds(run: Path) -> list[str]:
    return [event["kind"] for event in events(run)]


def kill_workers() -> None:
    """All processes that read clips for this one: children of the server that forks them."""
    for process in psutil.Process().children(recursive=True):
        if process.ppid() != os.getpid():
            process.kill()


def config_of(scene: Scene, run: Path, workers: int = 0) -> RunConfig:
    training = {"steps": 5, "ema": 0.5, "global_batch_size": 2}
    return scene.config(run, training=training, data={"workers": workers}, output={"save_every": 100})


@pytest.fixture(scope="module")
def whole(scenes: Scenes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run without faults, its clips read on a thread."""
    return scenes("tiny-i2v").train(config_of(scenes("tiny-i2v"), tmp_path_factory.mktemp("whole") / "run"))


def test_a_run_whose_workers_are_killed_is_the_run_without_workers(scenes: Scenes, tmp_path: Path, whole: Path) -> None:
    said = At(1, kill_workers)  # when the last of five steps is not read yet
    run = scenes("tiny-i2v").train(config_of(scenes("tiny-i2v"), tmp_path / "run", workers=2), reporter=said)
    assert_same_run(whole, run, step=5)
    (event,) = events(run)
    assert event["kind"] == "worker-died"
    assert event["step"] in range(1, 5)
    assert event["what"].startswith("a process that reads clips ended by SIGKILL; they are started anew at step ")
    assert said.having(event["what"])
    assert not (whole / FILE).exists()


def test_a_run_goes_on_to_the_bit_with_another_number_of_workers(scenes: Scenes, tmp_path: Path, whole: Path) -> None:
    scene = scenes("tiny-i2v")
    with pytest.raises(RunError, match="stopped by SIGTERM after step 2"):
        scene.train(config_of(scene, tmp_path / "run", workers=1), reporter=Stopper(2))
    said = Recorder()
    run = scene.train(config_of(scene, tmp_path / "run", workers=0), resume=True, reporter=said)
    assert_same_run(whole, run, step=5)
    assert said.having("resumed with another data.workers: 0 instead of 1")
    assert kinds(run) == ["run-stopped", "run-resumed"]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("harm", ["gone", "damaged"])
def test_an_entry_that_is_harmed_in_mid_run_is_named_and_what_was_trained_is_saved(
    scenes: Scenes, tmp_path: Path, whole: Path, harm: str, workers: int
) -> None:
    like = scenes("tiny-i2v")
    shutil.copytree(like.cache, tmp_path / "cache")
    scene = Scene(like.model, like.root, like.source, tmp_path / "cache")
    config = config_of(scene, tmp_path / "run", workers)

    def do_harm() -> None:
        for file in (tmp_path / "cache" / "latents").iterdir():
            if harm == "gone":
                file.unlink()
            else:
                file.write_bytes(file.read_bytes()[:-4] + bytes(4))

    with pytest.raises(CacheError) as raised:
        train(config, False, At(2, do_harm))
    (problem,) = raised.value.problems
    assert problem.code == {"gone": "cache-entry-unreadable", "damaged": "cache-entry-changed"}[harm]
    assert Path(problem.where).parent == tmp_path / "cache" / "latents"
    assert ", of clip clips/" in problem.what
    assert problem.remedy == "delete it and run `longtake prepare` again"
    saved = load_newest(tmp_path / "run", pytest.fail)
    assert saved is not None
    assert saved.step in (2, 3, 4), "what was read before is trained on"
    assert [(event["step"], event["kind"]) for event in events(tmp_path / "run")] == [(saved.step, problem.code)]
    shutil.rmtree(tmp_path / "cache" / "latents")
    shutil.copytree(like.cache / "latents", tmp_path / "cache" / "latents")
    assert_same_run(whole, train(config, True, Recorder()), step=5)


def test_a_clock_that_is_set_in_mid_run_is_recorded_and_changes_nothing(
    scenes: Scenes, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene, config, real, hours = scenes("tiny-i2v"), config_of(scenes("tiny-i2v"), tmp_path / "run"), time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: real() + sum(hours) * 3600)

    def back_then_stop() -> None:
        hours.append(-5.0)
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(RunError, match="stopped by SIGTERM after step 3"):
        scene.train(config, reporter=At(3, back_then_stop))
    run = scene.train(config, resume=True, reporter=At(4, lambda: hours.append(41.0)))
    assert_same_run(whole, run, step=5)
    lines = [line for line in read_metrics(run / METRICS) if "loss" in line]
    assert all(0 < line["step_seconds"] < 60 for line in lines)
    assert all(0 <= line["eta_seconds"] < 300 for line in lines if line["eta_seconds"] is not None)
    assert kinds(run) == ["clock-set", "run-stopped", "run-resumed", "clock-set"]
    told = [event["what"] for event in events(run) if event["kind"] == "clock-set"]
    assert told[0] == "after step 3: the clock was set back by 5:00:00; no time that is measured depends on it"
    assert told[1].startswith("after step 4: the clock was set forward, or the machine slept, by 41:00:00")
    scalars = EventAccumulator(str(run)).Reload().Scalars("loss")
    assert [event.step for event in scalars] == [1, 2, 3, 4, 5], "TensorBoard reads the later file after the earlier"


@pytest.mark.parametrize("name", ["SIGHUP", "SIGINT"])
def test_a_run_saves_within_a_step_of_a_signal_and_records_it(
    scenes: Scenes, tmp_path: Path, whole: Path, name: str
) -> None:
    scene, config = scenes("tiny-i2v"), config_of(scenes("tiny-i2v"), tmp_path / "run")
    with pytest.raises(RunError, match=f"stopped by {name} after step 2, which is saved"):
        scene.train(config, reporter=At(2, lambda: os.kill(os.getpid(), signal.Signals[name])))
    (event,) = events(tmp_path / "run")
    assert (event["step"], event["kind"]) == (2, "run-stopped")
    assert f"stopped by {name} after step 2, which is saved" in event["what"]
    assert_same_run(whole, scene.train(config, resume=True), step=5)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_refuses_a_checkpoint_is_recorded(scenes: Scenes, tmp_path: Path, error: int) -> None:
    scene = scenes("tiny-t2v")

    def refuse(operation: disk.Operation, done: bool) -> None:
        if not done and operation.path.name == "trained.safetensors":
            raise OSError(error, os.strerror(error), str(operation.path))

    with pytest.raises(RunError, match=os.strerror(error)) as raised, disk.watched(refuse):
        scene.train(scene.config(tmp_path / "run", output={"save_every": 1}))
    (event,) = events(tmp_path / "run")
    assert (event["step"], event["kind"]) == (1, raised.value.problems[0].code)
    assert event["what"] == str(raised.value)
    assert event["kind"].startswith("disk-")


def test_losses_that_are_not_finite_are_recorded(scenes: Scenes, tmp_path: Path) -> None:
    scene = scenes("tiny-t2v")
    with pytest.raises(RunError, match="3 updates in a row"):
        scene.train(scene.config(tmp_path / "run", training={"steps": 9, "learning_rate": 1e30}))
    assert kinds(tmp_path / "run") == ["update-skipped"] * 3 + ["loss-not-finite"]
    assert events(tmp_path / "run")[0]["what"] == "step 2: loss or gradient is not finite; the update is skipped"


def test_memory_that_runs_out_is_recorded(scenes: Scenes, tmp_path: Path) -> None:
    scene = scenes("tiny-t2v")
    with FailingAllocator([Failure(1, 0, "forward")]).installed() as said:
        run = scene.train(scene.config(tmp_path / "run"), reporter=said)
    assert kinds(run) == ["memory-ran-out"] * 2
    failed, went_on = (event["what"] for event in events(run))
    assert failed.startswith("step 2: out of device memory (2.00 GiB asked for) with ")
    assert went_on.startswith("step 2: going on with ")


def test_a_checkpoint_that_is_damaged_is_recorded(scenes: Scenes, tmp_path: Path, whole: Path) -> None:
    scene, run = scenes("tiny-i2v"), tmp_path / "run"
    with pytest.raises(RunError, match="stopped by SIGTERM after step 2"):
        scene.train(config_of(scene, run), reporter=Stopper(2))
    config = config_of(scene, run)
    with pytest.raises(RunError, match="stopped by SIGTERM after step 4"):
        scene.train(config, resume=True, reporter=Stopper(4))
    damaged = checkpoint_path(run, 4) / "trained.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert_same_run(whole, scene.train(config, resume=True), step=5)
    assert kinds(run) == ["run-stopped", "run-resumed", "run-stopped", "checkpoint-damaged", "run-resumed"]
    assert events(run)[3]["what"].startswith(f"{checkpoint_path(run, 4)}: the checkpoint is damaged (")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with a name")
def test_a_run_that_waits_for_a_disk_that_hangs_saves_and_leaves_when_it_is_told_to(
    scenes: Scenes, tmp_path: Path, whole: Path
) -> None:
    like = scenes("tiny-i2v")
    shutil.copytree(like.cache, tmp_path / "cache")
    scene = Scene(like.model, like.root, like.source, tmp_path / "cache")
    entries = sorted((tmp_path / "cache" / "latents").glob("*.safetensors"))
    config = config_of(scene, tmp_path / "run")

    def hang() -> None:
        for entry in entries:
            entry.unlink()
            os.mkfifo(entry)  # whoever opens it waits for one who writes
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()  # when the steps that were read are done

    with pytest.raises(RunError, match=r"stopped by SIGTERM after step [23], which is saved"):
        train(config, False, At(2, hang))
    for entry in entries:
        with contextlib.suppress(OSError):  # where nobody reads
            os.close(os.open(entry, os.O_WRONLY | os.O_NONBLOCK))
        entry.unlink()
        shutil.copy(like.cache / "latents" / entry.name, entry)
    assert kinds(tmp_path / "run") == ["run-stopped"]
    assert_same_run(whole, train(config, True, Recorder()), step=5)
