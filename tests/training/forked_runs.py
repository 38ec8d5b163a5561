"""A process that has imported everything and forks a run for each line of its input: starting one takes milliseconds.

A line is the JSON of a config's path, whether to resume, and the seconds after which the run is killed (null: never);
the answer is the JSON of the exit status (-9 for a killed run) and the seconds that it took.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

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
        status = _forked(Path(asked["config"]), asked["resume"], asked["kill_after"])
        print(json.dumps({"status": status, "seconds": time.monotonic() - started}), flush=True)


def _forked(config: Path, resume: bool, kill_after: float | None) -> int:
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
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
