"""TensorBoard's events, written at once: torch's writer has a thread, which prints a traceback on a full disk."""

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from longtake import files

PREFIX = "events.out.tfevents."


class Events:
    """A file of events in `run`, where what other files have from `first_step` on no longer counts.

    Raises RunError where the disk refuses.
    """

    def __init__(self, run: Path, first_step: int) -> None:
        named = f"{_time_after(run):017.6f}.{socket.gethostname()}.{os.getpid()}"
        self.file = files.Appended(run / f"{PREFIX}{named}")
        self.records = RecordWriter(self.file)
        self._add(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self._add(Event(wall_time=time.time(), step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Scalars of `step`."""
        summary = Summary(value=[Summary.Value(tag=key, simple_value=float(value)) for key, value in values.items()])
        self._add(Event(wall_time=time.time(), step=step, summary=summary))

    def close(self) -> None:
        """Ends the file."""
        self.file.close()

    def _add(self, event: Event) -> None:
        self.records.write(event.SerializeToString())


def _time_after(run: Path) -> float:
    """Now, or after the files that are there: TensorBoard reads them by name, and the clock may have been set back."""
    times = [path.name.removeprefix(PREFIX)[:17] for path in run.glob(f"{PREFIX}*")]
    latest = max((float(text) for text in times if text.replace(".", "").isdigit()), default=0.0)
    return max(time.time(), latest + 1e-3)
