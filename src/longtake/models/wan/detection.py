"""What a checkpoint is, told by names and shapes of its tensors, never by a hash or a file name. Needs no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Literal

from longtake.config.schema import ModelConfig
from longtake.errors import ModelError, Problem
from longtake.models.wan import signature
from longtake.models.wan.adapters import ALPHA, Adapter, AdapterFormat, is_adapter, read_adapter
from longtake.models.wan.component_kinds import TOKENIZER, FoundComponent, find_component
from longtake.models.wan.headers import TensorHeader, listed, read_header, read_headers, tensor_files
from longtake.models.wan.pipeline_index import read_pipeline_index
from longtake.models.wan.scales import is_scale, with_scales
from longtake.models.wan.variants import VARIANTS, WanVariant, variant

__all__ = [
    "EXPERT_FOLDERS",
    "Checkpoint",
    "TensorHeader",
    "decide",
    "detect",
    "detect_experts",
    "detect_given",
    "identify",
    "inspect",
    "read_header",
    "tensors_of",
    "variant_of",
]

Layout = Literal["diffusers", "original", "comfyui"]
Kind = Literal["transformer", "lora", "vae", "text_encoder", "image_encoder"]

EXPERT_FOLDERS = {"transformer": "high_noise_model", "transformer_2": "low_noise_model"}
"""Folders of the two experts in the original release of the A14B models."""

_DTYPES = {"BF16": "bf16", "F16": "fp16", "F32": "fp32", "F8_E4M3": "fp8_e4m3", "F8_E5M2": "fp8_e5m2"}
_OTHER_COMPONENTS = {
    "vae": ("a VAE", "of other sizes"),
    "text_encoder": ("a T5 encoder", "of another width, or with one position bias for all blocks"),
    "image_encoder": ("a CLIP vision encoder", "of another width"),
}
_LAYOUT_OF: dict[AdapterFormat, Layout] = {"comfyui": "comfyui", "diffusers": "diffusers", "kohya": "original"}


@dataclass(frozen=True)
class Checkpoint:
    """What `detect` found.

    `variant` is set where there is one candidate; `candidates` are names. `dtype` is that of most values and
    `parameters` counts one expert. `prefix` is what stands before each name in the file. `experts` maps the component
    names (`transformer`, `transformer_2`) to where their weights are; empty where the file cannot tell which it is.
    """

    layout: Layout
    kind: Kind
    variant: WanVariant | None
    candidates: tuple[str, ...]
    dtype: str
    parameters: int
    files: tuple[Path, ...]
    prefix: str
    experts: dict[str, Path]


def detect(path: Path) -> Checkpoint:
    """What the file or folder at `path` is, from headers and `model_index.json` alone.

    Raises ModelError where it is damaged, incomplete, or of a model that Longtake does not train.
    """
    if (path / "model_index.json").is_file():
        return _detect_pipeline(path)
    folders = {component: path / folder for component, folder in EXPERT_FOLDERS.items()}
    if experts := {component: folder for component, folder in folders.items() if folder.is_dir()}:
        return _narrowed(path, experts, two=True)
    files = _weight_files(path)
    return _detect_tensors(path, files, read_headers(files))


def detect_experts(high: Path, low: Path) -> Checkpoint:
    """What two files or folders are, the high-noise and the low-noise transformer of one model; raises as `detect`."""
    return _narrowed(high, dict(zip(EXPERT_FOLDERS, (high, low), strict=True)), two=True)


def detect_given(model: ModelConfig) -> Checkpoint:
    """What lies at `model.path`, and at `model.low_noise_path` if it is given; raises ModelError as `detect` does."""
    paths = {"path": model.path, "low_noise_path": model.low_noise_path}
    found = {key: Path(text).expanduser() for key, text in paths.items() if text}
    lacking = {key: f"there is no {path}" for key, path in found.items() if not path.exists()}
    if lacking:
        raise ModelError([Problem(what, f"model.{key}", code="model-path-missing") for key, what in lacking.items()])
    return detect_experts(*found.values()) if len(found) == 2 else detect(found["path"])


def variant_of(model: ModelConfig) -> WanVariant:
    """The variant that a config names or gives the path of; nothing is fetched.

    Raises ModelError where it cannot be told from that alone.
    """
    if model.path:
        return decide(detect_given(model), Path(model.path).expanduser(), model.name)
    ids = {row.hub_id.lower(): row for row in VARIANTS.values() if row.hub_id}
    ids |= {hub_id.removesuffix("-diffusers"): row for hub_id, row in ids.items()}  # the authors' own releases
    return ids.get(model.name.lower().removeprefix("ms://")) or variant(model.name)


def identify(path: Path, wanted_variant: str = "") -> WanVariant:
    """The variant of the transformer at `path`; `wanted_variant`, a name or hub id, decides where the weights cannot.

    Raises ModelError as `detect` does, for other kinds of file, and where candidates remain or none is the wanted one.
    """
    return decide(detect(path), path, wanted_variant)


def decide(found: Checkpoint, path: Path, wanted_variant: str = "") -> WanVariant:
    """`identify` for what has been detected at `path` before."""
    if found.kind != "transformer":
        what = f"this is a {found.kind}, not a transformer"
        raise ModelError(Problem(what, str(path), "give the base model's path", code="model-not-a-transformer"))
    candidates = " or ".join(found.candidates)
    if not wanted_variant:
        if found.variant is not None:
            return found.variant
        remedy = f'set model.name to the right one, for example "{found.candidates[0]}"'
        what = f"this is {candidates}: their weights have the same shapes"
        raise ModelError(Problem(what, str(path), remedy, code="model-ambiguous"))
    by_hub_id = {known.hub_id: known.name for known in VARIANTS.values() if known.hub_id}
    name = by_hub_id.get(wanted_variant.removeprefix("ms://")) or variant(wanted_variant).name
    if name not in found.candidates:
        what = f"this is {candidates}, not {name}"
        raise ModelError(Problem(what, str(path), "correct model.name or model.path", code="model-name-differs"))
    return found.variant or variant(name)


def inspect(path: Path) -> dict[str, object]:
    """What `longtake inspect --json` prints of the file or folder at `path`; raises ModelError as `detect` does."""
    found = detect(path)
    tasks = {VARIANTS[name].spec.task for name in found.candidates}
    facts: dict[str, object] = {
        "kind": found.kind,
        "variant": found.variant.name if found.variant else None,
        "candidates": list(found.candidates),
        "task": tasks.pop() if len(tasks) == 1 else None,
        "parameters": found.parameters,
        "dtype": found.dtype,
        "layout": found.layout,
        "experts": list(found.experts),
        "files": [str(file) for file in found.files],
    }
    if found.kind != "lora":
        return facts
    adapter = read_adapter(read_headers(found.files))
    return (
        facts
        | _told(adapter, found.candidates)
        | {
            "format": adapter.format,
            "dora": adapter.dora,
            "ranks": list(adapter.ranks),
            "alphas": list(adapter.alphas),
            "targets": len(adapter.modules),
            "unknown_targets": list(adapter.unknown),
        }
    )


def _told(adapter: Adapter, candidates: Sequence[str]) -> dict[str, object]:
    """What a LoRA's file says of itself, and what follows from that: of the models that it fits, the one it names."""
    kept = [(key, adapter.metadata.get(f"longtake.{key}")) for key in ("model", "expert", "steps", "num_frames")]
    told: dict[str, object] = {key: int(text) if text.isdecimal() else text for key, text in kept if text}
    name = told.get("model")
    if name not in candidates:
        return told
    others = [other for other in candidates if other != name]
    return {"variant": name, "candidates": [name, *others], "task": VARIANTS[str(name)].spec.task} | told


