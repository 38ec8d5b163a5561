"""Quantisations with scales, as ComfyUI and Kijai write them: which tensor scales which weight. Needs no torch."""

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from pathlib import Path

from longtake.errors import ModelError, Problem
from longtake.models.wan.headers import TensorHeader, listed

_OF_WEIGHTS = (".scale_weight", ".weight_scale")
"""`layer.weight` times `layer.scale_weight` is the weight; ComfyUI's newer files call it `layer.weight_scale`."""
_BESIDE = (".scale_input", ".input_scale", ".comfy_quant", ".weight_scale_2")
"""How a layer computes with quantised inputs, the name of its format as JSON, and NVFP4's second scale."""
_MARKER = "scaled_fp8"
_FLOATS = ("F32", "BF16", "F16", "F64")
_REMEDY = "use the bf16, fp16 or fp8 file of the same model"


def is_scale(name: str) -> bool:
    """Whether a tensor belongs to a quantisation with scales rather than to the model."""
    return name.endswith((*_OF_WEIGHTS, *_BESIDE)) or name == _MARKER


def with_scales(tensors: Mapping[str, TensorHeader], where: Path) -> dict[str, TensorHeader]:
    """The tensors that are no scales, each with the one that it is to be multiplied by, if there is any.

    A scale is one number, one for each row, or one for each of the equal parts of each row. Raises ModelError for
    scales of another kind or without their weight, and where some matrices in fp8 have theirs and others not.
    """
    scaled = {name: tensor for name, tensor in tensors.items() if not is_scale(name)}
    for name, scale in tensors.items():
        if name.endswith(_OF_WEIGHTS):
            weight = name[: name.rindex(".")] + ".weight"
            if weight not in scaled:
                raise _refused(f"there is a {name} and no {weight}", where, code="weights-scale-alone")
            if scale.dtype not in _FLOATS or not _fits(scale.shape, scaled[weight].shape):
                what = f"{name} is {scale.dtype} {list(scale.shape)} for a {list(scaled[weight].shape)} weight"
                what = f"{what}, a quantisation that Longtake does not read"
                raise _refused(what, where, code="weights-quantisation-unsupported")
            scaled[weight] = replace(scaled[weight], scale=scale)
    if any(tensor.scale for tensor in scaled.values()) or _MARKER in tensors:
        lacking = [name for name, tensor in scaled.items() if _is_fp8_matrix(name, tensor) and tensor.scale is None]
        if lacking:
            what = f"{len(lacking)} of its fp8 weights have no scale: {listed(lacking)}"
            raise _refused(what, where, code="weights-scale-missing")
    return scaled


def _fits(scale: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    if prod(scale) == 1:
        return prod(weight) > 0
    if not weight or scale[:1] != weight[:1]:
        return False
    return prod(scale) > 0 and prod(weight[1:]) % prod(scale[1:]) == 0


def _is_fp8_matrix(name: str, tensor: TensorHeader) -> bool:
    return tensor.dtype.startswith("F8") and len(tensor.shape) == 2 and name.endswith(".weight")


def _refused(what: str, where: Path, code: str) -> ModelError:
    return ModelError(Problem(what, str(where), _REMEDY, code=code))
