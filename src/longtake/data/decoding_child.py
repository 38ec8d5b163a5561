"""The process that decodes: what a file can do to FFmpeg or Pillow it does here, within limits and without secrets.

Started by `decoder`. Each request is one byte with the open file's descriptor, then a message; the answers are
messages, each of four bytes of length and JSON, and after a picture's message its pixels. Nothing pickled goes either
way: the parent believes a child that a file has taken over as little as it believes the file.
"""

import json
import resource
import socket
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from PIL import Image

from longtake.data.decoding import LENGTH, Pixels, clip_pictures, image_pixels
from longtake.data.sniff import Window, look
from longtake.errors import DataError

SIGN_OF_LIFE_SECONDS = 1.0


def main() -> None:
    """Answers requests on the socket of descriptor `argv[1]` until the parent has gone."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    processor_seconds, memory_bytes = int(sys.argv[2]), int(sys.argv[3])
    Image.init()  # while files can be opened
    with suppress(ValueError):  # macOS knows the limit, and refuses to set it
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    child = Child(connection, processor_seconds)
    try:
        while child.answer():
            pass
    except (BrokenPipeError, ConnectionResetError):
        return  # the parent has gone, or no longer wants to know


class Child:
    """Answers on `connection`; more than `processor_seconds` for one picture end the process."""

    def __init__(self, connection: socket.socket, processor_seconds: int) -> None:
        self.connection = connection
        self.processor_seconds = processor_seconds
        self.said = 0.0

    def answer(self) -> bool:
        """Answers one request; False where there is none and the parent has gone."""
        _, descriptors, _, _ = socket.recv_fds(self.connection, 1, 1)
        if not descriptors:
            return False
        with open(descriptors[0], "rb") as file:
            request = json.loads(self._received(LENGTH.unpack(self._received(LENGTH.size))[0]))
            self.decoded()
            try:
                self._do(file, request)
            except DataError as error:
                (problem,) = error.problems
                self._say({"what": problem.what, "remedy": problem.remedy, "code": problem.code})
            except MemoryError:
                self._say({"memory": True})
        self._forget_limit()
        return True

    def decoded(self) -> None:
        """A picture has been decoded: the next one has as long, and the parent hears of it now and then."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        soft = int(used.ru_utime + used.ru_stime) + 1 + self.processor_seconds
        resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))
        if time.monotonic() > self.said + SIGN_OF_LIFE_SECONDS:
            self._say({"alive": True})

    def _do(self, file: Any, request: dict[str, Any]) -> None:
        name = request["name"]
        if request["do"] == "look":
            self._say({"info": asdict(look(file, name, self.decoded))})
        elif request["do"] == "image":
            self._show(image_pixels(file, name))
        else:
            for pixels in clip_pictures(file, name, Window(**request["window"]), self.decoded):
                self._show(pixels)
        self._say({"done": True})

    def _show(self, pixels: Pixels | None) -> None:
        if pixels is None:
            self._say({"again": True})
            return
        self._say({"picture": [pixels.shape[0], pixels.shape[1]]})
        for row in pixels:  # turned pixels do not lie in one piece, and a copy of them all would count
            self.connection.sendall(row.tobytes())

    def _say(self, message: dict[str, Any]) -> None:
        self.said = time.monotonic()
        text = json.dumps(message).encode()
        self.connection.sendall(LENGTH.pack(len(text)) + text)

    def _received(self, size: int) -> bytes:
        parts = []
        while size:
            part = self.connection.recv(size)
            if not part:
                raise ConnectionResetError
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def _forget_limit(self) -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


if __name__ == "__main__":
    main()