def _weight_files(path: Path) -> tuple[Path, ...]:
    """`tensor_files`; a folder of nothing but several LoRA files is refused as such."""
    try:
        return tensor_files(path)
    except ModelError as error:
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else []
        if len(files) < 2 or not all(map(_is_adapter_file, files)):
            raise
        what = f"holds {len(files)} LoRA files: {listed([file.name for file in files])}"
        remedy = f"inspect one of them: {files[0]}"
        raise ModelError(Problem(what, str(path), remedy, code="lora-several-files")) from error


def _is_adapter_file(path: Path) -> bool:
    try:
        return is_adapter(read_header(path))
    except ModelError:
        return False  # it is no model either: the error about the folder stands


def tensors_of(checkpoint: Checkpoint) -> dict[str, TensorHeader]:
    """Tensors of a detected transformer of one expert, by diffusers' names, with their scales.

    Raises ModelError as `read_header` and `with_scales` do.
    """
    body = signature.without_prefix(read_headers(checkpoint.files), checkpoint.prefix)
    body = with_scales(body, checkpoint.files[0])
    return signature.diffusers_names(body, checkpoint.layout != "diffusers", checkpoint.files[0])


def _detect_pipeline(root: Path) -> Checkpoint:
    index = read_pipeline_index(root)
    # Only one of two experts may have been downloaded.
    present = {name: root / name for name in index.transformers if (root / name).is_dir()}
    experts, two = present or {"transformer": root / "transformer"}, index.boundary_ratio is not None
    found = _narrowed(root, experts, two, index.expand_timesteps)
    if found.variant is None or index.boundary_ratio is None:
        return found
    spec = replace(found.variant.spec, boundary_ratio=index.boundary_ratio)
    return replace(found, variant=replace(found.variant, spec=spec))


