"""Processes that read steps, through torch's DataLoader; they keep nothing, so each may be killed at any moment."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from longtake.errors import LongtakeError

Loaded = TypeVar("Loaded")


class Workers(Generic[Loaded]):
    """`count` processes that call `load`, which is pickled, for the next steps in turn.

    What comes back goes through pipes and not through shared memory, of which containers have little. They ignore the
    signals of the group that they are in, and end when the process that started them does, however it ends.
    """

    def __init__(self, load: Callable[[int], Loaded], count: int) -> None:
        self.load = load
        self.count = count
        self.context = _Noting()

    def results(self, steps: range) -> Iterator[Loaded]:
        """What `load` gives for each step, in order, and a LongtakeError of it; not to be called on the main thread.

        There torch would have a signal handler raise an error in the middle of whatever a step is doing.
        """
        if self.context.get_start_method() == "forkserver":  # which then imports for all, also those started anew
            self.context.set_forkserver_preload([__name__, type(self.load).__module__])
        loader: DataLoader[Loaded | LongtakeError] = DataLoader(
            _Steps(self.load),
            batch_size=None,
            sampler=steps,
            num_workers=self.count,
            collate_fn=_as_it_is,
            worker_init_fn=_begin,
            multiprocessing_context=self.context,
            prefetch_factor=1,  # each holds one batch, which may be of GiB
            generator=torch.Generator(),  # or a seed would be drawn from the generator that training uses
        )
        return map(_loaded, loader)  # of a generator the frame would hold a batch beside the one in use

    def ended(self) -> str:
        """How one of them ended that was not told to; empty while there is none."""
        for process in self.context.processes:
            if code := process.exitcode:  # 0 once there is nothing more to read, be it after an error
                return _in_words(code)
        return ""

    def kill(self) -> None:
        """Ends all of them, whatever they are doing."""
        for process in self.context.processes:
            if process.pid is not None:
                process.kill()


class _Noting(BaseContext):
    """A context of multiprocessing that remembers the processes made of it.

    They are forked by a server that has done nothing but import: one forked from here would have this process's locks,
    held by threads that are not there, and a CUDA context that no fork can use. Where there is no such server each is
    started from nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        methods = multiprocessing.get_all_start_methods()
        self.chosen: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        self.processes: list[BaseProcess] = []

    def get_start_method(self, allow_none: bool = False) -> str:
        """The name of what it is made of."""
        return self.chosen.get_start_method(allow_none)

    def Process(self, *args: Any, **kwargs: Any) -> BaseProcess:
        """A process, not started."""
        process: BaseProcess = self.chosen.Process(*args, **kwargs)
        self.processes.append(process)
        return process


class _Steps(Dataset[Any]):
    """What `load` gives for a step, by the step; an error of Longtake's as a value, which keeps its problems."""

    def __init__(self, load: Callable[[int], Any]) -> None:
        self.load = load

    def __getitem__(self, step: int) -> Any:
        try:
            return self.load(step)
        except LongtakeError as error:
            return error


def _begin(_worker: int) -> None:
    """What a worker does first."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # they are the run's to answer, which may still want clips
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    ForkingPickler.register(torch.Tensor, _by_value)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Torch looks for the parent's end too, but its parent is the server, which lives as long as a worker does."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _by_value(tensor: torch.Tensor) -> tuple[Callable[..., torch.Tensor], tuple[Any, ...]]:
    content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return _tensor, (bytearray(content), tensor.dtype, tuple(tensor.shape))


def _tensor(content: bytearray, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.frombuffer(content, dtype=dtype).reshape(shape) if content else torch.empty(shape, dtype=dtype)


def _loaded(loaded: Loaded | LongtakeError) -> Loaded:
    if isinstance(loaded, LongtakeError):
        raise loaded
    return loaded


def _as_it_is(loaded: Any) -> Any:
    return loaded


def _in_words(exit_code: int) -> str:
    if exit_code > 0:
        return f"with status {exit_code}"
    try:
        return f"by {signal.Signals(-exit_code).name}"
    except ValueError:
        return f"by signal {-exit_code}"
