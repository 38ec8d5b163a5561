"""Decoding in a child process that may take so much time and memory and no more; see `decoding_child`."""

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np

from longtake.data.decoding import LENGTH, Pixels
from longtake.data.regular_files import fingerprint, open_regular, refusal
from longtake.data.sniff import MAX_PIXELS, MAX_SIDE, ClipInfo, Window
from longtake.errors import Problem, RunError

Message = dict[str, Any]
_LONGEST_MESSAGE = 2**16
_CHILD = (sys.executable, "-P", "-m", "longtake.data.decoding_child")
_LEAVE_OUT = "leave it out, or write it anew with ffmpeg as H.264 in mp4"


@dataclass(frozen=True)
class Limits:
    """What decoding may take: processor time for one picture, memory in all, silence (a disk that does not answer)."""

    processor_seconds: int = 15
    memory_bytes: int = 1_500_000_000
    silence_seconds: float = 120.0


class Decoder:
    """Decodes in a process of its own, which is started when first needed and anew when it has died.

    `program` is for tests: what is started, with socket, seconds and bytes as arguments. Raises DataError that names
    `where` for what a file is or does, RunError where no process can be started.
    """

    def __init__(self, limits: Limits | None = None, program: Sequence[str] = _CHILD) -> None:
        self.limits = limits or Limits()
        self.program = program
        self.lock = threading.Lock()
        self.running: _Running | None = None

    def look(self, path: Path, where: str) -> ClipInfo:
        """What the clip or image at `path` shows; reads headers, the first pictures and the last packets."""
        (message,) = [answer for answer in self._ask(path, where, {"do": "look"}) if "info" in answer]
        return ClipInfo(**message["info"])

    def clip(self, path: Path, window: Window, where: str) -> Generator[Pixels, None, None]:
        """The window's frames as `decoding.clip_pictures` has them, a repeated one again; others wait for its end."""
        count, last = 0, None
        with closing(self._ask(path, where, {"do": "clip", "window": asdict(window)})) as answers:
            for answer in answers:
                last = answer.get("pixels", last)
                count += 1
                if last is None or count > window.frames:
                    break
                yield last
        if count != window.frames or last is None:
            what = f"the decoder has shown {count} frames of {path.name} instead of {window.frames}"
            raise refusal(what, where, _LEAVE_OUT, code="decode-crash")

    def image(self, path: Path, where: str) -> Pixels:
        """The still at `path`."""
        (message,) = [answer for answer in self._ask(path, where, {"do": "image"}) if "pixels" in answer]
        return message["pixels"]

    def stop(self) -> None:
        """Ends the process, if there is one."""
        if self.running is not None:
            self.running.end()
            self.running = None

    def _ask(self, path: Path, where: str, request: Message) -> Generator[Message, None, None]:
        """The answers to a request about the file, the last of which is left out; pixels are in the picture's."""
        with self.lock, open_regular(path, where) as file:
            running, name, finished = self._started(), path.name, False
            try:
                running.send(file.fileno(), request | {"name": name})
                while not (answer := running.received()).get("done"):
                    if "what" in answer or "memory" in answer:
                        finished = True
                        self._refuse(answer, name, where)
                    if "alive" not in answer:
                        yield answer
                finished = True
            except TimeoutError:
                what = f"{name} has not been read for {self.limits.silence_seconds:.0f} s"
                raise refusal(what, where, "look at the disk that it is on", code="decode-silent") from None
            except (ValueError, KeyError, TypeError) as error:
                what = f"{name} makes the decoder answer nonsense ({error})"
                raise refusal(what, where, _LEAVE_OUT, code="decode-crash") from None
            except (OSError, EOFError):
                self._died(running, name, where)
            finally:
                if not finished:
                    self.stop()

    def _started(self) -> "_Running":
        if self.running is not None and self.running.owner != os.getpid():
            self.running.forget()  # of the process that this one was forked from
            self.running = None
        if self.running is None:
            self.running = _Running(self.program, self.limits)
        return self.running

    def _refuse(self, answer: Message, name: str, where: str) -> NoReturn:
        if "memory" in answer:
            self._too_much_memory(name, where)
        what, remedy, code = (str(answer[part]) for part in ("what", "remedy", "code"))
        raise refusal(what, where, remedy, code=code)

    def _too_much_memory(self, name: str, where: str) -> NoReturn:
        limit = f"{self.limits.memory_bytes / 1e9:.1f} GB"
        what = f"{name} takes more than {limit} of memory to decode"
        raise refusal(what, where, "scale it down, or leave it out", code="decode-memory")

    def _died(self, running: "_Running", name: str, where: str) -> NoReturn:
        """Raises what the end of the process means."""
        status, said = running.ended()
        if status == -getattr(signal, "SIGXCPU", 0):
            what = f"{name} takes more than {self.limits.processor_seconds} s of processor time for one picture"
            raise refusal(what, where, _LEAVE_OUT, code="decode-time") from None
        if "MemoryError" in said or "bad_alloc" in said:
            self._too_much_memory(name, where)
        how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        what = f"{name} makes the decoder fail ({how}{f', {said}' if said else ''})"
        raise refusal(what, where, _LEAVE_OUT, code="decode-crash") from None


