"""The seam between the training loop and the engine that runs its steps; here, the engine of one device."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from longtake.distributed.loss_scale import LossScale
from longtake.distributed.pieces import Group, Piece, whole
from longtake.distributed.ranks import ranks_of_environment

Held: TypeAlias = dict[Group, list[Piece]]
Named: TypeAlias = Mapping[str, nn.Parameter]


@runtime_checkable
class Backend(Protocol):
    """An engine with a model and its optimiser: `module` is called for a forward pass, `optimizer` has the groups.

    `parameters` are those of the module that are trained, under the engine. A loss that is taken backward is this
    rank's share of the global batch's, and is multiplied by `scale`. `waits` says that ranks wait for each other in
    every forward or backward pass.
    """

    module: Any
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    scale: LossScale
    waits: bool

    def begin(self, last: bool) -> None:
        """To be called before each micro-batch; `last` is the one after which the gradient is whole."""

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of `loss`."""

    def clip(self, clip_norm: float) -> float:
        """Norm of the whole gradient, of all ranks, which is scaled down to `clip_norm` where that is above 0."""

    def step(self, skip: bool) -> None:
        """Updates the parameters, or with `skip` leaves them, and drops the gradients."""

    def tensors(self, write: bool = False) -> AbstractContextManager[Held]:
        """What this rank holds of trained weights and of the optimiser's states, which must have been allocated.

        What is written into them inside the context counts from its end on, with `write`.
        """


class SingleDevice:
    """One process, one device."""

    waits = False

    def __init__(self, module: nn.Module, parameters: Named, optimizer: torch.optim.Optimizer, fp16: bool) -> None:
        self.module: Any = module
        self.parameters = dict(parameters)
        self.optimizer = optimizer
        self.scale = LossScale(fp16)

    def begin(self, last: bool) -> None:
        """Nothing is to be done."""

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of the scaled loss."""
        (loss * self.scale.value).backward()

    def clip(self, clip_norm: float) -> float:
        """Unscales, measures and clips the gradients."""
        return clipped(self.parameters, clip_norm, self.scale)

    def step(self, skip: bool) -> None:
        """One update, or none."""
        update(self.optimizer, skip)

    @contextmanager
    def tensors(self, write: bool = False) -> Iterator[Held]:  # noqa: ARG002
        """Everything, whole."""
        yield whole_tensors(self.parameters, self.optimizer, saved=True)


def update(optimizer: torch.optim.Optimizer, skip: bool) -> None:
    """A step of `optimizer`, or with `skip` none; the gradients are dropped."""
    if not skip:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def clipped(parameters: Named, clip_norm: float, scale: LossScale) -> float:
    """The norm of the gradients, unscaled and clipped in place; the same on all ranks where their gradients are."""
    gradients = [parameter.grad for parameter in parameters.values() if parameter.grad is not None]
    if scale.enabled:
        torch._foreach_mul_(gradients, scale.inverse)
    norm = get_total_norm(gradients)
    if clip_norm > 0:
        clip_grads_with_norm_([*parameters.values()], clip_norm, norm)
    return float(norm)


def whole_tensors(parameters: Named, optimizer: torch.optim.Optimizer, saved: bool) -> Held:
    """The pieces of a rank that has all parameters and states whole."""
    return {
        "trained": [whole(name, parameter, saved) for name, parameter in parameters.items()],
        "optimizer": [whole(path, tensor, saved) for path, tensor in optimizer_tensors(optimizer, parameters).items()],
    }


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: Named) -> dict[str, Tensor]:
    """The optimiser's states as `<parameter>/<state>` -> plain tensor, of 8-bit states `<parameter>/<state>/<part>`."""
    finish = getattr(optimizer, "finish", None)
    if finish is not None:  # of states in host memory: what is on its way arrives
        finish()
    return {
        path: tensor
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
        for path, tensor in _plain(value, f"{name}/{key}")
    }


def local_device() -> torch.device:
    """The CUDA device of this process (torchrun's LOCAL_RANK among the visible ones), or the CPU."""
    return ranks_of_environment().device


def world() -> tuple[int, int]:
    """(rank, number of ranks) as torchrun's environment has it; (0, 1) without."""
    ranks = ranks_of_environment()
    return ranks.rank, ranks.world


def _plain(tensor: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors that a state is made of."""
    names = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else None
    if names is None:
        yield path, tensor
        return
    for name in names:
        yield from _plain(getattr(tensor, name), f"{path}/{name}")
