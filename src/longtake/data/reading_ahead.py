"""Reading the next step beside the one in use, and what is done where none comes."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, Protocol, TypeVar, runtime_checkable

from longtake.data.workers import Workers
from longtake.errors import LongtakeError, Problem, RunError
from longtake.units import format_seconds

Loaded = TypeVar("Loaded")
Read = TypeVar("Read", covariant=True)
Tell = Callable[[str, str], None]
"""Is told of a kind of fault, and what it is."""

MOST_FAILURES = 3
"""Times that workers may die or hang with no step read in between."""


@runtime_checkable
class Load(Protocol[Read]):
    """Reads a step, the same at every call; `described` says what of, while it is being read."""

    def __call__(self, step: int) -> Read: ...

    def described(self, step: int) -> str: ...


@dataclass(frozen=True)
class Patience:
    """Seconds of waiting for one step after which that is said, and after which workers are taken to hang.

    `look` is how often the one that waits looks whether it has to go on waiting.
    """

    said: float = 60.0
    hung: float = 300.0
    look: float = 0.5


class ReadingAhead(Generic[Loaded]):
    """The `steps` in order, each read while the one before is used: on a thread, or by `workers` processes.

    A read that hangs is said, and waited for. Workers that die or hang are killed and started anew at the step that is
    due, so that nothing is lost. A context: afterwards no worker is left.
    """

    def __init__(
        self,
        load: Load[Loaded],
        steps: range,
        workers: int,
        tell: Tell,
        patience: Patience = Patience(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.load = load
        self.steps = steps
        self.count = workers
        self.tell = tell
        self.patience = patience
        self.clock = clock
        self.failures = 0
        self.workers: Workers[Loaded] | None = None
        self.reading: _Reading[Loaded] | None = None

    def __enter__(self) -> "ReadingAhead[Loaded]":
        if self.steps:
            self._begin(self.steps)
        return self

    def __exit__(self, *_: object) -> None:
        if self.workers is not None:
            self.workers.kill()
        if self.reading is not None:
            self.reading.leave()

    def take(self, step: int, given_up: Callable[[], bool] = lambda: False) -> Loaded | None:
        """What was read for the next step, which is `step`; None where `given_up` is true before it has come.

        Raises what reading it raised, and RunError where workers die or hang again and again.
        """
        began, said = self.clock(), False
        while True:
            assert self.reading is not None
            found = self.reading.next(self.patience.look)
            if isinstance(found, _Got):
                self.failures = 0
                return found.loaded
            if isinstance(found, LongtakeError):
                raise found
            if given_up():
                return None
            waited = self.clock() - began
            if fault := self._fault(waited):
                self._begin_again(step, *fault)
                began, said = self.clock(), False
            elif found is not None:
                raise found
            elif waited >= self.patience.said and not said:
                what = f"the clips of step {step + 1} have not come for {format_seconds(waited)}"
                self.tell("read-waits", f"{what}; waiting for {self.load.described(step)}")
                said = True

    def _begin(self, steps: range) -> None:
        if not self.count:
            self.reading = _Reading(lambda: (self.load(step) for step in steps))
            return
        workers = self.workers = Workers(self.load, self.count)
        self.reading = _Reading(lambda: workers.results(steps))

    def _fault(self, waited: float) -> tuple[str, str] | None:
        """The kind and the description of what keeps workers from reading; None where nothing does."""
        if self.workers is None:
            return None
        if how := self.workers.ended():
            return "worker-died", f"a process that reads clips ended {how}"
        if waited >= self.patience.hung:
            return "worker-hung", f"the processes that read clips gave nothing for {format_seconds(waited)}"
        return None

    def _begin_again(self, step: int, kind: str, what: str) -> None:
        assert self.workers is not None
        assert self.reading is not None
        self.workers.kill()
        self.reading.leave()
        self.failures += 1
        if self.failures >= MOST_FAILURES:
            often = f"{what}, and so it went {MOST_FAILURES} times with no step read in between"
            remedy = "look for what ended them (the system's log has it where memory ran out), or set data.workers = 0"
            where = f"step {step + 1}, {self.load.described(step)}"
            raise RunError(Problem(often, where, f"{remedy}, then continue with --resume", code="read-workers-fail"))
        self.tell(kind, f"{what}; they are started anew at step {step + 1}")
        self._begin(range(step, self.steps.stop))


@dataclass(frozen=True)
class _Got(Generic[Loaded]):
    loaded: Loaded


class _Reading(Generic[Loaded]):
    """A thread that goes through `results`, one ahead of what is taken. It can be left, whatever it is waiting for."""

    def __init__(self, results: Callable[[], Iterator[Loaded]]) -> None:
        self.results = results
        self.taken = threading.Semaphore(0)
        self.left = False
        self.found: queue.SimpleQueue[_Got[Loaded] | BaseException] = queue.SimpleQueue()
        # of a pool the interpreter would wait at its end for a thread that hangs
        threading.Thread(target=self._read, name="loader", daemon=True).start()

    def next(self, seconds: float) -> _Got[Loaded] | BaseException | None:
        """What was read, or why it could not be; None where nothing has come in so many seconds."""
        try:
            found = self.found.get(timeout=seconds)
        except queue.Empty:
            return None
        self.taken.release()
        return found

    def leave(self) -> None:
        """What the thread still reads is dropped."""
        self.left = True
        self.taken.release()

    def _read(self) -> None:
        with _Kept() as kept:
            for loaded in self.results():
                self.found.put(_Got(loaded))
                del loaded  # or there would be another beside the one in use and the next
                self.taken.acquire()
                if self.left:
                    return
        if kept.error is not None:
            self.found.put(kept.error)


class _Kept:
    """Keeps an error of its block, which is raised on another thread."""

    error: BaseException | None = None

    def __enter__(self) -> "_Kept":
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: TracebackType | None) -> bool:
        self.error = error
        return True
