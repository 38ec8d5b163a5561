"""Where the tensors of a pickle (`.pth`, `.pt`) lie: read as a safetensors header is, and nothing in it is run."""

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longtake.errors import ModelError, Problem
from longtake.models.wan.headers import ITEM_BYTES, TensorHeader

_TYPES = {
    "bfloat16": "BF16",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
_NAMED = re.compile(r"GLOBAL (\S+)")


def read_pickle(path: Path) -> dict[str, TensorHeader]:
    """Tensors of a file that `torch.save` made of a state dict, by name; their values are not read.

    The one place where a pickle is opened: torch's restricted unpickler knows tensors and containers, and refuses a
    file that names any other class or function before that is called. A tensor that is not in row-major order has a
    type of its own, which nothing loads. Raises ModelError, one line, for such files and for damaged ones.
    """
    size = path.stat().st_size
    try:
        _check_records(path, size)
        state = _unpickled(path)
    except ModelError:
        raise
    except Exception as error:
        raise _unread(path, error) from error
    named_tensors = {name: value for name, value in state.items() if _is_tensor(value)} if _is_state(state) else {}
    if not named_tensors:
        what = "this pickle holds no tensors by name: it is no state dict"
        raise _refused(path, what, code="weights-pickle-nameless")
    tensors = {name: _header(path, value) for name, value in named_tensors.items()}
    for name, tensor in tensors.items():
        if tensor.start + tensor.nbytes > size:
            raise _refused(path, f"{name} reaches beyond the end of the file", code="weights-truncated")
    return tensors


def _unpickled(path: Path) -> Any:
    """What was saved, its tensors without memory: they know where in the file their storage begins."""
    import torch
    from torch._subclasses import FakeTensorMode

    # as in torch's tutorial of GPUDirect Storage; `map_location="meta"` gives the places too, in torch 2.13
    with FakeTensorMode():
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _unread(path: Path, error: Exception) -> ModelError:
    if named := _NAMED.search(str(error)):
        what = f"this pickle asks for more than tensors ({named[1]}), which is not run"
        return _refused(path, what, code="weights-pickle-unsafe")
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    what = f"this pickle is damaged, too old, or holds more than tensors ({line[:150]})"
    return _refused(path, what, code="weights-pickle-damaged")


def _check_records(path: Path, size: int) -> None:
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        # neither a bomb, nor bytes that are not the tensors' own
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise _refused(path, "the records of this pickle are compressed", code="weights-pickle-compressed")
        if sum(record.file_size for record in records) > size:
            raise _refused(path, "the records of this pickle are larger than the file", code="weights-pickle-damaged")
        for record in records:
            if record.filename.endswith("/byteorder") and archive.read(record) != b"little":
                raise _refused(path, "the values of this pickle are big-endian", code="weights-pickle-big-endian")


def _is_state(state: Any) -> bool:
    return isinstance(state, Mapping) and all(isinstance(name, str) for name in state)


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def _header(path: Path, tensor: Any) -> TensorHeader:
    name = str(tensor.dtype).removeprefix("torch.")
    dtype = _TYPES.get(name, name) if tensor.is_contiguous() else f"{name} in strides of {list(tensor.stride())}"
    start = tensor.untyped_storage()._checkpoint_offset + tensor.storage_offset() * tensor.element_size()
    assert ITEM_BYTES.get(dtype, tensor.element_size()) == tensor.element_size()
    return TensorHeader(dtype, tuple(tensor.shape), path, start, tensor.numel() * tensor.element_size())


def _refused(path: Path, what: str, code: str) -> ModelError:
    return ModelError(Problem(what, str(path), "use the safetensors file of the same model", code=code))
