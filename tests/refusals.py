"""Disks that refuse: one operation of the writer that is chosen, or every file from a size on."""

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from longtake import disk


class Refusing:
    """Refuses one operation of the writer, the `number`th, before it is made; counts them."""

    def __init__(self, number: int | None, error: int) -> None:
        self.number = number
        self.error = error
        self.count = 0
        self.refused: disk.Operation | None = None

    def __call__(self, operation: disk.Operation, done: bool) -> None:
        if done:
            return
        self.count += 1
        if self.count == self.number:
            self.refused = operation
            raise OSError(self.error, os.strerror(self.error), str(operation.path))


def operations_of(write: Callable[[], object]) -> int:
    """How many operations a write makes."""
    counting = Refusing(None, 0)
    with disk.watched(counting):
        write()
    return counting.count


@contextmanager
def file_size_limit(count: int) -> Iterator[None]:
    """Inside the context the system refuses to make a file larger than `count` bytes, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
