"""Torch's DDP: each rank has the whole model, and gradients are averaged while the last backward pass runs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from longtake.distributed.backend import Held, Named, clipped, update, whole_tensors
from longtake.distributed.loss_scale import LossScale
from longtake.distributed.ranks import Ranks

_ARGUMENTS = signature(DistributedDataParallel).parameters
_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _ARGUMENTS else "broadcast_buffers"
"""Its name in torch 2.13 and before: tables of angles are the same everywhere."""


class DataParallel:
    """`waits` only where ranks share clips: else a micro-batch that is not the last one is a rank's own affair."""

    def __init__(
        self,
        transformer: nn.Module,
        parameters: Named,
        optimizer_of: Callable[[Named], torch.optim.Optimizer],
        ranks: Ranks,
        fp16: bool,
        waits: bool,
    ) -> None:
        # without `gradient_as_bucket_view` gradients would be there twice; every rank has read the same weights
        options: dict[str, Any] = {"gradient_as_bucket_view": True, "init_sync": False, _BUFFERS: False}
        self.module = DistributedDataParallel(transformer, **options)
        self.parameters = dict(parameters)
        self.optimizer = optimizer_of(parameters)
        self.scale = LossScale(fp16, ranks.world)
        self.waits = waits
        self.ranks = ranks

    def begin(self, last: bool) -> None:
        """Gradients are averaged in the last micro-batch alone, as under `no_sync` before it."""
        self.module.require_backward_grad_sync = last

    def backward(self, loss: Tensor) -> None:
        """DDP averages over the ranks what has to be summed up."""
        (loss * self.scale.value).backward()

    def clip(self, clip_norm: float) -> float:
        """As on one device: every rank has the whole gradient."""
        return clipped(self.parameters, clip_norm, self.scale)

    def step(self, skip: bool) -> None:
        """One update, the same on every rank."""
        update(self.optimizer, skip)

    @contextmanager
    def tensors(self, write: bool = False) -> Iterator[Held]:  # noqa: ARG002
        """Everything, whole; the first rank saves it."""
        yield whole_tensors(self.parameters, self.optimizer, saved=self.ranks.is_first)
