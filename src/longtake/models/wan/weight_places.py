"""From tensors in headers to the places that weights are read from."""

from collections.abc import Mapping
from math import prod

import torch

from longtake.errors import ModelError, Problem
from longtake.models.wan.headers import TensorHeader
from longtake.models.weight_files import WeightFile, WeightScale

TORCH_TYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""Types that weights are read in, by safetensors' name."""


def located(tensors: Mapping[str, TensorHeader]) -> dict[str, WeightFile]:
    """Where the values of each tensor lie; layouts differ in names alone, so that its bytes are the parameter's.

    Raises ModelError where one is of a type that is no float's.
    """
    for name, header in tensors.items():
        if header.dtype not in TORCH_TYPES:
            what = f"{name} is of type {header.dtype}, in which Longtake reads no weights"
            remedy = "use the bf16, fp16 or fp8 file of the same model"
            raise ModelError(Problem(what, str(header.file), remedy, code="weights-type-unsupported"))
    return {name: _place(header) for name, header in tensors.items()}


def _place(header: TensorHeader) -> WeightFile:
    scale = None
    if header.scale is not None:
        scale = WeightScale(_place(header.scale), prod(header.shape) // prod(header.scale.shape))
    return WeightFile(header.file, header.start, header.nbytes, TORCH_TYPES[header.dtype], scale)
