# ruff: noqa: F722
"""UMT5, which reads prompts: from a diffusers folder or a file of its own, with its tokenizer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from longtake.errors import ModelError, Problem
from longtake.models.spec import ModelSpec
from longtake.models.wan import tiny
from longtake.models.wan.component_configs import UMT5_XXL
from longtake.models.wan.component_files import Component, locate_component
from longtake.models.wan.component_kinds import FoundComponent
from longtake.models.wan.component_names import Place, umt5_in_original
from longtake.models.wan.component_weights import empty_model, read_component, stored_type, unreadable
from longtake.models.wan.headers import TensorHeader, read_headers, tensor_files
from longtake.models.wan.tokenizer_files import find_tokenizer, load_tokenizer
from longtake.models.wan.weight_places import TORCH_TYPES

if TYPE_CHECKING:
    from jaxtyping import Float

TEXT_TOKENS = 512
"""Length of a padded prompt: diffusers finds the image tokens by `shape[1] - 512`, so no other value works."""

_LARGE = 1024
"""The width from which on a text encoder of fp32 files is computed in bf16: UMT5-XXL has 4096, a tiny model's 64."""
_COMPUTED = (torch.float32, torch.bfloat16, torch.float16)
_EMBEDDING, _SAME_EMBEDDING = "shared.weight", "encoder.embed_tokens.weight"
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextEncoder:
    """A tokenizer and the UMT5 that reads its tokens."""

    tokenizer: Any
    model: UMT5EncoderModel


def load_text_encoder(root: Path, device: torch.device | str, spec: ModelSpec | None = None) -> TextEncoder:
    """Tokenizer and UMT5 of `root`, a folder of components, computing in what `text_encoder_types` says.

    `spec` decides where there are encoders of several models. Tensors are read one after the other, to their final type
    on `device`: beyond the weights this takes one staging buffer of host memory. Raises ModelError where something is
    missing, ambiguous or damaged.
    """
    component = locate_component(root, "text_encoder", spec.name if spec else "")
    model = _read_umt5(component, device)
    return TextEncoder(load_tokenizer(find_tokenizer(root, component)), model)


def text_encoder_types(root: Path, spec: ModelSpec | None = None) -> tuple[torch.dtype, torch.dtype]:
    """The type of the text encoder's files in the folder `root`, and that in which it is computed.

    The files' type is the one that its config.json names, else that of its first tensor (as `dtype="auto"` of
    transformers has it), and that of most values in a file without config. Raises ModelError where files are missing,
    damaged or of other types.
    """
    return _files(locate_component(root, "text_encoder", spec.name if spec else "")).types


def computing_type(stored: torch.dtype, width: int) -> torch.dtype:
    """The type in which a text encoder of this width (d_model) is computed whose files are in `stored`.

    bf16 for files in fp8, and in fp32 of an encoder at least 1024 wide, as the published ones are; else the files' own.
    The repositories of Wan2.1 in diffusers' layout hold UMT5-XXL in fp32, 21.2 GiB. Its authors' own release is in bf16
    (models_t5_umt5-xxl-enc-bf16.pth), and so is diffusers' documented use of those repositories (`torch_dtype` in the
    examples of pipeline_wan_i2v.py). Values differ from those of fp32 by bf16's rounding.
    """
    if stored.itemsize == 1:
        return torch.bfloat16
    return torch.bfloat16 if stored == torch.float32 and width >= _LARGE else stored


def clean_prompt(prompt: str) -> str:
    """The text that is encoded for `prompt`: HTML entities resolved, white space single; ftfy applied if installed."""
    return prompt_clean(prompt)


@torch.no_grad()
def encode_prompt(encoder: TextEncoder, prompt: str) -> Float[Tensor, "tokens dim"]:
    """UMT5's last hidden state over the prompt's true length (at most 512, its end token included).

    The encoder runs on the padded 512 tokens, as in diffusers' pipeline, so that the values are equal to the bit.
    """
    inputs = encoder.tokenizer(
        clean_prompt(prompt), padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt"
    )
    tokens, mask = inputs.input_ids.to(encoder.model.device), inputs.attention_mask.to(encoder.model.device)
    length = int(inputs.attention_mask.sum())
    if length == TEXT_TOKENS:
        _LOG.warning("prompt reaches the limit of %d tokens, what goes beyond is cut: %.60s...", TEXT_TOKENS, prompt)
    return encoder.model(tokens, mask).last_hidden_state[0, :length]


@dataclass(frozen=True)
class _Files:
    """A UMT5 in its files: `types` are theirs and that of the computation, `place` tells where a parameter lies."""

    config: UMT5Config
    tensors: Mapping[str, TensorHeader]
    types: tuple[torch.dtype, torch.dtype]
    place: Callable[[str], Place]


def _read_umt5(component: Component, device: torch.device | str) -> UMT5EncoderModel:
    files = _files(component)
    dtype = files.types[1]
    model = empty_model(lambda: UMT5EncoderModel(files.config), component.path)

    def type_of(name: str) -> torch.dtype:
        # fp16 overflows there; transformers has it in UMT5PreTrainedModel._keep_in_fp32_modules
        kept = dtype == torch.float16 and "wo" in name.split(".")
        return torch.float32 if kept else dtype

    places = {name: files.place(name) for name in model.state_dict() if name != _SAME_EMBEDDING}
    state = read_component(model, (files.tensors, places), type_of, device, component.path)
    model.load_state_dict(state, strict=False, assign=True)
    model.set_input_embeddings(model.shared)
    return model.eval().requires_grad_(False)


def _files(component: Component) -> _Files:
    if component.found is not None:
        return _files_without_config(component.path, component.found)
    config, tensors = _text_config(component.path), read_headers(tensor_files(component.path))
    return _Files(config, tensors, _text_types(component.path, config, tensors), _in_transformers(tensors))


def _files_without_config(path: Path, found: FoundComponent) -> _Files:
    """The configuration is that of its width; its vocabulary is counted."""
    place = umt5_in_original if found.names == "original" else _in_transformers(found.tensors)
    vocabulary, width = found.tensors[place(_EMBEDDING).name].shape
    sizes = UMT5_XXL if width == UMT5_XXL["d_model"] else tiny.TEXT_ENCODER
    config = UMT5Config(**sizes | {"vocab_size": vocabulary})
    stored = stored_type(found.tensors, path)
    return _Files(config, found.tensors, (stored, computing_type(stored, width)), place)


def _in_transformers(tensors: Mapping[str, TensorHeader]) -> Callable[[str], Place]:
    """One tensor has two names; files have either, or both."""
    other = {} if _EMBEDDING in tensors else {_EMBEDDING: _SAME_EMBEDDING}
    return lambda name: Place(other.get(name, name))


def _text_types(
    folder: Path, config: UMT5Config, headers: Mapping[str, TensorHeader]
) -> tuple[torch.dtype, torch.dtype]:
    found = {header.dtype: TORCH_TYPES.get(header.dtype) for header in headers.values()}
    stored: torch.dtype | None = config.dtype or next(iter(found.values()), None)
    if stored is None or not {stored, *found.values()} <= set(_COMPUTED):
        what = f"its type ({', '.join(found)}; config.json: {config.dtype}) is none that Longtake computes in"
        remedy = "give a text encoder in fp32, bf16 or fp16"
        raise ModelError(Problem(what, str(folder), remedy, code="encoder-type-unsupported"))
    return stored, computing_type(stored, config.d_model)


def _text_config(folder: Path) -> UMT5Config:
    try:
        return UMT5Config.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        raise unreadable(folder, error) from error
