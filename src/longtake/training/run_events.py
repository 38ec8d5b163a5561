"""What befell a run, in events.jsonl: faults and what was done about them, appended and never taken back."""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from longtake.distributed.ranks import ALONE, Ranks
from longtake.errors import LongtakeError

FILE = "events.jsonl"


class RunEvents:
    """The record in the folder `run`; what the user has to know is said too. Writing it never raises.

    Of several ranks the first notes what all have in common; a rank notes what is its `own` under its number.
    """

    def __init__(self, run: Path, say: Callable[[str], None], ranks: Ranks = ALONE) -> None:
        self.path = run / FILE
        self.say = say
        self.ranks = ranks
        self.step: int | None = None

    def at(self, step: int) -> None:
        """From here on, `step` updates are done."""
        self.step = step

    def tell(self, kind: str, what: str, own: bool = False) -> None:
        """Says it and notes it."""
        self.say(what)
        self.note(kind, what, own)

    def telling(self, kind: str) -> Callable[[str], None]:
        """What says and notes lines of one kind."""
        return lambda what: self.tell(kind, what)

    def note(self, kind: str, what: str, own: bool = False) -> None:
        """Appends a line; where the disk refuses, the fault that is noted is the matter, not that."""
        if not (own or self.ranks.is_first):
            return
        now = datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="seconds")
        line = {"time": now, "step": self.step, "kind": kind, "what": what}
        if self.ranks.world > 1:
            line["rank"] = self.ranks.rank
        with suppress(OSError):
            _append(self.path, json.dumps(line, ensure_ascii=False) + "\n")

    @contextmanager
    def noting_the_end(self) -> Iterator[None]:
        """What ends the run in the context is noted, under its code where it has one, and raised."""
        try:
            yield
        except LongtakeError as error:
            for problem in error.problems:
                self.note(problem.code or "run-failed", str(problem), own=not error.agreed)
            raise
        except BaseException as error:
            self.note("run-failed", f"{type(error).__name__}: {error}", own=True)
            raise


def _append(path: Path, line: str) -> None:
    """In one write, so that those of several ranks do not mix; a line that was cut off before stays one of its own."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        if end := os.lseek(descriptor, 0, os.SEEK_END):
            os.lseek(descriptor, end - 1, os.SEEK_SET)
            if os.read(descriptor, 1) != b"\n":
                line = f"\n{line}"
        os.write(descriptor, line.encode("utf-8", "replace"))
    finally:
        os.close(descriptor)
