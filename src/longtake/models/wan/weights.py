"""The transformer's weights: where they lie, streamed from safetensors onto their final dtype and device, and saved."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from torch import Tensor

from longtake.config.schema import ModelConfig
from longtake.errors import ModelError, Problem
from longtake.files import replace_folder, write_file
from longtake.models.hub import MODELSCOPE, fetch
from longtake.models.tensor_writing import lazy, write_tensors
from longtake.models.wan.component_files import besides, holds_components, surrounding_components
from longtake.models.wan.detection import EXPERT_FOLDERS, Checkpoint, decide, detect, detect_given, tensors_of
from longtake.models.wan.keys import to_original
from longtake.models.wan.signature import differences
from longtake.models.wan.variants import KEEP_FP32, VARIANTS, WanVariant, variant
from longtake.models.wan.weight_places import located
from longtake.models.weight_files import WeightFile, read_weights

_COMPONENTS = ("vae", "text_encoder", "tokenizer", "image_encoder", "image_processor", "scheduler")
_ORIGINAL_COMPONENTS = ("Wan2.*_VAE.pth", "models_t5_*.pth", "models_clip_*.pth", "google/umt5-xxl/*")
_FREE_KEYS = ("eps", "rope_max_seq_len")


@dataclass(frozen=True)
class ModelFiles:
    """A model on this machine.

    `transformers` maps `transformer` and `transformer_2` to a diffusers component folder, a folder of shards or a
    safetensors file. `root` is the folder of VAE and encoders, a diffusers one, an original release, or ComfyUI's
    `models`; None where the model is a transformer alone and no components were given: then `refused` has why files
    beside it are none.
    """

    variant: WanVariant
    transformers: dict[str, Path]
    root: Path | None
    refused: tuple[Problem, ...] = ()


def locate(model: ModelConfig, bundled: Callable[[str], Path], report: Callable[[str], None]) -> ModelFiles:
    """Finds, and downloads if need be, the model of a config; `bundled` gives the diffusers folder of a tiny variant.

    Raises ModelError where it does not exist, is of another kind, or where the files cannot tell which variant or
    which expert they are and the config does not say.
    """
    if model.path:
        path, wanted, found = Path(model.path).expanduser(), model.name, detect_given(model)
    else:
        path, wanted = _named(model, bundled, report)
        found = detect(path)
    chosen = decide(found, path, wanted)
    transformers = found.experts or {_expert(model.expert, chosen, path): path}
    refused: list[Problem] = []
    root = _components(model.components, bundled, report) or surrounding_components(path, refused)
    return ModelFiles(chosen, transformers, root, () if root else tuple(refused))


@dataclass(frozen=True)
class Loading:
    """Where each parameter is put, and what becomes of it.

    `place(name)` is the device that a parameter is read onto, or None: then it is not read and stays on `meta`, in its
    final dtype. Without `place` all are read. `convert(name, tensor)` is what is kept of a tensor right after it was
    read.
    """

    place: Callable[[str], torch.device | None] | None = None
    convert: Callable[[str, Tensor], Tensor] = lambda _name, tensor: tensor


ALL_AS_THEY_ARE = Loading()


def load_transformer(
    files: ModelFiles,
    component: str,
    dtype: torch.dtype,
    device: torch.device,
    loading: Loading = ALL_AS_THEY_ARE,
) -> WanTransformer3DModel:
    """The frozen transformer `component` in eval mode, in `dtype` but for what diffusers keeps in fp32, on `device`.

    Tensors are read one after the other with plain reads: beyond the final weights this takes one tensor and a few
    dozen MiB of host memory. Those with scales are multiplied by them. Raises ModelError where the file is damaged or
    quantised otherwise, or where parameters are missing, superfluous, or of another shape.
    """
    found = _detected(files, component)
    path = files.transformers[component]
    tensors = tensors_of(found)
    with torch.device("meta"):
        transformer = WanTransformer3DModel(**_config(found, path, files.variant))
    shapes = {name: tuple(tensor.shape) for name, tensor in transformer.state_dict().items()}
    if problems := differences({name: header.shape for name, header in tensors.items()}, shapes, path):
        raise ModelError(problems)
    places = {name: loading.place(name) if loading.place else device for name in tensors}

    def empty(name: str) -> Tensor:
        kept = any(part in KEEP_FP32 for part in name.split("."))
        place = places[name] or torch.device("meta")
        return torch.empty(shapes[name], dtype=torch.float32 if kept else dtype, device=place)

    wanted = {name: weight for name, weight in located(tensors).items() if places[name] is not None}
    unread = {name: empty(name) for name, place in places.items() if place is None}
    transformer.load_state_dict(unread | read_weights(wanted, empty, loading.convert), assign=True)
    # Not in the state dict, so the one part that `meta` left without values.
    config = transformer.config
    rope = WanRotaryPosEmbed(config.attention_head_dim, config.patch_size, config.rope_max_seq_len)
    transformer.rope = rope.to(device)
    return transformer.requires_grad_(False).eval()


def weight_files(files: ModelFiles, component: str) -> dict[str, WeightFile]:
    """Where the values of each of the transformer's parameters, by its name there, lie in the files.

    Raises ModelError as `load_transformer` does for the files' headers.
    """
    return located(tensors_of(_detected(files, component)))


def save_transformer(
    transformer: WanTransformer3DModel,
    folder_or_file: Path,
    layout: Literal["diffusers", "original"],
    max_shard_bytes: int | None = None,
) -> None:
    """Writes all weights, whole or not at all: a diffusers component folder, or one file with the original names.

    The folder's files have at most `max_shard_bytes` each, without it as many as diffusers chooses. An earlier
    transformer in that place is replaced. Raises ModelError where something else is there, RunError where the disk
    refuses.
    """
    if layout == "original":
        tensors = {to_original(name): lazy(tensor) for name, tensor in transformer.state_dict().items()}
        write_file(folder_or_file, lambda staged: write_tensors(staged, tensors))
        return
    sizes: dict[str, Any] = {} if max_shard_bytes is None else {"max_shard_size": max_shard_bytes}
    save = partial(transformer.save_pretrained, **sizes)
    if folder_or_file.exists() and not (folder_or_file / "config.json").is_file():
        what = "is there already and is no transformer"
        raise ModelError(Problem(what, str(folder_or_file), "give another place", code="model-place-taken"))
    replace_folder(folder_or_file, save)


def _named(model: ModelConfig, bundled: Callable[[str], Path], report: Callable[[str], None]) -> tuple[Path, str]:
    """The folder of a variant's name or a hub id, and what it says of the variant."""
    if model.name in VARIANTS and not VARIANTS[model.name].hub_id:
        return bundled(model.name), model.name
    # the authors' own releases have the same ids without the ending
    diffusers = {row.hub_id: row for row in VARIANTS.values() if row.hub_id}
    published = diffusers | {hub_id[: -len("-Diffusers")]: row for hub_id, row in diffusers.items()}
    known = VARIANTS.get(model.name) or published.get(model.name.removeprefix(MODELSCOPE))
    if known is None and "/" not in model.name:
        variant(model.name)
    if known is None and Path(model.name).expanduser().exists():
        what = f"{model.name} is a path"
        raise ModelError(Problem(what, "model.name", "write it as model.path", code="model-name-is-a-path"))
    expert = model.expert if known and len(known.spec.experts) == 2 else "both"
    folder = fetch(VARIANTS[model.name].hub_id if model.name in VARIANTS else model.name, _patterns(expert), report)
    return folder, known.name if known else ""


