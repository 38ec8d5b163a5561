"""What tests have read ahead: steps whose tensors are known, and that say, wait, fail or die."""

import os
import signal
import threading
from dataclasses import dataclass, field
from typing import Any

import torch

from longtake.errors import CacheError, Problem

DAMAGED = Problem("the entry has changed", "a file", "prepare again", code="cache-entry-changed")


@dataclass
class Load:
    """Tensors of any type and shape for a step, and the process that made them."""

    dies_from: int = 10**9
    damaged_at: int = -1
    mistaken_at: int = -1

    def __call__(self, step: int) -> tuple[int, dict[str, torch.Tensor]]:
        if step >= self.dies_from:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == self.damaged_at:
            raise CacheError(DAMAGED)
        if step == self.mistaken_at:
            raise ZeroDivisionError("a mistake in the code")
        return os.getpid(), tensors_of(step)

    def described(self, step: int) -> str:
        return f"the file of {step}"


@dataclass
class Held(Load):
    """Waits in step 1 until `free`."""

    free: threading.Event = field(default_factory=threading.Event)

    def __call__(self, step: int) -> Any:
        if step == 1:
            self.free.wait()
        return super().__call__(step)


def tensors_of(step: int) -> dict[str, torch.Tensor]:
    """A function of the step."""
    generator = torch.Generator().manual_seed(step)
    noise = torch.randn(16, 3, 5, 7, generator=generator)
    return {
        "noise": noise,
        "text": noise[0, 0].to(torch.bfloat16),
        "strided": noise.transpose(1, 3),
        "none": noise[:0],
        "one": noise.sum(),
        "whole": torch.arange(step + 1),
    }
