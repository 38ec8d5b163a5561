"""What offload to a slow disk costs a training step on the CPU, when each copy is waited for and when it is prefetched.

    python benchmarks/prefetch.py

The disk tier is slowed down (`CpuCopies(disk_bytes_per_second)`) so that a step which waits for every copy at once
spends 45 % of its time waiting; the same limit then holds for the engine's own copies. A step without offload, the two
with it, and one with offload and no limit alternate in one process; medians of five.
"""

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from process_memory import HEAD_DIM, Size, step, training, write_weights
from torch import Tensor

from longtake.config.schema import MemoryStrategy
from longtake.memory.copies import Copies, CpuCopies, Event, Place, Queue
from longtake.memory.strategy import apply

SIZE = Size(layers=6, heads=6, latents=(5, 32, 32), clips=1)
WAITING_SHARE = 0.45
"""Of a step that waits for each copy. With copies as long as the computation, nothing could hide them all."""
ROUNDS = 5
PER_BLOCK = MemoryStrategy()


def strategies(layers: int) -> dict[str, MemoryStrategy]:
    """By the names in the table; each is compared with per-block checkpointing that keeps all in memory."""
    return {
        "inputs": MemoryStrategy(activation_offload="disk"),
        "inputs and weights": MemoryStrategy(activation_offload="disk", block_swap=layers, block_swap_from="disk"),
    }


class Waiting:
    """Copies that the computation waits for as soon as they are started; counts their bytes."""

    def __init__(self, copies: Copies) -> None:
        self.copies = copies
        self.moved_bytes = 0

    def start(self, queue: Queue, target: Place, source: Place, after: Sequence[Event]) -> Event:
        """Ends when the copy has."""
        moved = source if isinstance(source, Tensor) else target
        assert isinstance(moved, Tensor)
        self.moved_bytes += moved.nbytes
        event = self.copies.start(queue, target, source, after)
        self.copies.wait(event)
        return event

    def reached(self) -> Event:
        """As without waiting."""
        return self.copies.reached()

    def wait(self, event: Event) -> None:
        """The copy is done."""
        self.copies.wait(event)

    def host(self, nbytes: int) -> Tensor:
        """As without waiting."""
        return self.copies.host(nbytes)

    def close(self) -> None:
        """Ends the queues."""
        self.copies.close()


@dataclass(frozen=True)
class Found:
    """Medians of the seconds of a step, in the limit that was chosen, and what follows from them."""

    bytes_per_second: float
    moved_bytes: int
    plain: float
    waiting: float
    prefetched: float
    unlimited_ratio: float
    """Of a step with prefetch and no limit to one without offload: median of the pairs."""

    @property
    def waiting_share(self) -> float:
        """Of the step that waits for each copy, what the copies cost."""
        return (self.waiting - self.plain) / self.waiting

    @property
    def hidden(self) -> float:
        """Share of that cost which prefetch takes away."""
        return (self.waiting - self.prefetched) / (self.waiting - self.plain)


def compare(size: Size, strategy: MemoryStrategy, folder: Path, rounds: int = ROUNDS) -> Found:
    """Steps of the model of `size`, whose weights are in `folder`, with and without `strategy`, in turns."""
    with ExitStack() as stack:
        synchronous = CpuCopies()
        waiting = Waiting(synchronous)
        plain, waited = (
            _steps(size, each, folder, copies, stack)
            for each, copies in ((PER_BLOCK, CpuCopies()), (strategy, waiting))
        )
        plain(), waited()  # the first steps make buffers and files
        moved = -waiting.moved_bytes
        waited()
        moved += waiting.moved_bytes
        limit = moved * (1 - WAITING_SHARE) / (WAITING_SHARE * median(plain() for _ in range(3)))
        synchronous.limit = limit
        prefetched, unlimited = (
            _steps(size, strategy, folder, copies, stack) for copies in (CpuCopies(limit), CpuCopies())
        )
        prefetched(), unlimited()
        turns = [[run() for run in (plain, waited, prefetched, unlimited)] for _ in range(rounds)]
    without, synchronously, ahead, _ = (median(of_run) for of_run in zip(*turns, strict=True))
    return Found(limit, moved, without, synchronously, ahead, median(turn[3] / turn[0] for turn in turns))


def _steps(size: Size, strategy: MemoryStrategy, folder: Path, copies: Copies, stack: ExitStack) -> Callable[[], float]:
    """What trains for a step and returns its seconds."""
    given = training(size, strategy, folder)
    scratch = stack.enter_context(tempfile.TemporaryDirectory())
    stack.callback(copies.close)
    stack.enter_context(apply(given.transformer, given.spec, strategy, Path(scratch), given.files, copies))

    def run() -> float:
        started = time.perf_counter()
        step(given)
        return time.perf_counter() - started

    return run


def row(name: str, found: Found) -> str:
    """A line of the table."""
    seconds = " | ".join(f"{value:.2f}" for value in (found.plain, found.waiting, found.prefetched))
    shares = f"{100 * found.waiting_share:.0f} % | {100 * found.hidden:.0f} % | {found.unlimited_ratio:.3f}"
    return f"| {name} | {found.moved_bytes / 2**20:.1f} | {found.bytes_per_second / 2**20:.1f} | {seconds} | {shares} |"


def main() -> None:
    """Prints the table."""
    print("| on disk | MiB a step | limit, MiB/s | no offload, s | waiting, s | prefetch, s ", end="")
    print("| waiting's share | hidden | no limit |\n|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as folder:
        write_weights(SIZE, Path(folder))
        for name, strategy in strategies(SIZE.layers).items():
            print(row(name, compare(SIZE, strategy, Path(folder))), flush=True)
    threads, load = torch.get_num_threads(), os.getloadavg()[0]
    print(f"\n{SIZE}, {SIZE.heads * HEAD_DIM} wide, {threads} threads, torch {torch.__version__}, load {load:.1f}")


if __name__ == "__main__":
    main()
