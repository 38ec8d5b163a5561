"""Headers of weight files: what tensors a file or a set of shards holds, and where. Only pickles need torch."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from longtake.errors import ModelError, Problem

ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
    "C64": 8,
}
"""Bytes of one item of each type that safetensors names."""

_HEADER_LIMIT = 100_000_000
_LENGTH_BYTES = 8
_ZIP = b"PK\x03\x04"
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")
_INDEX = ".safetensors.index.json"
_USUAL = ("diffusion_pytorch_model", "model")


@dataclass(frozen=True)
class TensorHeader:
    """One tensor: safetensors' type name, shape, and the `nbytes` bytes from `start` on in `file`.

    With a `scale` its values are these times that one's (`scales.with_scales`).
    """

    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    nbytes: int
    scale: "TensorHeader | None" = None


def read_header(path: Path) -> dict[str, TensorHeader]:
    """Tensors of one safetensors file, or of a state dict that torch saved (`.pth`), by name.

    Raises ModelError, one line, where the file is missing, of another kind, truncated, or inconsistent.
    """
    try:
        if not path.exists():
            raise _refused(path, "there is no such file", code="weights-file-missing")
        if not path.is_file():
            raise _refused(path, "this is not a regular file", code="weights-not-a-file")
        size = path.stat().st_size
        with path.open("rb") as file:
            first = file.read(_LENGTH_BYTES)
            if first.startswith(_ZIP):
                return _of_pickle(path)
            length = int.from_bytes(first, "little")
            _check_length(path, first + file.read(64), length, size)
            file.seek(_LENGTH_BYTES)
            entries = _parse(path, file.read(length))
    except OSError as error:
        raise _refused(path, f"cannot be read: {error.strerror or error}", code="model-file-unreadable") from error
    entries.pop("__metadata__", None)
    data_start = _LENGTH_BYTES + length
    tensors = {name: _tensor(path, name, entry, data_start) for name, entry in entries.items()}
    _check_layout(path, tensors, data_start, size)
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file that `read_header` accepts says of itself in words; a pickle says nothing."""
    with path.open("rb") as file:
        first = file.read(_LENGTH_BYTES)
        header = b"{}" if first.startswith(_ZIP) else file.read(int.from_bytes(first, "little"))
    told = json.loads(header).get("__metadata__")
    return {key: value for key, value in told.items() if isinstance(value, str)} if isinstance(told, dict) else {}


def read_headers(files: Sequence[Path]) -> dict[str, TensorHeader]:
    """Tensors of all `files` by name; raises ModelError with every damaged file and every name found twice."""
    tensors: dict[str, TensorHeader] = {}
    problems: list[Problem] = []
    for file in files:
        try:
            header = read_header(file)
        except ModelError as error:
            problems.extend(error.problems)
            continue
        if twice := tensors.keys() & header.keys():
            other = tensors[min(twice)].file.name
            what = f"{min(twice)} is in {other} too"
            problems.append(Problem(what, str(file), "remove one of the two", code="weights-tensor-twice"))
        tensors |= header
    if problems:
        raise ModelError(problems)
    return tensors


def tensor_files(path: Path) -> tuple[Path, ...]:
    """The safetensors files that make up the model at `path`: a file, one of its shards, an index, or their folder.

    Raises ModelError where there is none, where shards are missing, or where a folder holds more than one model.
    """
    if path.is_dir():
        return _files_of_folder(path)
    if path.name.endswith(".json"):
        return _files_of_index(path)
    if match := _SHARD.fullmatch(path.name):
        index = path.with_name(match[1] + _INDEX)
        return _files_of_index(index) if index.is_file() else _files_of_shard(path, match)
    return (path,)


