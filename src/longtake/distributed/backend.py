"""The seam between the training loop and the engine that runs its steps; here, the engine of one device."""

import os
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@runtime_checkable
class Backend(Protocol):
    """What an engine does with a loss: backward, the whole gradient's norm and clipping, the update, its own state."""

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of `loss`, this rank's share of the global batch's mean loss."""

    def clip(self, clip_norm: float) -> float:
        """Norm of the whole gradient, which is scaled down to `clip_norm` where that is above 0; inf on overflow."""

    def step(self, skip: bool) -> None:
        """Updates the parameters, or with `skip` leaves them, and drops the gradients."""

    def state(self) -> dict[str, float]:
        """What must be in a checkpoint beside parameters and optimiser."""

    def load_state(self, state: Mapping[str, float]) -> None:
        """Inverse of `state`."""


class SingleDevice:
    """One process, one device; with `fp16` the loss is scaled, and an overflow shrinks the scale."""

    def __init__(
        self, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, device: torch.device, fp16: bool
    ) -> None:
        self.parameters = parameters
        self.optimizer = optimizer
        self.scaler = torch.amp.GradScaler(device.type, enabled=fp16)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of the scaled loss."""
        self.scaler.scale(loss).backward()

    def clip(self, clip_norm: float) -> float:
        """Unscales, measures and clips the gradients."""
        self.scaler.unscale_(self.optimizer)
        bound = clip_norm if clip_norm > 0 else float("inf")
        return float(torch.nn.utils.clip_grad_norm_(self.parameters, bound))

    def step(self, skip: bool) -> None:
        """One AdamW update, or none; the scale follows the overflows."""
        if not skip:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, float]:
        """The gradient scaler's state; empty without fp16."""
        return dict(self.scaler.state_dict())

    def load_state(self, state: Mapping[str, float]) -> None:
        """Restores the gradient scaler."""
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(dict(state))


def world() -> tuple[int, int]:
    """(rank, number of ranks) as torchrun's environment has it; (0, 1) without."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def local_device() -> torch.device:
    """The CUDA device of this process (torchrun's LOCAL_RANK among the visible ones), or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def any_rank(flag: bool) -> bool:
    """Whether `flag` is true on any rank; every rank has to ask at the same point.

    A rank that waits in a collective operation inside forward or backward does not get here: it is not interrupted.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return flag
    device = local_device() if torch.distributed.get_backend() == "nccl" else torch.device("cpu")
    flags = torch.tensor(int(flag), device=device)
    torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
    return bool(flags)