class _Running:
    """A started process and the socket to it."""

    def __init__(self, program: Sequence[str], limits: Limits) -> None:
        if not hasattr(socket, "send_fds"):
            remedy = "use Linux, macOS or WSL2; docs/platforms.md has more"
            raise RunError(Problem("clips cannot be decoded on this system", "", remedy, code="decode-platform"))
        self.owner = os.getpid()
        self.connection, other = socket.socketpair()
        self.connection.settimeout(limits.silence_seconds)
        self.errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # closed by `end`
        arguments = [str(other.fileno()), str(limits.processor_seconds), str(limits.memory_bytes)]
        # of its memory limit, threads that are not used here would take most
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
        environment |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
        with other:
            self.process = subprocess.Popen(
                [*program, *arguments],
                pass_fds=[other.fileno()],
                stdin=subprocess.DEVNULL,
                stderr=self.errors,
                env=environment,
            )

    def send(self, descriptor: int, request: Message) -> None:
        socket.send_fds(self.connection, [b"\0"], [descriptor])
        text = json.dumps(request).encode()
        self.connection.sendall(LENGTH.pack(len(text)) + text)

    def received(self) -> Message:
        """The next message; raises EOFError or OSError where the process has ended, ValueError for nonsense."""
        (length,) = LENGTH.unpack(self._bytes(LENGTH.size))
        if length > _LONGEST_MESSAGE:
            raise ValueError("a long message")
        message = json.loads(bytes(self._bytes(length)))
        if not isinstance(message, dict):
            raise ValueError("no message")
        if "picture" in message:
            height, width = (int(side) for side in message["picture"])
            if not 0 < max(height, width) <= MAX_SIDE or not 0 < height * width <= MAX_PIXELS:
                raise ValueError("too large a picture")
            message["pixels"] = np.frombuffer(self._bytes(height * width * 3), np.uint8).reshape(height, width, 3)
        return message

    def ended(self) -> tuple[int, str]:
        """Exit status, negative for a signal, and the last line that was said."""
        try:
            status = self.process.wait(1)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        self.errors.seek(0)
        lines = self.errors.read()[-2000:].decode(errors="replace").split("\n")
        return status, next((line.strip()[:200] for line in reversed(lines) if line.strip()), "")

    def end(self) -> None:
        self.connection.close()
        self.errors.close()
        self.process.kill()
        self.process.wait()

    def forget(self) -> None:
        self.connection.close()
        self.errors.close()
        self.process.returncode = 0  # not this process's to wait for

    def _bytes(self, size: int) -> bytearray:
        found = bytearray(size)
        view = memoryview(found)
        while view:
            count = self.connection.recv_into(view)
            if not count:
                raise EOFError
            view = view[count:]
        return found


def probe(path: Path, where: str) -> ClipInfo:
    """What the clip or image at `path` shows, and its fingerprint; raises DataError, naming `where`, if it is unfit."""
    return replace(shared_decoder().look(path, where), fingerprint=fingerprint(path, where))


def shared_decoder() -> Decoder:
    """The one of this process."""
    return _SHARED


def _stop_shared() -> None:
    if _SHARED.running is not None and _SHARED.running.owner == os.getpid():
        _SHARED.stop()


_SHARED = Decoder()
atexit.register(_stop_shared)