def _components(value: str, bundled: Callable[[str], Path], report: Callable[[str], None]) -> Path | None:
    if not value:
        return None
    local = Path(value).expanduser()
    if local.is_dir():
        root = local
    elif value in VARIANTS and not VARIANTS[value].hub_id:
        root = bundled(value)
    elif value in VARIANTS or "/" in value:
        root = fetch(VARIANTS[value].hub_id if value in VARIANTS else value, _component_patterns(), report)
    else:
        what = f"there is no folder or model {value}"
        raise ModelError(Problem(what, "model.components", code="component-place-missing"))
    refused: list[Problem] = []
    if not holds_components(root, refused):
        remedy = "give a diffusers folder, an original release, ComfyUI's folder models, or a hub id"
        what = f"{root} has no folder vae and no file of a VAE{besides(refused)}"
        raise ModelError(Problem(what, "model.components", remedy, code="component-missing"))
    return root


def _component_patterns() -> list[str]:
    kinds = ("*.json", "*.safetensors", "*.model", "*.txt")
    folders = (f"{component}/{kind}" for component in _COMPONENTS for kind in kinds)
    return ["model_index.json", *folders, *_ORIGINAL_COMPONENTS]


def _patterns(expert: str) -> list[str]:
    """Files of a diffusers repository and of an original release; of one expert where only that is trained."""
    chosen = {"high": ["transformer"], "low": ["transformer_2"]}.get(expert, list(EXPERT_FOLDERS))
    folders = [*chosen, *(EXPERT_FOLDERS[name] for name in chosen)]
    return [*_component_patterns(), "config.json", "diffusion_pytorch_model*", *(f"{folder}/*" for folder in folders)]


def _expert(expert: str, chosen: WanVariant, path: Path) -> str:
    experts = chosen.spec.experts
    if len(experts) == 1:
        return experts[0]
    if expert == "both":
        what = f"this is one of the two transformers of {chosen.name}, the file does not tell which"
        remedy = 'set model.expert to "high" or "low", or give the other as model.low_noise_path'
        raise ModelError(Problem(what, str(path), remedy, code="model-expert-ambiguous"))
    return experts[0 if expert == "high" else 1]


def _check_kind(found: Checkpoint, path: Path) -> None:
    if found.kind != "transformer":
        what = f"this is a {found.kind}, not a transformer"
        raise ModelError(Problem(what, str(path), code="model-not-a-transformer"))


def _config(found: Checkpoint, path: Path, chosen: WanVariant) -> dict[str, Any]:
    """The folder's own config.json, which must agree with the variant but for `_FREE_KEYS`, or else the variant's."""
    file = path / "config.json"
    if found.layout != "diffusers" or not file.is_file():
        return chosen.transformer_config
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
        own = {key: given[key] for key in chosen.transformer_config if key in given}
        config = chosen.transformer_config | own | {"patch_size": tuple(own.get("patch_size", (1, 2, 2)))}
    except (OSError, ValueError, TypeError) as error:
        what = "cannot be read as a transformer's config"
        raise ModelError(Problem(what, str(file), "download it again", code="model-config-damaged")) from error
    other = [f"{key} = {config[key]}" for key in own if config[key] != chosen.transformer_config[key]]
    if wrong := [text for text in other if not text.startswith(_FREE_KEYS)]:
        what = f"{', '.join(wrong)} does not agree with {chosen.name}"
        raise ModelError(Problem(what, str(file), code="model-config-differs"))
    return config


def _detected(files: ModelFiles, component: str) -> Checkpoint:
    if component not in files.transformers:
        what = f"{files.variant.name} has no {component} here, only {', '.join(files.transformers)}"
        raise ModelError(Problem(what, "model", "give the folder with both transformers", code="model-expert-missing"))
    path = files.transformers[component]
    found = detect(path)
    _check_kind(found, path)
    return found
