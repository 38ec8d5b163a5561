"""Activation offload: the block inputs that checkpointing keeps wait in host memory or on disk for the backward pass."""

import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from torch.autograd.graph import saved_tensors_hooks

Offload = Callable[[torch.Tensor], AbstractContextManager[None]]
Stored = torch.Tensor | Path
PREFIX = "activations-"


@contextmanager
def activation_offload(folder: Path | None) -> Iterator[Offload]:
    """Yields the context maker that checkpointing wraps a block in.

    Only the hidden state given to it is moved: text, time embedding and RoPE tables are shared by all blocks and stay.
    Tensors go to host memory, or, where `folder` is given, into a private subfolder of it that is removed at the end;
    what killed runs left in `folder` is removed at the start.
    """
    store = _disk(folder) if folder is not None else None
    try:
        yield lambda hidden_states: _taken_over(hidden_states, store)
    finally:
        if store is not None:
            shutil.rmtree(store, ignore_errors=True)


def _disk(folder: Path) -> Path:
    for left in folder.glob(f"{PREFIX}*"):
        shutil.rmtree(left, ignore_errors=True)
    store = folder / f"{PREFIX}{uuid.uuid4().hex[:12]}"
    store.mkdir(parents=True)
    return store


@contextmanager
def _taken_over(hidden_states: torch.Tensor, store: Path | None) -> Iterator[None]:
    shape, dtype, device = hidden_states.shape, hidden_states.dtype, hidden_states.device
    pointer = hidden_states.data_ptr()

    def pack(tensor: torch.Tensor) -> torch.Tensor | tuple[Stored]:
        if tensor.shape != shape or tensor.data_ptr() != pointer or tensor.is_meta:
            return tensor
        return (_write(tensor, store),) if store is not None else (_to_host(tensor),)

    def unpack(stored: torch.Tensor | tuple[Stored]) -> torch.Tensor:
        if isinstance(stored, torch.Tensor):
            return stored
        kept = stored[0]
        if isinstance(kept, torch.Tensor):
            return kept.to(device)
        return torch.from_file(str(kept), shared=False, size=shape.numel(), dtype=dtype).view(shape).to(device)

    with saved_tensors_hooks(pack, unpack):
        yield


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in host memory; on the CPU the tensor is there already."""
    return tensor.detach() if tensor.device.type == "cpu" else tensor.detach().to("cpu")


def _write(tensor: torch.Tensor, store: Path) -> Path:
    path = store / f"{uuid.uuid4().hex}.bin"
    host = tensor.detach().to("cpu").contiguous()
    path.write_bytes(host.view(torch.uint8).numpy().data)
    return path
