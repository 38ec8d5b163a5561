"""Torch's FSDP2: every block's weights, gradients and states by rows over ranks, gathered while it is computed."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from longtake.distributed.backend import Held, Named, update
from longtake.distributed.loss_scale import LossScale
from longtake.distributed.pieces import Piece, Read, flat, whole
from longtake.distributed.ranks import Ranks


class FullyShardedData:
    """Blocks and what is outside of them are gathered apart; with several replicas each has all shards (HSDP)."""

    waits = True

    def __init__(
        self,
        transformer: Any,
        parameters: Named,
        optimizer_of: Callable[[Named], torch.optim.Optimizer],
        ranks: Ranks,
        fp16: bool,
    ) -> None:
        """`transformer` must have been sharded by `shard` before; `parameters` are those from before or after it."""
        trained = {name: weight for name, weight in transformer.named_parameters() if name in parameters}
        self.module = transformer
        self.parameters = trained
        self.optimizer = optimizer_of(trained)
        self.scale = LossScale(fp16, ranks.world)
        self.ranks = ranks

    def begin(self, last: bool) -> None:
        """Gradients are reduced in every micro-batch: kept until the last they would be there whole."""

    def backward(self, loss: Tensor) -> None:
        """FSDP averages over the ranks what has to be summed up."""
        (loss * self.scale.value).backward()

    def clip(self, clip_norm: float) -> float:
        """The norm is that of all shards."""
        gradients = [_local(weight.grad) for weight in self.parameters.values() if weight.grad is not None]
        if self.scale.enabled:
            torch._foreach_mul_(gradients, self.scale.inverse)
        squares = [float(norm) ** 2 for norm in torch._foreach_norm(gradients)]
        own = sum(squares) / self._replicas()
        norm = self.ranks.summed(own)[0] ** 0.5
        if clip_norm > 0:
            torch._foreach_mul_(gradients, min(1.0, clip_norm / (norm + 1e-6)))
        return norm

    def step(self, skip: bool) -> None:
        """Each rank updates its rows."""
        update(self.optimizer, skip)

    @contextmanager
    def tensors(self, write: bool = False) -> Iterator[Held]:  # noqa: ARG002
        """This rank's rows; the first of several replicas saves them."""
        trained, states = [], []
        for name, weight in self.parameters.items():
            trained.append(self._piece(name, weight))
            for key, value in self.optimizer.state.get(weight, {}).items():
                if isinstance(value, DTensor):
                    states.append(self._piece(f"{name}/{key}", value))
                else:
                    states.append(whole(f"{name}/{key}", value, saved=self.ranks.is_first))
        yield {"trained": trained, "optimizer": states}

    def _piece(self, name: str, tensor: Any) -> Piece:
        mesh: DeviceMesh = tensor.device_mesh
        first_replica = mesh.ndim == 1 or mesh.get_local_rank(0) == 0
        rows = flat(_local(tensor))
        return Piece(name, tuple(tensor.shape), _start(tensor), rows, saved=first_replica and rows.numel() > 0)

    def _replicas(self) -> int:
        mesh = next(iter(self.parameters.values())).device_mesh
        return mesh.size(0) if mesh.ndim == 2 else 1


def shard(transformer: Any, blocks: nn.ModuleList, ranks: Ranks, device: torch.device, dp_replicate: int) -> None:
    """Shards out each block and then the rest of `transformer`, in place, on `meta` or on `device`.

    The ranks of one replica are neighbours, so that what is gathered stays in a machine where it can.
    """
    # of in-place operations on what a module returns, of which there are none
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    kind = device.type
    if dp_replicate > 1:
        shape, names = (dp_replicate, ranks.world // dp_replicate), ("dp_replicate", "dp_shard")
        mesh = init_device_mesh(kind, shape, mesh_dim_names=names)
    else:
        mesh = init_device_mesh(kind, (ranks.world,), mesh_dim_names=("dp_shard",))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(transformer, mesh=mesh)


def materialise(transformer: Any, device: torch.device, read: Read) -> None:
    """Puts the shards of a transformer that has weights on `meta` on `device`, with their values."""
    weights = dict(transformer.named_parameters())
    there = {name: _local(weight).clone() for name, weight in weights.items() if not weight.is_meta}
    if len(there) == len(weights):
        return
    buffers = {name: buffer.clone() for name, buffer in transformer.named_buffers()}
    transformer.to_empty(device=device)
    with torch.no_grad():
        for name, buffer in transformer.named_buffers():
            buffer.copy_(buffers[name])
        for name, weight in transformer.named_parameters():
            if name in there:
                _local(weight).copy_(there[name])
        missing = {
            name: (_start(weight), flat(_local(weight)))
            for name, weight in transformer.named_parameters()
            if name not in there and _local(weight).numel()
        }
    read(missing)


def _start(tensor: Any) -> int:
    """The first value that this rank has of a tensor by rows."""
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return int(offset[0]) * prod(tensor.shape[1:]) if _local(tensor).numel() else 0


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