def listed(names: Sequence[str], limit: int = 5) -> str:
    """`a, b, c` or, past `limit` names, `a, b, c, d, e and 7 more`."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _files_of_folder(folder: Path) -> tuple[Path, ...]:
    indexes = sorted(folder.glob(f"*{_INDEX}"))
    files = sorted(folder.glob("*.safetensors"))
    models = {file.name.removesuffix(_INDEX): file for file in indexes}
    for file in files:
        match = _SHARD.fullmatch(file.name)
        models.setdefault(match[1] if match else file.stem, file)
    if not models:
        inner = sorted({file.parent.name for file in folder.glob("*/*.safetensors")})
        remedy = f"give the path of one with some: {listed(inner, 3)}" if inner else "give the path of the weights"
        raise _refused(folder, "there is no safetensors file in this folder", remedy, code="weights-missing-in-folder")
    usual = [models[name] for name in _USUAL if name in models]
    if len(models) > 1 and not usual:
        what = f"holds {len(models)} models: {', '.join(models)}"
        raise _refused(folder, what, "give the path of one file", code="weights-of-several-models")
    return tensor_files(usual[0] if usual else next(iter(models.values())))


def _files_of_index(index: Path) -> tuple[Path, ...]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except OSError as error:
        raise _refused(index, f"cannot be read: {error.strerror or error}", code="model-file-unreadable") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = "this is not an index of safetensors shards (no weight_map of file names)"
        raise _refused(index, what, code="weights-index-damaged") from error
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise _refused(index, "its weight_map does not name files of its own folder", code="weights-index-damaged")
    return _present([index.parent / name for name in names])


def _files_of_shard(path: Path, match: re.Match[str]) -> tuple[Path, ...]:
    names = (f"{match[1]}-{shard:05}-of-{match[3]}.safetensors" for shard in range(1, int(match[3]) + 1))
    return _present([path.with_name(name) for name in names])


def _present(files: list[Path]) -> tuple[Path, ...]:
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        what = f"shards are missing: {listed(missing)}"
        raise _refused(files[0].parent, what, "download them again", code="weights-shards-missing")
    return tuple(files)


def _of_pickle(path: Path) -> dict[str, TensorHeader]:
    from longtake.models.wan.pickles import read_pickle

    return read_pickle(path)


def _check_length(path: Path, first: bytes, length: int, size: int) -> None:
    if size == 0:
        raise _refused(path, "the file has zero bytes", "download it again", code="weights-file-empty")
    if first.startswith(b"version https://git-lfs"):
        what = "this is a Git LFS pointer, not the weights"
        raise _refused(path, what, "run git lfs pull", code="weights-lfs-pointer")
    # a header of 1152 bytes begins with 80 04, too, but after the length comes its brace
    if first[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05") and first[8:9] != b"{":
        what = "this is a bare pickle, which is not read"
        raise _refused(path, what, "use the safetensors file of the same model", code="weights-bare-pickle")
    if first.startswith(b"GGUF"):
        what = "this is a GGUF file, which is not read"
        raise _refused(path, what, "use a safetensors file of the same model", code="weights-gguf")
    if size < _LENGTH_BYTES or length > _HEADER_LIMIT or first[8:9] not in (b"{", b""):
        raise _refused(path, "this is not a safetensors file", code="weights-not-safetensors")
    if _LENGTH_BYTES + length > size:
        raise _refused(
            path,
            f"truncated within the header: {size} bytes of {_LENGTH_BYTES + length}",
            "download it again",
            code="weights-truncated",
        )


def _parse(path: Path, header: bytes) -> dict[str, Any]:
    try:
        entries = json.loads(header)
    except (ValueError, RecursionError) as error:
        what = "the safetensors header is damaged: it is not JSON"
        raise _refused(path, what, "download it again", code="weights-header-damaged") from error
    if not isinstance(entries, dict):
        what = "the safetensors header is damaged: it is not a JSON object"
        raise _refused(path, what, "download it again", code="weights-header-damaged")
    return entries


def _tensor(path: Path, name: str, entry: Any, data_start: int) -> TensorHeader:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        sound = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
    except (TypeError, KeyError, ValueError) as error:
        what = f"the safetensors header is damaged at {name}"
        raise _refused(path, what, "download it again", code="weights-header-damaged") from error
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        what = f"{name} is of type {dtype!r}, which Longtake does not know"
        raise _refused(path, what, code="weights-type-unsupported")
    if not sound or end - begin != prod(shape) * ITEM_BYTES[dtype]:
        what = f"the size of {name} does not agree with its shape {list(shape)}"
        raise _refused(path, what, "download it again", code="weights-header-damaged")
    return TensorHeader(dtype, shape, path, data_start + begin, end - begin)


def _check_layout(path: Path, tensors: dict[str, TensorHeader], data_start: int, size: int) -> None:
    position = data_start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if tensor.start != position:
            what = f"{name} does not start where the tensor before it ends"
            raise _refused(path, what, "download it again", code="weights-header-damaged")
        position += tensor.nbytes
    if position > size:
        raise _refused(path, f"truncated: {size} bytes of {position}", "download it again", code="weights-truncated")
    if position < size:
        what = f"{size - position} bytes follow the last tensor"
        raise _refused(path, what, "download it again", code="weights-with-trailing-bytes")


def _refused(path: Path, what: str, remedy: str = "", *, code: str) -> ModelError:
    return ModelError(Problem(what, str(path), remedy, code=code))
