"""A run that is killed at any moment and resumed ends as the one that was left alone, to the bit."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import psutil
import pytest

from longtake import files
from longtake.config.dump import to_toml
from longtake.config.schema import RunConfig
from longtake.training.checkpoint import load_newest
from longtake.training.metrics import FILE as METRICS
from processes import MARK
from runs import Scene, assert_same_run, contents, learnt

STEPS = 3
SAMPLED = 29
"""Every so many of the moments of a run before and after an operation are tried in `make test`, all in `make bench`."""
SERVER = "import sys; sys.path.insert(0, sys.argv[1]); from forked_runs import Path, serve; serve(Path(sys.argv[2]))"

Phase = Literal["first step", "saving", "pruning", "sampling", "results", "caching", "anywhere"]
Command = Literal["train", "resume", "prepare"]
Scenes = Callable[[str], Scene]

CURRICULUM = {"num_frames": 9, "frames_schedule": ((0, 5), (1, 9)), "caption_dropout": 0.3}
SAMPLES = {"samples": ({"prompt": "a kite"},), "sample_steps": 1, "guidance_scale": 1.0}
ACCUMULATED = {"global_batch_size": 4}
CASES: Mapping[str, dict[str, Any]] = {
    "lora": {
        "data": CURRICULUM,
        "lora": {"dropout": 0.1},
        "training": {"ema": 0.9, "warmup_steps": 2},
        "memory": {"activation_offload": "disk"},
    },
    "lora, accumulated, by workers": {"training": ACCUMULATED, "data": {"workers": 2}},
    "lora, averaged, sampled": {"training": {"ema": 0.5}, "validation": SAMPLES},
    "lora, averaged, 8-bit": {"memory": {"optimizer": "adamw8bit"}, "training": {"ema": 0.9}},
    "full": {"lora": None},
    "full, averaged, accumulated, sampled": {
        "lora": None,
        "training": {"ema": 0.5, **ACCUMULATED},
        "validation": SAMPLES,
    },
    "full, sampled, by workers": {"lora": None, "validation": SAMPLES, "data": {"workers": 2}},
    "full, averaged, by workers": {"lora": None, "training": {"ema": 0.9}, "data": {"workers": 2, **CURRICULUM}},
}


def config_of(scene: Scene, case: str, run: Path, data: Mapping[str, Any] | None = None) -> RunConfig:
    """A checkpoint after every step, of which two are kept, and a validation every other step."""
    sections = {**CASES[case]}
    sections["training"] = {"steps": STEPS, "global_batch_size": 1, **sections.get("training", {})}
    sections["validation"] = {"every": 2, **sections.get("validation", {})}
    sections["data"] = {**sections.get("data", {}), **(data or {})}
    return scene.config(run, output={"keep": 2}, **sections)


@dataclass(frozen=True)
class Told:
    """An operation on the disk: when, in seconds since the command's beginning, its kind and what it was of."""

    seconds: float
    kind: str
    path: str


class Server:
    """Has commands run in forks of a process that has done a run already."""

    def __init__(self, process: "subprocess.Popen[str]", errors: Path) -> None:
        self.process = process
        self.errors = errors

    def __call__(
        self, config: RunConfig, command: Command, die_at: int | None = None, die_after: float = 0.0
    ) -> tuple[int, list[Told]]:
        """The exit status, and what was told of the disk; the command is killed at that time."""
        path = Path(f"{config.output.run}.toml")
        files.write_text(path, to_toml(config))
        request = {"config": str(path), "command": command, "die_at": die_at, "die_after": die_after}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, self.errors.read_text()
        found = json.loads(answer)
        return found["status"], [Told(*told) for told in found["told"]]