def _narrowed(root: Path, experts: dict[str, Path], two: bool, expand_timesteps: bool | None = None) -> Checkpoint:
    """Detects each expert's weights and keeps the candidates that agree with the folder they are in."""
    parts = [detect(folder) for folder in experts.values()]
    names = [name for name in parts[0].candidates if all(name in part.candidates for part in parts)]
    specs = {name: VARIANTS[name].spec for name in names}
    names = [name for name, spec in specs.items() if (len(spec.experts) == 2) == two]
    if expand_timesteps is not None:
        names = [name for name in names if specs[name].expand_timesteps == expand_timesteps]
    if not names or any(part.kind != "transformer" for part in parts):
        held = ", ".join(f"{name}: {' or '.join(part.candidates)}" for name, part in zip(experts, parts, strict=True))
        what = f"the parts do not make one model ({held})"
        raise ModelError(Problem(what, str(root), signature.trained(), code="model-parts-differ"))
    files = tuple(file for part in parts for file in part.files)
    only = VARIANTS[names[0]] if len(names) == 1 else None
    return replace(parts[0], variant=only, candidates=tuple(names), files=files, experts=experts)


def _detect_tensors(path: Path, files: tuple[Path, ...], tensors: dict[str, TensorHeader]) -> Checkpoint:
    if not tensors:
        raise ModelError(Problem("holds no tensors", str(path), "download it again", code="weights-empty"))
    if is_adapter(tensors):
        adapter = read_adapter(tensors)
        trained = {name: tensor for name, tensor in tensors.items() if not name.endswith(ALPHA)}
        return _checkpoint(_LAYOUT_OF[adapter.format], "lora", adapter.bases, trained, files)
    if (component := find_component(tensors)) is not None:
        return _component(component, path, files, tensors)
    prefixes = (prefix for prefix in signature.PREFIXES if any(name.startswith(prefix) for name in tensors))
    prefix = next(prefixes, "")
    body = signature.without_prefix(tensors, prefix)
    signature.refuse_others(body, path)
    diffusers = any(name.startswith("condition_embedder.") for name in body)
    layout: Layout = "diffusers" if diffusers else "comfyui" if prefix else "original"
    renamed = signature.diffusers_names(body, not diffusers, path)
    candidates = signature.candidates({name: header.shape for name, header in renamed.items()}, path)
    found = replace(_checkpoint(layout, "transformer", candidates, body, files), prefix=prefix)
    single = all(len(VARIANTS[name].spec.experts) == 1 for name in candidates)
    return replace(found, experts={"transformer": path}) if single else found


def _component(
    found: FoundComponent, path: Path, files: tuple[Path, ...], tensors: Mapping[str, TensorHeader]
) -> Checkpoint:
    """ComfyUI's files have transformers' names too; they are told by what only they have."""
    if not found.users:
        what, told = _OTHER_COMPONENTS[found.kind]
        what = f"this is {what} ({told}), none of a Wan model"
        raise ModelError(Problem(what, str(path), signature.trained(), code="component-of-another-model"))
    layout: Layout = "diffusers" if found.names == "diffusers" else "original"
    if TOKENIZER in tensors or any(map(is_scale, tensors)):
        layout = "comfyui"
    return replace(_checkpoint(layout, found.kind, found.users, found.tensors, files), prefix=found.prefix)


def _checkpoint(
    layout: Layout,
    kind: Kind,
    candidates: Sequence[str],
    tensors: Mapping[str, TensorHeader],
    files: tuple[Path, ...],
) -> Checkpoint:
    counts: dict[str, int] = {}
    for name, tensor in tensors.items():
        if not is_scale(name):
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + prod(tensor.shape)
    main = max(counts, key=lambda dtype: counts[dtype])
    dtype = _DTYPES.get(main, main.lower()) + (" with scales" if any(map(is_scale, tensors)) else "")
    only = VARIANTS[candidates[0]] if len(candidates) == 1 else None
    return Checkpoint(layout, kind, only, tuple(candidates), dtype, sum(counts.values()), files, "", {})
