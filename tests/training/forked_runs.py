"""A process that has imported everything and forks a run for each line of its input: starting one takes milliseconds.

A line is the JSON of a config's path, whether to resume, and when the run is killed, if it is: `kill_after` so many
seconds, or when it has been told `die_at` times of an operation on the disk, which is before and after each. The answer
is the JSON of the exit status (-9 for a killed run), of the seconds that it took, and of how often it was told.
"""

import json
import mmap
import os
import signal
import sys
import time
from pathlib import Path

import torch

from longtake import disk
from longtake.config.load import load_config
from longtake.errors import LongtakeError
from longtake.progress import Reporter
from longtake.training.run import train


def serve() -> None:
    """Answers each line until the input ends."""
    torch.set_num_threads(1)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    for line in sys.stdin:
        asked = json.loads(line)
        started = time.monotonic()
        told = Told(asked.get("die_at"))
        status = _forked(Path(asked["config"]), asked["resume"], asked.get("kill_after"), told)
        answer = {"status": status, "seconds": time.monotonic() - started, "told": told.count}
        print(json.dumps(answer), flush=True)


class Told:
    """Counts, in memory that forks share, how often it was told of an operation; ends the process at the `die_at`th."""

    def __init__(self, die_at: int | None) -> None:
        self.die_at = die_at
        self.shared = mmap.mmap(-1, 8)

    @property
    def count(self) -> int:
        """So far."""
        return int.from_bytes(self.shared[:8], "little")

    def __call__(self, _operation: disk.Operation, _done: bool) -> None:
        self.shared[:8] = (self.count + 1).to_bytes(8, "little")
        if self.count == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)


def _forked(config: Path, resume: bool, kill_after: float | None, told: Told) -> int:
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        with disk.watched(told):
            os._exit(_run(config, resume))
    if kill_after is None:
        signal.sigwait({signal.SIGCHLD})
    elif signal.sigtimedwait({signal.SIGCHLD}, kill_after) is None:
        os.kill(child, signal.SIGKILL)
        signal.sigwait({signal.SIGCHLD})
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _run(config: Path, resume: bool) -> int:
    try:
        train(load_config(config), resume, Reporter(quiet=True))
    except LongtakeError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    # one whole run here, so that what is imported late is there before the first fork
    train(load_config(Path(sys.argv[1])), False, Reporter(quiet=True))
    serve()