@pytest.fixture(scope="module")
def ask(scenes: Scenes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server; that nothing is left of the processes that it forked, and that those started, is asserted."""
    folder = tmp_path_factory.mktemp("server")
    config = config_of(scenes("tiny-t2v"), "lora, averaged, sampled", folder / "warm")
    files.write_text(folder / "warm.toml", to_toml(config))
    command = [sys.executable, "-c", SERVER, str(Path(__file__).parent), str(folder / "warm.toml")]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    errors, environment = folder / "errors.txt", os.environ | {MARK: str(folder)}
    with errors.open("w") as stderr, subprocess.Popen(command, stderr=stderr, env=environment, **pipes) as server:
        yield Server(server, errors)
        assert server.stdin is not None
        server.stdin.close()
        server.wait()
        left = [process for process in psutil.process_iter() if _is_marked(process, folder)]
        _, alive = psutil.wait_procs(left, timeout=10)
    assert [process.cmdline() for process in alive] == []


def _is_marked(process: psutil.Process, folder: Path) -> bool:
    try:
        return process.environ().get(MARK) == str(folder)
    except psutil.Error:
        return False


def assert_same(whole: Path, run: Path) -> None:
    """Weights, optimiser, average, schedule and scale, the log without gaps or repetition, samples, and the results."""
    steps = [line["step"] for line in learnt(run) if "loss" in line]
    assert steps == [*range(1, STEPS + 1)]
    assert learnt(run) == learnt(whole)
    for name in (f"checkpoints/step-{STEPS:08d}", "samples", "transformer"):
        assert contents(run / name) == contents(whole / name), name
    results = [{path.name: path.read_bytes() for path in folder.glob("adapter*")} for folder in (whole, run)]
    assert results[0] == results[1]
    assert not [*run.rglob("*.staged-*"), *run.rglob("activations-*")]
    # one more stays where the kill came between the last save and the removal, since nothing more is saved
    assert len([*(run / "checkpoints").iterdir()]) in (2, 3)


def moment(phase: Phase, told: list[Told], chosen: random.Random) -> tuple[int, float]:
    """After which word of the disk, and how many seconds later, a command is killed; often at once."""
    is_in: dict[str, Callable[[Told], bool]] = {
        "saving": lambda each: "checkpoints/step-" in each.path and not each.path.endswith("removed"),
        "pruning": lambda each: each.path.endswith("removed"),
        "sampling": lambda each: "/samples" in each.path,
        "results": lambda each: "adapter" in each.path or "transformer.staged" in each.path,
        "caching": lambda each: True,
    }
    if phase == "first step":  # what comes before the first save, which syncs the log and makes a folder
        begun = next(index for index, each in enumerate(told) if "checkpoints" in each.path)
        last = next(index for index in range(begun, 0, -1) if not told[index].path.endswith(("checkpoints", METRICS)))
        return last + 1, chosen.uniform(0.0, told[last + 1].seconds - told[last].seconds)
    if phase == "anywhere":
        now = chosen.uniform(told[0].seconds, told[-1].seconds)
        index = max(index for index, each in enumerate(told) if each.seconds <= now)
        return index + 1, now - told[index].seconds
    index = chosen.choice([index for index, each in enumerate(told[:-1]) if is_in[phase](each)])
    return index + 1, chosen.choice((0.0, chosen.uniform(0.0, told[index + 1].seconds - told[index].seconds)))


PHASES: tuple[Phase, ...] = ("first step", "saving", "pruning", "results", "anywhere", "anywhere", "caching")
PLAN_OF_20: tuple[tuple[str, Phase], ...] = (
    *(("lora", phase) for phase in PHASES),
    *(("lora, accumulated, by workers", phase) for phase in PHASES[:2]),
    *(("full, averaged, accumulated, sampled", phase) for phase in (*PHASES, "sampling")),
    *(("full", phase) for phase in PHASES[:3]),
)  # type: ignore[assignment]


def plan_of_200() -> list[tuple[str, Phase]]:
    """25 kills a case, one of each in turn: each phase that it has, and anywhere."""
    plan: list[tuple[str, Phase]] = []
    for number in range(25):
        for case, sections in CASES.items():
            sampled = "samples" in sections.get("validation", {})
            of_case = (*PHASES, "sampling") if sampled else PHASES
            plan.append((case, of_case[number % len(of_case)]))  # type: ignore[arg-type]
    return plan


@pytest.mark.long
@pytest.mark.timeout(3000)  # 20 take less than a minute on idle cores
@pytest.mark.parametrize("kills", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_a_run_killed_at_any_moment_and_resumed_ends_to_the_bit_as_without(
    scenes: Scenes, tmp_path: Path, ask: Server, kills: int
) -> None:
    scene = scenes("tiny-t2v")

    @cache
    def whole(case: str, command: Command) -> list[Told]:
        """What the disk was told in the run without a kill; its clips are read on a thread."""
        others = {"workers": 0, **({"cache": str(tmp_path / f"cache of {case}")} if command == "prepare" else {})}
        config = config_of(scene, case, tmp_path / case, others)
        if command == "train":
            scene.prepare(config)
        status, told = ask(config, command)
        assert status == 0, ask.errors.read_text()
        return told

    plan = PLAN_OF_20 if kills == 20 else plan_of_200()
    assert len(plan) == kills
    for number, (case, phase) in enumerate(plan):
        chosen = random.Random(f"{kills} {number}")
        whole(case, "train")
        command: Command = "prepare" if phase == "caching" else "train"
        die_at, die_after = moment(phase, whole(case, command), chosen)
        run = tmp_path / f"trial-{number}"
        others = {"cache": str(run.with_suffix(".cache"))} if command == "prepare" else {}
        config = config_of(scene, case, run, others)
        where = f"{number}: {case}, {phase}, word {die_at} + {die_after:.4f} s"
        print(where, flush=True)
        status, _ = ask(config, command, die_at, die_after)
        if status == 0 and die_after:  # it was faster than the one without a kill, and over
            for folder in (run, run.with_suffix(".cache")):
                shutil.rmtree(folder, ignore_errors=True)
            status, _ = ask(config, command, die_at)
        assert status == -9, f"{where}: {ask.errors.read_text()}"
        if command == "prepare":
            assert ask(config, "prepare")[0] == 0, f"{where}: {ask.errors.read_text()}"
        newest = load_newest(run, pytest.fail) if (run / "checkpoints").exists() else None
        assert newest is None or newest.step in range(1, STEPS + 1), where
        begun = (run / "config.toml").exists()  # else the kill came before anything was
        if chosen.random() < 0.5:
            config = config_of(scene, case, run, others | {"workers": 0})
        assert ask(config, "resume" if begun else "train")[0] == 0, f"{where}: {ask.errors.read_text()}"
        assert_same(tmp_path / case, run)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("every", [SAMPLED, pytest.param(1, marks=pytest.mark.slow)])
def test_a_run_killed_before_and_after_an_operation_on_the_disk_and_resumed_ends_to_the_bit_as_without(
    scenes: Scenes, tmp_path: Path, ask: Server, every: int
) -> None:
    scene = scenes("tiny-t2v")

    def config_in(run: Path) -> RunConfig:
        return scene.config(run, training={"ema": 0.5}, output={"keep": 1, "formats": ("comfyui", "kohya")})

    scene.prepare(config_in(tmp_path / "whole"))
    status, told = ask(config_in(tmp_path / "whole"), "train")
    assert status == 0
    assert len(told) > 100
    for die_at in range(1, len(told) + 1, every):
        config = config_in(tmp_path / f"died-{die_at}")
        run = Path(config.output.run)
        assert ask(config, "train", die_at)[0] == -9
        newest = load_newest(run, pytest.fail)  # nothing that is damaged has a checkpoint's name
        assert newest is None or newest.step in (1, 2)
        assert ask(config, "resume" if (run / "config.toml").exists() else "train")[0] == 0
        assert_same_run(tmp_path / "whole", run, step=2)
        assert not [*run.rglob("*.staged-*")]
        # the one before the last stays where the kill came between the two, since nothing more is saved
        assert len([*(run / "checkpoints").iterdir()]) in (1, 2)
