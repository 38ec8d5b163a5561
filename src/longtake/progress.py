"""Progress on the terminal: bars where there is one, plain lines in a pipe. Needs no torch."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from longtake.units import format_seconds

Advance = Callable[[int, str], None]
"""Takes how many units are done in all and what to say beside the bar."""

TimeLeft = Callable[[int], float | None]
"""The seconds that are left when so many units are done in all; None where that is not known."""

PLAIN_SECONDS = 5.0
"""Least time between two lines of one bar where the output is no terminal."""


class Reporter:
    """Says what goes on, on stderr, so that stdout stays for results."""

    def __init__(self, quiet: bool = False) -> None:
        output = cast("IO[str]", _Output(sys.stderr))
        self.console = Console(file=output, quiet=quiet, highlight=False, emoji=False, soft_wrap=True)

    def line(self, text: str) -> None:
        """One line."""
        self.console.print(text, markup=False)

    @contextmanager
    def bar(
        self, title: str, total: int, unit: str, done: int = 0, left: TimeLeft = lambda _done: None
    ) -> Iterator[Advance]:
        """Yields the function to call as work is done; it shows rate and the time left beside its text.

        `done` units were there before (a resumed run): they count in the bar and not in the rate. `left` may know
        better than the rate how long the rest takes, and before the first unit is done.
        """
        pace = Pace(total, done, unit, left)
        if not self.console.is_terminal:
            yield self._plain(title, pace)
            return
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"))
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(title, total=total, completed=done, text=pace.at(done))

            def advance(count: int, text: str) -> None:
                progress.update(task, completed=count, text=f"{pace.at(count)}  {text}")

            yield advance

    def _plain(self, title: str, pace: "Pace") -> Advance:
        last = time.monotonic()
        if pace.left(pace.before) is not None:
            self.line(f"{title}  {pace.at(pace.before)}")

        def advance(count: int, text: str) -> None:
            nonlocal last
            if count < pace.total and time.monotonic() - last < PLAIN_SECONDS:
                return
            last = time.monotonic()
            self.line(f"{title}  {pace.at(count)}  {text}".rstrip())

        return advance


class _Output:
    """A stream that may go away: a terminal that was closed, a pipe that nobody reads. What is said then is lost.

    A run that a hang-up asks to save itself would else end at its next line.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """All of it, or nothing."""
        with suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """As a stream's."""
        with suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class Pace:
    """Rate and remaining time of `total` units, of which `before` were done before the clock started.

    The remaining time is what `left` says, or else goes by the rate.
    """

    def __init__(self, total: int, before: int, unit: str, left: TimeLeft = lambda _done: None) -> None:
        self.total = total
        self.before = before
        self.unit = unit
        self.left = left
        self.started = time.monotonic()

    def at(self, count: int) -> str:
        """`12/50  1.3 clips/s  ETA 0:29`."""
        seconds = time.monotonic() - self.started
        new = count - self.before
        left = self.left(count)
        if new <= 0 or seconds <= 0:
            return f"{count}/{self.total}" + ("" if left is None else f"  ETA {format_seconds(left)}")
        rate = new / seconds
        left = (self.total - count) / rate if left is None else left
        shown = f"{rate:.2f} {self.unit}/s" if rate >= 1 else f"{1 / rate:.2f} s/{self.unit.rstrip('s')}"
        return f"{count}/{self.total}  {shown}  ETA {format_seconds(left)}"
