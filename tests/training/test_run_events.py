"""events.jsonl: what is noted is there at once and stays; writing it never adds a fault of its own."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from longtake.distributed.ranks import Ranks
from longtake.errors import CacheError, Problem, RunError, agreed
from longtake.training.run_events import FILE, RunEvents
from refusals import file_size_limit


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / FILE).read_text(encoding="utf-8").splitlines()]


def test_what_is_told_is_said_and_noted_with_time_and_step(tmp_path: Path) -> None:
    said: list[str] = []
    events = RunEvents(tmp_path, said.append)
    events.tell("disk-low", "before the first step")
    events.at(7)
    events.telling("worker-died")("a worker\nof two lines, é")
    (first, second) = lines(tmp_path)
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", first.pop("time"))
    assert first == {"step": None, "kind": "disk-low", "what": "before the first step"}
    assert (second["step"], second["kind"], second["what"]) == (7, "worker-died", "a worker\nof two lines, é")
    assert said == ["before the first step", "a worker\nof two lines, é"]


def test_what_was_there_stays_and_a_line_that_was_cut_off_ends(tmp_path: Path) -> None:
    RunEvents(tmp_path, print).note("one", "a")
    before = (tmp_path / FILE).read_text()
    (tmp_path / FILE).write_text(before + '{"time": "20')
    RunEvents(tmp_path, print).note("two", "b")
    kept, cut, added = (tmp_path / FILE).read_text().splitlines()
    assert [f"{kept}\n", cut] == [before, '{"time": "20']
    assert json.loads(added)["kind"] == "two"


def test_a_disk_that_refuses_the_record_is_no_fault_of_its_own(tmp_path: Path) -> None:
    events = RunEvents(tmp_path, print)
    events.note("one", "a")
    size = (tmp_path / FILE).stat().st_size
    with file_size_limit(size):
        events.note("two", "b")
    with file_size_limit(size + 10):
        events.note("three", "c")
    assert (tmp_path / FILE).stat().st_size == size + 10
    (tmp_path / FILE).unlink()
    (tmp_path / FILE).mkdir()
    events.note("four", "d")
    RunEvents(tmp_path / "gone", print).note("five", "e")
    assert not (tmp_path / "gone").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write where nobody may")
def test_a_record_that_may_not_be_written_is_no_fault_of_its_own(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    RunEvents(tmp_path, print).note("one", "a")
    tmp_path.chmod(0o755)
    assert not (tmp_path / FILE).exists()


def test_what_ends_a_run_is_noted_under_its_code_and_raised(tmp_path: Path) -> None:
    events = RunEvents(tmp_path, print)
    problems = [Problem("no room", "a file", code="disk-full"), Problem("two", code="disk-two")]
    for error in (RunError(problems), CacheError("without a code"), ZeroDivisionError("a mistake")):
        with pytest.raises(type(error)), events.noting_the_end():
            raise error
    assert [(line["kind"], line["what"]) for line in lines(tmp_path)] == [
        ("disk-full", "a file: no room [disk-full]"),
        ("disk-two", "two [disk-two]"),
        ("run-failed", "without a code"),
        ("run-failed", "ZeroDivisionError: a mistake"),
    ]


def test_of_ranks_the_first_notes_what_all_have_in_common_and_each_its_own(tmp_path: Path) -> None:
    for rank in range(2):
        events = RunEvents(tmp_path, lambda text: None, Ranks(rank, 2))
        events.tell("update-skipped", "all")
        events.tell("worker-died", "mine", own=True)
        with pytest.raises(RunError), events.noting_the_end():
            raise agreed(RunError(Problem("all stop", code="run-stopped")))
    assert [(line["rank"], line["kind"]) for line in lines(tmp_path)] == [
        (0, "update-skipped"),
        (0, "worker-died"),
        (0, "run-stopped"),
        (1, "worker-died"),
    ]
