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


class Events:
    """A file of events in `run`, where what other files have from `first_step` on no longer counts.

    Raises RunError where the disk refuses.
    """

    def __init__(self, run: Path, first_step: int) -> None:
        # TensorBoard reads the files of a folder in the order of their names
        named = f"{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        self.file = files.Appended(run / f"events.out.tfevents.{named}")
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
