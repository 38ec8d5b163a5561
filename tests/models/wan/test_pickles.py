"""Pickles: where their tensors lie, and that nothing in them is ever run."""

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from longtake.errors import ModelError
from longtake.models.wan.component_files import locate_component
from longtake.models.wan.detection import inspect
from longtake.models.wan.headers import read_header
from longtake.models.wan.weight_places import TORCH_TYPES
from releases import original_vae


class Payload:
    """What an attacker would save: unpickled, it makes a file."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.made),)


def state() -> dict[str, Tensor]:
    """Of every type, and a view of a larger storage."""
    draw = torch.Generator().manual_seed(0)
    types = {name: torch.randn(3, 5, generator=draw).to(dtype) for name, dtype in TORCH_TYPES.items()}
    return types | {"view": torch.arange(100.0)[7:19].view(3, 4), "scalar": torch.tensor(2.0), "ids": torch.arange(4)}


def test_a_pickles_tensors_are_where_it_is_said(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "model.pth")
    found, data = read_header(tmp_path / "model.pth"), (tmp_path / "model.pth").read_bytes()
    assert found.keys() == state().keys()
    for name, tensor in state().items():
        header = found[name]
        assert header.shape == tuple(tensor.shape)
        assert header.dtype == {"view": "F32", "scalar": "F32", "ids": "I64"}.get(name, name)
        values = torch.frombuffer(bytearray(data[header.start : header.start + header.nbytes]), dtype=tensor.dtype)
        assert torch.equal(values.view(tensor.shape).float(), tensor.float()), name


def test_a_tensor_that_is_not_in_rows_is_of_a_type_that_nothing_loads(tmp_path: Path) -> None:
    torch.save({"turned": torch.ones(3, 4).t()}, tmp_path / "model.pth")
    assert read_header(tmp_path / "model.pth")["turned"].dtype == "float32 in strides of [1, 4]"


@pytest.mark.parametrize("form", ["zip", "bare", "old"])
@pytest.mark.parametrize("kind", ["inspect", "component"])
def test_a_malicious_pickle_is_refused_and_does_not_run(
    tiny_root: Callable[[str], Path], tmp_path: Path, form: str, kind: str
) -> None:
    made, file = tmp_path / "made", tmp_path / "Wan2.1_VAE.pth"
    content: dict[str, Any] = original_vae(tiny_root("tiny-i2v")) | {"conv1.bias": Payload(made)}
    if form == "bare":
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(ModelError, match=r"more than tensors \(\w+\.mkdir\)" if form == "zip" else "pickle") as refused:
        inspect(file) if kind == "inspect" else locate_component(tmp_path, "vae")
    assert len(str(refused.value).splitlines()) == 1
    assert not made.exists()
    if form != "bare":
        torch.load(file, weights_only=False)
        assert made.exists(), "the payload would have worked"


@pytest.mark.parametrize("damage", ["cut", "no state", "empty", "compressed", "noise", "safetensors"])
def test_a_damaged_pickle_is_refused_in_one_line(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "model.pth"
    torch.save({"no state": torch.ones(2), "empty": {}}.get(damage, state()), file)
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-400])
    elif damage == "noise":
        file.write_bytes(b"PK\x03\x04" + os.urandom(2000))
    elif damage == "compressed":
        with zipfile.ZipFile(file) as archive, zipfile.ZipFile(tmp_path / "new.pth", "w", zipfile.ZIP_DEFLATED) as new:
            for record in archive.infolist():
                new.writestr(record.filename, archive.read(record))
        file = tmp_path / "new.pth"
    elif damage == "safetensors":
        save_file(state(), file)
        assert read_header(file).keys() == state().keys(), "the content decides, not the ending"
        return
    with pytest.raises(ModelError, match="pickle") as refused:
        read_header(file)
    assert len(str(refused.value).splitlines()) == 1
