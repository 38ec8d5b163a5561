"""Parts of open files, read into host memory and written from it."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from longtake.errors import Problem, RunError


@dataclass(frozen=True)
class Extent:
    """`nbytes` bytes from `offset` on in the open file `descriptor`, called `path`, which `owner` keeps open."""

    descriptor: int
    path: str
    offset: int
    nbytes: int
    owner: object = field(default=None, repr=False, compare=False)


def read(target: Tensor, source: Sequence[Extent]) -> None:
    """Fills host bytes from files, with plain reads: a mapped file's pages would count as the process's memory."""
    rest = memoryview(target.numpy().data)
    for extent in source:
        offset, part = extent.offset, rest[: extent.nbytes]
        while part:
            count = os.preadv(extent.descriptor, [part], offset)
            if not count:
                raise RunError(
                    Problem(
                        "the file ended early: it was changed while it was read",
                        extent.path,
                        code="weights-changed-while-read",
                    )
                )
            offset, part = offset + count, part[count:]
        rest = rest[extent.nbytes :]


def write(target: Sequence[Extent], source: Tensor) -> None:
    """Writes host bytes to files; raises RunError where the disk refuses."""
    rest = memoryview(source.numpy().data)
    for extent in target:
        offset, part = extent.offset, rest[: extent.nbytes]
        while part:
            try:
                count = os.pwritev(extent.descriptor, [part], offset)
            except OSError as error:
                what = f"cannot offload {source.nbytes} bytes: {error.strerror or error}"
                raise RunError(
                    Problem(what, extent.path, 'make room, or use the tier "host"', code="disk-offload-failed")
                ) from error
            offset, part = offset + count, part[count:]
        rest = rest[extent.nbytes :]
