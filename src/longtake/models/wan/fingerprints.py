"""The identity of a component's files, whatever they are called: what cached conditioning is known by."""

import hashlib
from pathlib import Path
from typing import Literal

from longtake.errors import ModelError, Problem
from longtake.models.spec import ModelSpec
from longtake.models.wan.component_files import Component, locate_component
from longtake.models.wan.component_kinds import FoundComponent
from longtake.models.wan.headers import TensorHeader
from longtake.models.wan.tokenizer_files import TOKENIZER_FILES, find_tokenizer, read_bytes

_MIB = 2**20
_WHOLE = 2**16
_END = 2**12

ComponentName = Literal["vae", "text_encoder", "tokenizer", "image_encoder", "image_processor"]


def component_fingerprint(root: Path, name: ComponentName, spec: ModelSpec) -> str:
    """The identity of the component `name` of the model `spec` under `root`: sha256 in hex.

    `name` is a folder of diffusers, whose place may be taken by a file. Raises ModelError where it is missing or
    ambiguous.
    """
    if name == "tokenizer":
        return _of_tokenizer(root, locate_component(root, "text_encoder", spec.name))
    if name == "image_processor":
        own = (root / name).is_dir() or locate_component(root, "image_encoder", spec.name).found is None
        return fingerprint(root / name) if own else hashlib.sha256(b"that of CLIP").hexdigest()
    component = locate_component(root, name, spec.name)
    return fingerprint(component.path) if component.found is None else _of_tensors(component.found)


def fingerprint(folder: Path) -> str:
    """The identity of a component's folder: sha256 in hex.

    It covers JSON files and vocabularies whole and, of each safetensors file, the header (every name, type and shape),
    the size, and the first and last MiB of data. Raises ModelError where the folder has none of these files.
    """
    files = sorted(file for file in folder.glob("*") if file.suffix in (".json", ".model", ".txt", ".safetensors"))
    if not files:
        what = "there is no component here"
        raise ModelError(Problem(what, str(folder), "check the path of the model", code="component-missing"))
    digest = hashlib.sha256()
    for file in files:
        part = _safetensors_identity(file) if file.suffix == ".safetensors" else file.read_bytes()
        digest.update(f"{file.name} {len(part)} ".encode())
        digest.update(part)
    return digest.hexdigest()


def _of_tokenizer(root: Path, text_encoder: Component) -> str:
    place = find_tokenizer(root, text_encoder)
    if isinstance(place, TensorHeader):
        return hashlib.sha256(read_bytes(place)).hexdigest()
    return fingerprint(place) if text_encoder.found is None else _of_files(place)


def _of_tensors(found: FoundComponent) -> str:
    """Of a component's tensors in a file of any kind: each one's name, type, shape, and bytes, or the ends of them."""
    digest = hashlib.sha256()
    for name, tensor in sorted(found.tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape} ".encode())
        digest.update(_ends(tensor))
    return digest.hexdigest()


def _ends(tensor: TensorHeader) -> bytes:
    """The bytes of a small tensor, scales and biases among them; the first and last of a large one."""
    with tensor.file.open("rb") as file:
        file.seek(tensor.start)
        if tensor.nbytes <= _WHOLE:
            return file.read(tensor.nbytes)
        first = file.read(_END)
        file.seek(tensor.start + tensor.nbytes - _END)
        return first + file.read(_END)


def _of_files(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            digest.update(f"{name} {(folder / name).stat().st_size} ".encode())
            digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def _safetensors_identity(file: Path) -> bytes:
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = stream.read(8)
        header_size = int.from_bytes(length, "little")
        if header_size > size - 8:
            what = "the file is damaged or cut off"
            raise ModelError(Problem(what, str(file), "download it again", code="weights-truncated"))
        start = stream.read(header_size + _MIB)
        stream.seek(max(size - _MIB, 0))
        return str(size).encode() + length + start + stream.read()
