"""Ranks that `--gpus N` starts: what they are told, the status that they end with, and that none stays behind."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from longtake.distributed.launch import (
    Ended,
    die_with_parent,
    launch,
    leave_status,
    rank_environment,
    verdict,
    without_gpus,
)
from longtake.errors import RunError

RANK = '''
"""Stands in for the module that ranks run: does what its first argument says."""
import json, os, signal, sys
from longtake.distributed.launch import die_with_parent, leave_status

die_with_parent()
how, rank = sys.argv[1], int(os.environ["RANK"])

def say(line, stream=1):
    os.write(stream, f"{line}\\n".encode())  # at once, or lines of ranks mix

def leave(status):
    leave_status(status)
    sys.exit(status)

def on_signal(number, frame):
    say(f"rank {rank}: {signal.Signals(number).name}")
    if how == "heed":
        leave(3 if rank == 1 else 1)
    signal.signal(number, signal.SIG_DFL)  # the second one ends it

if how == "show":
    told = {"arguments": sys.argv[1:], "session": os.getsid(0) == os.getpid(), **os.environ}
    say(json.dumps(told))
    leave(0)
signal.signal(signal.SIGTERM, on_signal)
if how in ("refuse", "crash", "killed", "abort"):  # of rank 1, which the agent then tells rank 0
    signal.signal(signal.SIGTERM, lambda *_: (say("error: rank 0 has lost rank 1", 2), leave(1)))
if rank == 1 and how == "refuse":
    say("error: --x: wrong", 2)
    leave(2)
if rank == 1 and how == "crash":
    raise ValueError("boom")
if rank == 1 and how == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if rank == 1 and how == "abort":
    leave_status(3)
    os.abort()
say(f"rank {rank}: ready")
while True:
    signal.pause()
'''
LAUNCHER = """
import os, signal, sys
from longtake.distributed.launch import launch, rank_environment
from longtake.errors import RunError

signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
try:
    sys.exit(launch(sys.argv[1:], 2, rank_environment(os.environ, 2, False), "rank"))
