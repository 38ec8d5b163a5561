"""Reading the weights of a component from files of any layout into a model of diffusers or transformers."""

from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from longtake.errors import ModelError, Problem
from longtake.models.wan.component_names import Place
from longtake.models.wan.headers import TensorHeader
from longtake.models.wan.scales import is_scale, with_scales
from longtake.models.wan.signature import differences
from longtake.models.wan.weight_places import TORCH_TYPES, located
from longtake.models.weight_files import read_weights

Model = TypeVar("Model", bound=nn.Module)


def empty_model(make: Callable[[], Model], where: Path) -> Model:
    """What `make` makes, on `meta`; raises ModelError where its configuration does not allow it."""
    try:
        with torch.device("meta"):
            return make()
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise unreadable(where, error) from error


def read_component(
    model: nn.Module,
    held: tuple[Mapping[str, TensorHeader], Mapping[str, Place]],
    type_of: Callable[[str], torch.dtype],
    device: torch.device | str,
    where: Path,
) -> dict[str, Tensor]:
    """The parameters of `model` by name in `type_of` on `device`, read one after the other from the tensors in `held`.

    `held` are tensors, and by the parameters' names where among them each is; tensors that none is in are left. Axes
    of length 1 may be more or fewer in the file. Raises ModelError where one is missing or of another shape, and as
    `with_scales` and `located` do.
    """
    tensors, places = with_scales(held[0], where), held[1]
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items() if name in places}
    used = {name: tensors[place.name] for name, place in places.items() if place.name in tensors}
    found = {name: _shape(used[name].shape, places[name].parts, shapes[name]) for name in used}
    if problems := differences(found, shapes, where):
        raise ModelError(problems)
    files = located({places[name].name: header for name, header in used.items()})

    def empty(name: str) -> Tensor:
        return torch.empty(shapes[name], dtype=type_of(name), device=device)

    counts = {name: prod(shape) for name, shape in shapes.items()}
    weights = {name: files[place.name].part(place.index * counts[name], counts[name]) for name, place in places.items()}
    return read_weights(weights, empty, lambda _name, tensor: tensor)


def stored_type(tensors: Mapping[str, TensorHeader], where: Path) -> torch.dtype:
    """The type of most values; raises ModelError where it is none that weights are read in."""
    counts: dict[str, int] = {}
    for name, tensor in tensors.items():
        if not is_scale(name):
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + prod(tensor.shape)
    main = max(counts, key=lambda dtype: counts[dtype])
    if main not in TORCH_TYPES:
        what = f"its weights are of type {main}, which Longtake does not read"
        raise ModelError(Problem(what, str(where), code="weights-type-unsupported"))
    return TORCH_TYPES[main]


def unreadable(where: Path, error: Exception) -> ModelError:
    """The error for a component that a library cannot make."""
    what = f"cannot be loaded: {error}"
    return ModelError(Problem(what, str(where), "download the component again", code="component-unloadable"))


def _shape(found: tuple[int, ...], parts: int, expected: tuple[int, ...]) -> tuple[int, ...]:
    """That of a part, in the words of `expected` where they differ by axes of length 1 alone."""
    rows = (found[0] // parts, *found[1:]) if parts > 1 and found and found[0] % parts == 0 else found
    same = [size for size in rows if size != 1] == [size for size in expected if size != 1]
    return expected if same else rows
