"""SIGTERM and Ctrl-C: the first asks the run to save and leave, the second leaves at once."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP")
REPEATED_WITHIN = 10.0
"""Seconds in which the same signal is the same request to a rank: a scheduler signals all processes of a job, the
launcher among them, and that passes it on."""


class StopRequest:
    """Which signal asked the run to stop; empty until one does."""

    def __init__(self) -> None:
        self.signal = ""


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Inside the context the first signal is noted, and the signals then have their usual effect again.

    A signal that is ignored stays so: under nohup a run outlives its terminal. A rank that torchrun has started may get
    the first one twice.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    present = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
    handlers = {number: signal.getsignal(number) for number in present}
    before = {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    until = 0.0

    def note(number: int, _frame: FrameType | None) -> None:
        nonlocal until
        name = signal.Signals(number).name
        if name == request.signal and time.monotonic() < until:
            return
        if request.signal:
            restore()
            signal.raise_signal(number)
            return
        request.signal = name
        if "TORCHELASTIC_RUN_ID" in os.environ:
            until = time.monotonic() + REPEATED_WITHIN
        else:
            restore()

    for number in before:
        signal.signal(number, note)
    try:
        yield request
    finally:
        restore()
