"""Who is asked over the loopback, and which files are opened, by whatever process."""

import ctypes
import os
import select
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True)
_OPENED = 0x20  # IN_OPEN
_EVENT = struct.Struct("iIII")


class Listener:
    """A TCP and a UDP port of 127.0.0.1 with one number, at which nobody should call."""

    def __init__(self) -> None:
        self.stream = socket.create_server(("127.0.0.1", 0))
        self.port = self.stream.getsockname()[1]
        self.datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.datagrams.bind(("127.0.0.1", self.port))

    def callers(self) -> int:
        """How many have called."""
        found = 0
        while ready := select.select([self.stream, self.datagrams], [], [], 0)[0]:
            for each in ready:
                if each is self.stream:
                    each.accept()[0].close()
                else:
                    each.recv(65536)
                found += 1
        return found

    def close(self) -> None:
        """Frees the port."""
        self.stream.close()
        self.datagrams.close()


@contextmanager
def listening() -> Iterator[Listener]:
    """A listener, until the context ends."""
    listener = Listener()
    try:
        yield listener
    finally:
        listener.close()


class Watch:
    """Counts how often files are opened (inotify(7))."""

    def __init__(self, *paths: Path) -> None:
        self.descriptor = _LIBC.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        assert self.descriptor >= 0
        self.names = {
            _LIBC.inotify_add_watch(self.descriptor, os.fsencode(path), ctypes.c_uint32(_OPENED)): path
            for path in paths
        }
        assert min(self.names) >= 0

    def opened(self) -> list[Path]:
        """The files that were opened, once for each time."""
        found: list[Path] = []
        while select.select([self.descriptor], [], [], 0)[0]:
            events = os.read(self.descriptor, 65536)
            while events:
                watch, _, _, length = _EVENT.unpack_from(events)
                found.append(self.names[watch])
                events = events[_EVENT.size + length :]
        return found


@contextmanager
def watching(*paths: Path) -> Iterator[Watch]:
    """A watch over `paths`, until the context ends."""
    watch = Watch(*paths)
    try:
        yield watch
    finally:
        os.close(watch.descriptor)
