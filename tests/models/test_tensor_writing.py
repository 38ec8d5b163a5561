"""Safetensors files written tensor by tensor: the library reads them, and no more than one tensor is there at once."""

import json
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from longtake.models.tensor_writing import LazyTensor, lazy, write_shards, write_tensors

TENSORS = {
    "half": torch.randn(3, 5).to(torch.float16),
    "brain": torch.randn(7).to(torch.bfloat16),
    "single": torch.randn(2, 3, 4),
    "double": torch.randn(2, dtype=torch.float64),
    "scalar": torch.tensor(3.5),
    "eighth": torch.randn(9).to(torch.float8_e4m3fn),
    "transposed": torch.randn(4, 6).T,
    "empty": torch.empty(0, 3),
}


def bits(tensor: Tensor) -> list[int]:
    return tensor.contiguous().view(-1).view(torch.uint8).tolist()


def test_every_type_and_shape_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, {name: lazy(tensor) for name, tensor in TENSORS.items()})
    found = load_file(path)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert bits(found[name]) == bits(tensor)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_every_tensor_begins_at_a_multiple_of_its_type(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, {name: lazy(tensor) for name, tensor in TENSORS.items()})
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    header = json.loads(content[8 : 8 + length])
    for name, tensor in TENSORS.items():
        assert header[name]["data_offsets"][0] % tensor.element_size() == 0


def test_a_tensor_is_read_when_the_one_before_it_is_gone(tmp_path: Path) -> None:
    memory: list[weakref.ref[Any]] = []

    def read(_name: str) -> Tensor:
        assert [known() for known in memory if known() is not None] == []
        values = np.ones(4, dtype=np.float32)
        memory.append(weakref.ref(values))
        return torch.from_numpy(values)

    names = ["a", "b", "c"]
    write_tensors(tmp_path / "a", {name: LazyTensor((4,), torch.float32, partial(read, name)) for name in names})
    assert sorted(load_file(tmp_path / "a")) == names
    assert len(memory) == 3


@pytest.mark.parametrize(("most", "groups"), [(100, [4]), (32, [2, 2]), (40, [2, 2]), (1, [1, 1, 1, 1]), (48, [3, 1])])
def test_shards_hold_what_fits_and_the_index_says_where(tmp_path: Path, most: int, groups: list[int]) -> None:
    tensors = {f"t{index}": torch.full((4,), float(index)) for index in range(4)}
    write_shards(tmp_path, {name: lazy(tensor) for name, tensor in tensors.items()}, most)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    count = len(groups)
    assert files == [
        f"diffusion_pytorch_model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)
    ]
    assert [len(load_file(tmp_path / name)) for name in files] == groups
    index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 64}
    for name, tensor in tensors.items():
        assert torch.equal(load_file(tmp_path / index["weight_map"][name])[name], tensor)
