"""Checkpoint files for tests: headers of any size over holes in place of data, and small ones with weights."""

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path

from longtake.models.wan.headers import ITEM_BYTES
from longtake.models.wan.keys import to_original
from longtake.models.wan.variants import VARIANTS

Shapes = dict[str, tuple[int, ...]]


def write_sparse(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str = "BF16", **dtypes: str) -> Path:
    """A sparse safetensors file with these tensors: a whole header, and no data on the disk."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in shapes.items():
        kind = dtypes.get(name, dtype)
        end = position + prod(shape) * ITEM_BYTES[kind]
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)
    return path


def write_sparse_shards(folder: Path, stem: str, shapes: Shapes, count: int) -> Path:
    """`count` sparse shards and their index, whose path is returned."""
    names = list(shapes)
    weight_map: dict[str, str] = {}
    for shard in range(count):
        file = f"{stem}-{shard + 1:05}-of-{count:05}.safetensors"
        part = names[shard::count]
        write_sparse(folder / file, {name: shapes[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    index = folder / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def original_shapes(variant: str, prefix: str = "") -> Shapes:
    """Shapes of a variant's transformer by the original names behind `prefix`."""
    return {prefix + to_original(name): shape for name, shape in VARIANTS[variant].parameter_shapes().items()}


def write_pipeline(root: Path, variant: str) -> Path:
    """A diffusers root with the index and the transformers of `variant`, sparse."""
    spec = VARIANTS[variant].spec
    index: dict[str, object] = {"_class_name": "WanPipeline", "transformer_2": [None, None], "boundary_ratio": None}
    index |= {"expand_timesteps": spec.expand_timesteps, "boundary_ratio": spec.boundary_ratio}
    for component in spec.experts:
        index[component] = ["diffusers", "WanTransformer3DModel"]
        weights = root / component / "diffusion_pytorch_model.safetensors"
        write_sparse(weights, VARIANTS[variant].parameter_shapes())
    (root / "model_index.json").write_text(json.dumps(index))
    return root
