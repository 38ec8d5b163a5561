"""What a LoRA file is: its format, ranks, alpha, and the variants that its matrices fit. Needs no torch."""

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from math import prod
from pathlib import Path
from typing import Literal

from longtake.errors import ModelError, Problem
from longtake.models.wan.headers import TensorHeader, read_metadata
from longtake.models.wan.keys import to_diffusers, to_original
from longtake.models.wan.peft_alphas import metadata_alphas
from longtake.models.wan.variants import VARIANTS

AdapterFormat = Literal["comfyui", "diffusers", "kohya"]

_DOWN = re.compile(r"(.+?)\.(?:lora_A|lora_down)(?:\.default)?\.weight")
_UP = re.compile(r"(.+?)\.(?:lora_B|lora_up)(?:\.default)?\.weight")
ALPHA = ".alpha"
"""How the name of an alpha ends."""
_LENGTHS = re.compile(r".+\.(?:dora_scale|lora_magnitude_vector(?:\.\w+){0,2})")
_KOHYA = "lora_unet_"
_PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer_2.", "transformer.")
_SCALARS = {"F32": "<f", "F16": "<e", "F64": "<d"}


@dataclass(frozen=True)
class Adapter:
    """A LoRA file. `modules` are diffusers' names with (outputs, inputs) of the layers it changes.

    `unknown` are modules that no Wan transformer has; `bases` the variants that have every module in its size. `dora`
    says whether some layer has trained lengths of its rows, `metadata` is what the file says of itself in words.
    """

    format: AdapterFormat
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    modules: dict[str, tuple[int, int]]
    unknown: tuple[str, ...]
    bases: tuple[str, ...]
    dora: bool = False
    metadata: Mapping[str, str] = field(default_factory=dict)


def is_adapter(tensors: Mapping[str, TensorHeader]) -> bool:
    """Whether any tensor is one of a LoRA's two matrices."""
    return any(_DOWN.fullmatch(name) or _UP.fullmatch(name) for name in tensors)


def read_adapter(tensors: Mapping[str, TensorHeader]) -> Adapter:
    """What the LoRA of these tensors is; reads the alphas' values from the file, which diffusers has in its metadata.

    Raises ModelError where the metadata's cannot be read.
    """
    downs = {match[1]: header for name, header in tensors.items() if (match := _DOWN.fullmatch(name))}
    ups = {match[1]: header for name, header in tensors.items() if (match := _UP.fullmatch(name))}
    names = sorted(downs.keys() & ups.keys())
    shapes = {name: (ups[name].shape[0], prod(downs[name].shape[1:])) for name in names if _is_pair(downs, ups, name)}
    modules: dict[str, tuple[int, int]] = {}
    unknown = sorted((downs.keys() | ups.keys()) - shapes.keys())
    for name, shape in shapes.items():
        module = _module(name)
        if module is None:
            unknown.append(name)
        else:
            modules[module] = shape
    alphas = {_scalar(header) for name, header in tensors.items() if name.endswith(ALPHA) and prod(header.shape) == 1}
    ranks = {name: downs[name].shape[0] for name in shapes}
    bases = () if unknown else _bases(modules)
    form = _format(next(iter(sorted(downs.keys() | ups.keys()))))
    dora = any(_LENGTHS.fullmatch(name) for name in tensors)
    path = next(iter(tensors.values())).file
    metadata = read_metadata(path)
    alphas = alphas or _told_alphas(metadata, {_module(name) or name: rank for name, rank in ranks.items()}, dora, path)
    found = (tuple(sorted({*ranks.values()})), tuple(sorted(alphas)))
    return Adapter(form, *found, modules, tuple(unknown), bases, dora, metadata)


def _told_alphas(metadata: Mapping[str, str], ranks: Mapping[str, int], dora: bool, path: Path) -> set[float]:
    try:
        return {*metadata_alphas(metadata, ranks, dora).values()}
    except (ValueError, TypeError, AttributeError) as error:
        what = f"cannot read the LoRA's alpha: {error}"
        raise ModelError(Problem(what, str(path), code="lora-alpha-unreadable")) from error


def _is_pair(downs: Mapping[str, TensorHeader], ups: Mapping[str, TensorHeader], name: str) -> bool:
    down, up = downs[name].shape, ups[name].shape
    return len(down) > 1 and len(up) > 1 and down[0] == up[1]


def _format(name: str) -> AdapterFormat:
    if name.startswith(_KOHYA):
        return "kohya"
    return "comfyui" if _renamed(name) is not None else "diffusers"


def _module(name: str) -> str | None:
    if name.startswith(_KOHYA):
        return _kohya_modules().get(name.removeprefix(_KOHYA).removeprefix("_"))
    return _renamed(name) or _checked(_stripped(name))


def _renamed(name: str) -> str | None:
    try:
        return to_diffusers(_stripped(name))
    except ModelError:
        return None


def _checked(name: str) -> str | None:
    try:
        return to_diffusers(to_original(name))
    except ModelError:
        return None


def _stripped(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


@cache
def _kohya_modules() -> dict[str, str]:
    """Kohya's spelling joins the parts of a name by underscores, so it is looked up, not parsed."""
    modules = [name.removesuffix(".weight") for name in VARIANTS["wan2.1-flf2v-14b-720p"].parameter_shapes()]
    return {to_original(module).replace(".", "_"): module for module in modules if not module.endswith(".bias")}


def _bases(modules: Mapping[str, tuple[int, int]]) -> tuple[str, ...]:
    return tuple(name for name, variant in VARIANTS.items() if _fits(modules, variant.parameter_shapes()))


def _fits(modules: Mapping[str, tuple[int, int]], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    for module, (outputs, inputs) in modules.items():
        shape = shapes.get(f"{module}.weight", ())
        if len(shape) < 2 or (shape[0], prod(shape[1:])) != (outputs, inputs):
            return False
    return True


def _scalar(header: TensorHeader) -> float:
    with header.file.open("rb") as file:
        file.seek(header.start)
        data = file.read(header.nbytes)
    if header.dtype == "BF16":
        return float(struct.unpack("<f", b"\0\0" + data)[0])
    if header.dtype in _SCALARS:
        return float(struct.unpack(_SCALARS[header.dtype], data)[0])
    return float(int.from_bytes(data, "little", signed=header.dtype.startswith("I")))
