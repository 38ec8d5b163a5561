"""What `model_index.json` of a diffusers pipeline says: which transformers it has and how they share the work."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longtake.errors import ModelError, Problem
from longtake.models.wan.signature import trained

_TRANSFORMERS = ("transformer", "transformer_2")


@dataclass(frozen=True)
class PipelineIndex:
    """`transformers` are component names; `boundary_ratio` is set where there are two."""

    transformers: tuple[str, ...]
    boundary_ratio: float | None
    expand_timesteps: bool


def read_pipeline_index(root: Path) -> PipelineIndex:
    """That of the diffusers folder `root`; raises ModelError where it is damaged or not that of a Wan model."""
    path = root / "model_index.json"
    index, classes = _read(path)
    for component, name in classes.items():
        if name != "WanTransformer3DModel":
            what = f"{component} is a {name}, a model that Longtake does not train"
            raise ModelError(Problem(what, str(path), trained(), code="model-not-trainable"))
    if "transformer" not in classes:
        what = "the pipeline has no transformer"
        raise ModelError(Problem(what, str(path), trained(), code="pipeline-without-transformer"))
    two = "transformer_2" in classes
    boundary: Any = index.get("boundary_ratio")
    if two and not (isinstance(boundary, int | float) and 0 < boundary < 1):
        what = "transformer_2 without a boundary_ratio between 0 and 1"
        raise ModelError(Problem(what, str(path), code="pipeline-without-boundary"))
    return PipelineIndex(tuple(classes), float(boundary) if two else None, bool(index.get("expand_timesteps")))


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The index, and the class of each transformer in it."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        classes = {name: index[name][1] for name in _TRANSFORMERS if (index.get(name) or [None])[0]}
    except OSError as error:
        what = f"cannot be read: {error.strerror or error}"
        raise ModelError(Problem(what, str(path), code="model-file-unreadable")) from error
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        what = "this is not the index of a diffusers pipeline"
        raise ModelError(Problem(what, str(path), code="pipeline-index-damaged")) from error
    return index, classes
