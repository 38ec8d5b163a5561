"""Activation offload: the block inputs that checkpointing keeps wait in host memory or on disk for backward."""

import contextlib
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from torch.autograd.graph import saved_tensors_hooks

from longtake.errors import Problem, RunError

Offload = Callable[[torch.Tensor], AbstractContextManager[None]]
PREFIX = "activations-"


@contextmanager
def activation_offload(folder: Path | None) -> Iterator[Offload]:
    """Yields the context maker that checkpointing wraps a block in.

    Only the hidden state given to it is moved: text, time embedding and RoPE tables are shared by all blocks and stay.
    Tensors go to host memory, or, where `folder` is given, into a private subfolder of it: each file goes when its
    backward pass is over, the subfolder at the end; what killed runs left in `folder` is removed at the start. Inside
    the context, moving raises RunError where the disk refuses.
    """
    store = _disk(folder) if folder is not None else None
    try:
        yield lambda hidden_states: _taken_over(hidden_states, store)
    finally:
        if store is not None:
            shutil.rmtree(store, ignore_errors=True)
            with contextlib.suppress(OSError):  # another's activations are in it
                store.parent.rmdir()


class _OnDisk:
    """A tensor's bytes in a file that lives as long as autograd keeps this object."""

    def __init__(self, tensor: torch.Tensor, store: Path) -> None:
        self.path = store / f"{uuid.uuid4().hex}.bin"
        host = tensor.detach().to("cpu").contiguous()
        try:
            self.path.write_bytes(host.view(torch.uint8).numpy().data)
        except OSError as error:
            what = f"cannot offload {host.nbytes} bytes of activations: {error.strerror or error}"
            raise RunError(
                Problem(what, str(self.path), 'make room, or use memory.activation_offload = "host"')
            ) from error

    def __del__(self) -> None:
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)

    def read(self, like: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """The tensor, its pages read as they are used."""
        return torch.from_file(str(self.path), shared=False, size=like.numel(), dtype=dtype).view(like)


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

    def pack(tensor: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor | _OnDisk]:
        if tensor.shape != shape or tensor.data_ptr() != pointer or tensor.is_meta:
            return tensor
        return (_OnDisk(tensor, store),) if store is not None else (_to_host(tensor),)

    def unpack(stored: torch.Tensor | tuple[torch.Tensor | _OnDisk]) -> torch.Tensor:
        if isinstance(stored, torch.Tensor):
            return stored
        kept = stored[0]
        return (kept if isinstance(kept, torch.Tensor) else kept.read(shape, dtype)).to(device)

    with saved_tensors_hooks(pack, unpack):
        yield


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in host memory; on the CPU the tensor is there already."""
    return tensor.detach() if tensor.device.type == "cpu" else tensor.detach().to("cpu")
