"""A process that has imported everything and forks a command for each line of its input, which starts it in no time.

A line is the JSON of a config's path, of the command ("train", "resume" or "prepare"), and of when it is killed, if it
is: at the `die_at`th time that it has been told of an operation on the disk, which is before and after each, or
`die_after` seconds later. The answer is the JSON of the exit status (-9 where it was killed) and, of a command that was
not killed, of what it was told: the seconds since its beginning, the kind of the operation and the path.

To be imported and not run: what is `__main__` is imported by each process that reads clips.
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from longtake import disk
from longtake.config.load import load_config
from longtake.data import encode
from longtake.errors import LongtakeError
from longtake.progress import Reporter
from longtake.training.model import find_model
from longtake.training.run import train

QUIET = Reporter(quiet=True)


def serve(first: Path) -> None:
    """Answers each line until the input ends, after one whole run of the config `first` in this process.

    What is imported late is there then before the first fork.
    """
    torch.set_num_threads(1)
    for command in ("prepare", "train"):
        assert _run(first, command) == 0
    for line in sys.stdin:
        asked = json.loads(line)
        answers, answer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(answers)
            os._exit(_told(asked, answer))
        os.close(answer)
        with os.fdopen(answers) as said:
            told = said.read()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps({"status": status, "told": json.loads(told or "[]")}), flush=True)


class Told:
    """Keeps what it is told of operations on the disk, and kills its process when it is time."""

    def __init__(self, die_at: int | None, die_after: float) -> None:
        self.die_at = die_at
        self.die_after = die_after
        self.begun = time.monotonic()
        self.kept: list[tuple[float, str, str]] = []

    def __call__(self, operation: disk.Operation, _done: bool) -> None:
        self.kept.append((time.monotonic() - self.begun, operation.kind, str(operation.path)))
        if len(self.kept) == self.die_at:
            self.die()

    def die(self) -> None:
        """Now, or a little later."""
        if not self.die_after:
            _kill()
        timer = threading.Timer(self.die_after, _kill)
        timer.daemon = True  # what has ended before need not be killed
        timer.start()


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _told(asked: dict[str, Any], answer: int) -> int:
    told = Told(asked.get("die_at"), asked.get("die_after", 0.0))
    with disk.watched(told):
        status = _run(Path(asked["config"]), asked["command"])
    with os.fdopen(answer, "w") as file:
        json.dump(told.kept, file)
    return status


def _run(path: Path, command: str) -> int:
    try:
        config = load_config(path)
        if command == "prepare":
            found = find_model(config, QUIET.line)
            root = encode.component_root(found, "model.components")
            encode.prepare(config, found.variant.spec, root, torch.device("cpu"), QUIET, (0, 1))
        else:
            train(config, command == "resume", QUIET)
    except LongtakeError as error:
        print(error, file=sys.stderr, flush=True)
        return error.exit_status
    return 0
