"""Processes that a test starts: what they say, waiting for a condition with a deadline, and that none stays behind."""

import os
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

MARK = "LONGTAKE_TEST_MARK"
"""The variable by which processes that a test has started are known, whoever started them in between."""
DEADLINE_SECONDS = 240.0


@dataclass(frozen=True)
class Started:
    """A process with `mark` in its environment and in that of all that it starts; `said` has both of its streams."""

    process: subprocess.Popen[bytes]
    said: Path
    mark: str

    @property
    def lines(self) -> list[str]:
        """What it and those that it started have said until now."""
        return self.said.read_text(encoding="utf-8").splitlines()

    @property
    def alive(self) -> list[psutil.Process]:
        """It and those that it started, as far as they have not ended."""
        return [process for process in psutil.process_iter() if _mark_of(process) == self.mark]

    def status(self, seconds: float = DEADLINE_SECONDS) -> int:
        """Its exit status, when it has ended; minus the signal that ended it."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not over after {seconds} seconds:\n{self.said.read_text()}") from None

    def until(self, holds: Callable[[], bool], seconds: float = DEADLINE_SECONDS) -> None:
        """Returns when `holds` does, which must be within `seconds` and before the process has ended."""
        deadline = time.monotonic() + seconds
        while not holds():
            assert self.process.poll() is None, f"status {self.process.returncode}:\n{self.said.read_text()}"
            assert time.monotonic() < deadline, f"not within {seconds} seconds:\n{self.said.read_text()}"
            time.sleep(0.02)


@contextmanager
def started(command: Sequence[object], said: Path, changes: Mapping[str, str]) -> Iterator[Started]:
    """A process in an environment with `changes`; what is left of it and of those that it started is ended."""
    mark = uuid.uuid4().hex
    with (
        said.open("wb") as file,
        subprocess.Popen(
            [*map(str, command)], env=os.environ | changes | {MARK: mark}, stdout=file, stderr=subprocess.STDOUT
        ) as process,
    ):
        one = Started(process, said, mark)
        try:
            yield one
        finally:
            for left in one.alive:
                with suppress(psutil.NoSuchProcess):
                    left.kill()


def _mark_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get(MARK)
    except (psutil.Error, OSError):  # it has ended, or is somebody else's
        return None
