"""Progress in a pipe and on a terminal: plain lines, a rate, the time that is left, and no text changed."""

import contextlib
import io
import os
import sys
from contextlib import redirect_stderr
from itertools import pairwise

import pytest

from longtake import progress
from longtake.progress import Pace, Reporter


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """Stands for the clock: each look at it comes `step` seconds after the last."""

    def __init__(self, step: float) -> None:
        self.now, self.step = 100.0, step

    def monotonic(self) -> float:
        self.now += self.step
        return self.now


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="there are no terminals of this kind")
def test_a_terminal_that_was_closed_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "w", buffering=1) as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        reporter = Reporter()
        assert reporter.console.is_terminal
        with reporter.bar("training", 3, "steps") as advance:
            advance(1, "before")
            os.close(ours)
            with pytest.raises(OSError, match="Input/output error"):
                os.write(theirs, b"x")
            advance(2, "after")
            reporter.line("a line")
        monkeypatch.undo()
        with contextlib.suppress(OSError):  # what is left in the stream's buffer
            terminal.close()


def test_a_pipe_that_nobody_reads_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    with os.fdopen(writing, "w", buffering=1) as pipe:
        monkeypatch.setattr(sys, "stderr", pipe)
        reporter = Reporter()
        os.close(reading)
        reporter.line("a line")
        with reporter.bar("training", 1, "steps") as advance:
            advance(1, "after")
        monkeypatch.undo()
        assert not reporter.console.quiet
        with contextlib.suppress(OSError):
            pipe.close()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock(0.0)
    monkeypatch.setattr(progress, "time", clock)
    return clock


@pytest.mark.parametrize("text", ["a [bold]b[/bold] [/x]", ":cat: 3:00:smile:", "x" * 500, "'quoted' 12 /a/b {}"])
def test_a_line_is_written_as_it_is(capsys: pytest.CaptureFixture[str], text: str) -> None:
    Reporter().line(text)
    assert capsys.readouterr().err == f"{text}\n"


def test_nothing_goes_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter()
    reporter.line("said")
    with reporter.bar("work", 2, "steps") as advance:
        advance(2, "")
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 2


def test_a_quiet_reporter_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter(quiet=True)
    reporter.line("said")
    with reporter.bar("work", 1, "steps") as advance:
        advance(1, "")
    assert capsys.readouterr().err == ""


def test_in_a_pipe_the_end_is_always_said(capsys: pytest.CaptureFixture[str]) -> None:
    with Reporter().bar("clips", 3, "clips") as advance:
        for done in (1, 2, 3):
            advance(done, f"at {done}")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("clips  3/3  ")
    assert line.endswith("ETA 0:00  at 3")
    assert "\x1b" not in line


def test_in_a_pipe_a_line_comes_every_few_seconds(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    with Reporter().bar("train", 100, "steps") as advance:
        for done in range(1, 101):
            clock.now += 1.0
            advance(done, "")
    counts = [int(line.split()[1].split("/")[0]) for line in capsys.readouterr().err.splitlines()]
    assert counts[-1] == 100
    assert {after - before for before, after in pairwise(counts[:-1])} == {int(progress.PLAIN_SECONDS)}


def test_on_a_terminal_a_bar_shows_the_rate_and_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("NO_COLOR", raising=False)
    with redirect_stderr(Terminal()) as stream, Reporter().bar("train", 4, "steps") as advance:
        advance(2, "loss [0.5]")
        advance(4, "loss [0.25]")
    shown = stream.getvalue()
    assert "4/4" in shown
    assert "steps/s" in shown
    assert "loss [0.25]" in shown
    assert "━" in shown


def test_no_color_is_honoured_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    with redirect_stderr(Terminal()) as stream, Reporter().bar("train", 1, "steps") as advance:
        advance(1, "")
    assert "\x1b[3" not in stream.getvalue()


@pytest.mark.parametrize(
    ("seconds", "count", "text"),
    [
        (10.0, 20, "20/100  2.00 clips/s  ETA 0:40"),
        (40.0, 20, "20/100  2.00 s/clip  ETA 2:40"),
        (10.0, 100, "100/100  10.00 clips/s  ETA 0:00"),
        (10.0, 0, "0/100"),
    ],
)
def test_the_pace_says_rate_and_time_left(clock: Clock, seconds: float, count: int, text: str) -> None:
    pace = Pace(100, 0, "clips")
    clock.now += seconds
    assert pace.at(count) == text


def test_after_a_resume_the_rate_counts_new_work_only(clock: Clock) -> None:
    pace = Pace(1000, 900, "steps")
    clock.now += 10.0
    assert pace.at(900) == "900/1000"
    assert pace.at(950) == "950/1000  5.00 steps/s  ETA 0:10"


def test_what_is_known_of_the_time_left_goes_before_the_rate(clock: Clock) -> None:
    known = {0: 400.0, 10: 200.0}
    pace = Pace(100, 0, "steps", known.get)
    assert pace.at(0) == "0/100  ETA 6:40"
    clock.now += 10.0
    assert pace.at(10) == "10/100  1.00 steps/s  ETA 3:20"
    assert pace.at(20) == "20/100  2.00 steps/s  ETA 0:40", "where nothing is known the rate counts"


def test_a_bar_says_at_once_how_long_it_will_take(capsys: pytest.CaptureFixture[str]) -> None:
    with Reporter().bar("training", 100, "steps", 20, lambda done: (100 - done) * 41.0) as advance:
        assert capsys.readouterr().err == "training  20/100  ETA 54:40\n"
        advance(100, "")
    assert capsys.readouterr().err.endswith("ETA 0:00\n")