except RunError as error:
    sys.exit(f"error: {error}")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the module `rank` in it that ranks find."""
    (tmp_path / "rank.py").write_text(RANK, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # a launcher that is killed leaves its folder
    return tmp_path


def launched(*arguments: str) -> int:
    """The status of two ranks of this process; neither is there afterwards, and the environment is as it was."""
    before, environment = psutil.Process().children(), dict(os.environ)
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    try:
        return launch(arguments, 2, rank_environment(os.environ, 2, False), "rank")
    finally:
        assert psutil.Process().children() == before
        assert os.environ == environment
        assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)] == handlers


@contextmanager
def started(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A launcher whose two ranks are ready; all three hold its standard output open."""
    command = [sys.executable, "-c", LAUNCHER, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert lines(process, 2) == ["rank 0: ready", "rank 1: ready"]
            yield process
        finally:
            process.kill()


def lines(process: subprocess.Popen[str], count: int) -> list[str]:
    """The next lines of its output, sorted."""
    assert process.stdout is not None
    return sorted(process.stdout.readline().strip() for _ in range(count))


@pytest.mark.long
def test_ranks_get_the_arguments_as_they_are_and_variables_of_their_own(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert launched("show", "--gpus", "2", "--set", "a=$b $$ ${local_rank}", "--gpus=2", "") == 0
    out, err = capfd.readouterr()
    first, second = sorted(map(json.loads, out.splitlines()), key=lambda told: told["RANK"])
    assert err == ""
    assert first["arguments"] == second["arguments"] == ["show", "--set", "a=$b $$ ${local_rank}", ""]
    assert [(each["RANK"], each["LOCAL_RANK"], each["WORLD_SIZE"]) for each in (first, second)] == [
        ("0", "0", "2"),
        ("1", "1", "2"),
    ]
    assert first["session"]  # a terminal's Ctrl-C reaches the launcher alone, which passes it on once
    assert (first["MASTER_ADDR"], first["DS_ACCELERATOR"]) == ("127.0.0.1", "cpu")
    assert first["MASTER_PORT"] == second["MASTER_PORT"]
    assert first["LONGTAKE_LAUNCHER"] == str(os.getpid())


@pytest.mark.long
def test_one_rank_that_refuses_its_input_gives_status_2_and_says_so_once(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert launched("refuse") == 2
    said = capfd.readouterr().err.splitlines()
    assert said[0] == "error: --x: wrong"
    assert said[1:] in ([], ["error: rank 0 has lost rank 1"])


@pytest.mark.long
def test_a_crash_gives_status_1_and_its_traceback_before_what_other_ranks_say(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert launched("crash") == 1
    said = capfd.readouterr().err.splitlines()
    assert said[0] == "Traceback (most recent call last):"
    assert said.count("ValueError: boom") == 1
    assert said[-1] in ("ValueError: boom", "error: rank 0 has lost rank 1")


@pytest.mark.long
def test_a_rank_that_is_killed_is_named_with_the_signal(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RunError) as raised:
        launched("killed")
    assert [*map(str, raised.value.problems)] == [
        "rank 1: killed by SIGKILL, as the system does where host memory runs out; "
        "continue with --resume from the last checkpoint [rank-killed]"
    ]
    assert capfd.readouterr().err in ("", "error: rank 0 has lost rank 1\n")


@pytest.mark.long
def test_a_rank_that_has_told_its_status_may_crash_in_leaving(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert launched("abort") == 3
    assert capfd.readouterr().err in ("", "error: rank 0 has lost rank 1\n")


@pytest.mark.long
def test_a_signal_that_is_not_ignored_reaches_each_rank_once_and_the_status_is_theirs(folder: Path) -> None:
    with started("heed") as launcher:
        launcher.send_signal(signal.SIGHUP)
        launcher.send_signal(signal.SIGTERM)
        out, err = launcher.communicate(timeout=60)
    assert sorted(out.splitlines()) == ["rank 0: SIGTERM", "rank 1: SIGTERM"]
    assert (launcher.returncode, err) == (3, "")


def interrupted(launcher: subprocess.Popen[str]) -> tuple[str, str]:
    """What the launcher says in the end, when SIGINT comes again as long as it has not ended, as from a person's key.

    One that comes while ranks are being told of the signal before it is the same one to the agent.
    """
    for _ in range(6):
        launcher.send_signal(signal.SIGINT)
        try:
            return launcher.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            continue
    raise AssertionError("the launcher goes on")


@pytest.mark.long
def test_a_second_signal_ends_ranks_that_take_their_time(folder: Path) -> None:
    with started("wait") as launcher:
        launcher.send_signal(signal.SIGTERM)
        assert lines(launcher, 2) == ["rank 0: SIGTERM", "rank 1: SIGTERM"]
        _, err = interrupted(launcher)
    line = "error: ranks 0, 1: ended after SIGINT without a word; continue with --resume from the last checkpoint"
    line += " [rank-silent]\n"
    assert launcher.returncode == 1
    assert err.startswith(line)  # Python may add to it where the last SIGINT came while it was leaving


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parent")
def test_ranks_end_with_a_launcher_that_is_killed(folder: Path) -> None:
    with started("wait") as launcher:
        launcher.kill()
        out, err = launcher.communicate(timeout=60)  # returns when nobody has its output open any more
    assert (launcher.returncode, out, err) == (-signal.SIGKILL, "", "")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parent")
def test_a_rank_whose_launcher_has_gone_at_its_start_ends() -> None:
    environment = {**os.environ, "TORCHELASTIC_RUN_ID": "1", "RANK": "1", "LONGTAKE_LAUNCHER": "0"}
    code = "from longtake.distributed.launch import die_with_parent; die_with_parent()"
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert ended.stderr.endswith("RunError: rank 1: the process that started it has gone [launcher-gone]\n")


def test_a_process_that_no_launcher_started_has_nobody_to_tell_or_to_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.delenv("LONGTAKE_STATUS_FILE", raising=False)
    monkeypatch.setenv("LONGTAKE_LAUNCHER", "0")
    before = sorted(Path.cwd().iterdir())
    leave_status(2)
    die_with_parent()
    assert sorted(Path.cwd().iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        (["train", "a.toml", "--gpus", "4", "--resume"], ["train", "a.toml", "--resume"]),
        (["train", "--gpus=4", "a.toml"], ["train", "a.toml"]),
        (["train", "a.toml", "--set", "a=--gpus=4", "--gpus"], ["train", "a.toml", "--set", "a=--gpus=4"]),
    ],
)
def test_the_number_of_gpus_is_not_handed_on(arguments: list[str], kept: list[str]) -> None:
    assert without_gpus(arguments) == kept


def test_what_the_user_has_set_for_ranks_stays() -> None:
    environment = {"OMP_NUM_THREADS": "3", "DS_ACCELERATOR": "cuda", "TORCH_CPP_LOG_LEVEL": "INFO"}
    assert rank_environment(environment, 2, False).keys() & environment.keys() == set()
    assert "DS_ACCELERATOR" not in rank_environment({}, 2, True)


def test_ranks_share_the_cores_and_each_has_one() -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = [rank_environment({}, processes, True)["OMP_NUM_THREADS"] for processes in (1, 10_000)]
    assert threads == [str(cores), "1"]


@pytest.mark.parametrize(
    ("codes", "status"),
    [
        ([(1, 2), (0, -15)], 2),
        ([(0, 1), (1, 2)], 2),  # the first has lost the second
        ([(0, -9), (1, 3)], 3),
        ([(0, 1), (1, -15), (2, -9, 30)], 1),  # the agent ended the others
        ([(0, 77)], 1),
    ],
)
def test_the_status_is_that_of_the_cause(codes: list[tuple[int, ...]], status: int) -> None:
    assert verdict(ended(codes)) == status


@pytest.mark.parametrize(
    ("codes", "killed"),
    [
        ([(1, -15), (0, -15)], "rank 1: killed by SIGTERM"),
        ([(0, 1), (1, -9), (2, -15)], "rank 1: killed by SIGKILL, as"),  # the first has lost the second
        ([(0, -11), (1, -9, 30)], "rank 0: killed by SIGSEGV"),
        ([(3, -63)], "rank 3: killed by signal 63"),
    ],
)
def test_what_was_killed_is_told_from_what_the_agent_ended(codes: list[tuple[int, ...]], killed: str) -> None:
    with pytest.raises(RunError) as raised:
        verdict(ended(codes))
    (problem,) = raised.value.problems
    assert str(problem).startswith(killed)


def ended(codes: list[tuple[int, ...]]) -> list[Ended]:
    """Of (rank, code) or (rank, code, seconds after the first)."""
    return [Ended(rank, code, 1000 + sum(later)) for rank, code, *later in codes]
