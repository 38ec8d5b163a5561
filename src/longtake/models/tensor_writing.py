"""Safetensors files written tensor by tensor, each when it is its turn: the library wants all of them at once."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import BufferedWriter
from math import prod
from pathlib import Path

import torch
from torch import Tensor

STEM = "diffusion_pytorch_model"
"""What the files of a model in several are called before their numbers, in diffusers and in the original releases."""

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
_ALIGNMENT = 8


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of a file to be: `read` gives it, and nobody keeps it once it is written."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Of its values."""
        return prod(self.shape) * self.dtype.itemsize


def lazy(tensor: Tensor) -> LazyTensor:
    """A tensor that is there already."""
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def write_tensors(path: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """Writes a safetensors file of `tensors`; of values there is one tensor in host memory at a time, and its bytes.

    The widest types come first, as the library writes them, so that every tensor is aligned to its type.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    with path.open("wb") as file:
        file.write(_header(tensors, order))
        for name in order:
            _write(file, tensors[name])


def write_shards(folder: Path, tensors: Mapping[str, LazyTensor], most_bytes: int) -> None:
    """Writes `tensors` to files of at most `most_bytes` of values each, but for greater tensors, and their index."""
    groups = list(_groups(tensors, most_bytes))
    weight_map: dict[str, str] = {}
    for number, names in enumerate(groups, 1):
        name = f"{STEM}-{number:05d}-of-{len(groups):05d}.safetensors"
        write_tensors(folder / name, {key: tensors[key] for key in names})
        weight_map |= dict.fromkeys(names, name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write(file: BufferedWriter, tensor: LazyTensor) -> None:
    """A function of its own, so that nothing holds the values while the next ones are read."""
    values = tensor.read().detach()
    assert (tuple(values.shape), values.dtype) == (tensor.shape, tensor.dtype)
    file.write(values.to("cpu").contiguous().view(-1).view(torch.uint8).numpy().data)


def _groups(tensors: Mapping[str, LazyTensor], most_bytes: int) -> Iterator[list[str]]:
    """Names in their order, as many in a group as fit."""
    group: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if group and size + tensor.nbytes > most_bytes:
            yield group
            group, size = [], 0
        group.append(name)
        size += tensor.nbytes
    if group:
        yield group


def _header(tensors: Mapping[str, LazyTensor], order: list[str]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in order:
        tensor = tensors[name]
        stop = start + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
