"""SIGTERM and Ctrl-C: the first asks the run to save and leave, the second leaves at once."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP")


class StopRequest:
    """Which signal asked the run to stop; empty until one does."""

    def __init__(self) -> None:
        self.signal = ""


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Inside the context the first signal is noted, and the signals then have their usual effect again.

    A signal that is ignored stays so: under nohup a run outlives its terminal.
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

    def note(number: int, _frame: FrameType | None) -> None:
        request.signal = signal.Signals(number).name
        restore()

    for number in before:
        signal.signal(number, note)
    try:
        yield request
    finally:
        restore()
