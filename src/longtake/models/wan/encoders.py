# ruff: noqa: F722
"""The frozen encoders around a Wan transformer: VAE, UMT5 and CLIP, each loaded, used and released by the caller."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from longtake.errors import ModelError, Problem
from longtake.models.wan.headers import TensorHeader, read_headers, tensor_files
from longtake.models.wan.signature import differences
from longtake.models.weight_files import WeightFile, read_weights

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8

TEXT_TOKENS = 512
"""Length of a padded prompt: diffusers finds the image tokens by `shape[1] - 512`, so no other value works."""

_LARGE = 1024
"""The width from which on a text encoder of fp32 files is computed in bf16: UMT5-XXL has 4096, a tiny model's 64."""
_TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_EMBEDDING, _SAME_EMBEDDING = "shared.weight", "encoder.embed_tokens.weight"
_MIB = 2**20
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextEncoder:
    """A tokenizer and the UMT5 that reads its tokens."""

    tokenizer: Any
    model: UMT5EncoderModel


@dataclass(frozen=True)
class ImageEncoder:
    """How images become CLIP's pixels, and CLIP's vision tower."""

    processor: CLIPImageProcessorPil
    model: CLIPVisionModel


def load_vae(root: Path, device: torch.device | str) -> AutoencoderKLWan:
    """The VAE of the diffusers folder `root` in fp32; raises ModelError where it is missing or damaged."""
    return _load(AutoencoderKLWan, root / "vae", device, torch_dtype=torch.float32)


def normalise_pixels(
    pixels: UInt8[Tensor, "*shape"] | Float[Tensor, "*shape"],
) -> Float[Tensor, "*shape"]:
    """Pixels of 0..255 as fp32 in [-1, 1], rounded as diffusers' VideoProcessor does; floats pass as they are."""
    return pixels.float() / 255 * 2 - 1 if pixels.dtype == torch.uint8 else pixels.float()


@torch.no_grad()
def encode_video(
    vae: AutoencoderKLWan, video: Float[Tensor, "batch 3 frames height width"]
) -> Float[Tensor, "batch channels latent_frames latent_height latent_width"]:
    """Normalised latents, (z - mean) / std per channel, of a video in [-1, 1]: the posterior's mean, nothing drawn."""
    latents = vae.encode(video.to(vae.device, vae.dtype)).latent_dist.mode()
    mean, inverse_std = _latent_statistics(vae, latents)
    return (latents - mean) * inverse_std


@torch.no_grad()
def decode_latents(
    vae: AutoencoderKLWan, latents: Float[Tensor, "batch channels latent_frames latent_height latent_width"]
) -> Float[Tensor, "batch 3 frames height width"]:
    """The video in [-1, 1] of normalised latents."""
    latents = latents.to(vae.device, vae.dtype)
    mean, inverse_std = _latent_statistics(vae, latents)
    return vae.decode(latents / inverse_std + mean).sample


def load_text_encoder(root: Path, device: torch.device | str) -> TextEncoder:
    """Tokenizer and UMT5 of the diffusers folder `root`, computing in what `text_encoder_types` says.

    Tensors are read one after the other, to their final type on `device`: beyond the weights this takes one staging
    buffer of host memory. Raises ModelError as `load_vae`.
    """
    model = _read_umt5(root / "text_encoder", device)
    folder = _component(root / "tokenizer", "tokenizer_config.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise _unreadable(folder, error) from error
    return TextEncoder(tokenizer, model)


def text_encoder_types(root: Path) -> tuple[torch.dtype, torch.dtype]:
    """The type of the text encoder's files in the diffusers folder `root`, and that in which it is computed.

    The files' type is the one that its config.json names, else that of its first tensor (as `dtype="auto"` of
    transformers has it). Raises ModelError where files are missing, damaged or quantised.
    """
    folder = root / "text_encoder"
    return _text_types(folder, _text_config(folder), read_headers(tensor_files(folder)))


def computing_type(stored: torch.dtype, width: int) -> torch.dtype:
    """The type in which a text encoder of this width (d_model) is computed whose files are in `stored`.

    bf16 for files in fp32 of an encoder at least 1024 wide, which the published ones are; else the files' own type.
    The repositories of Wan2.1 in diffusers' layout hold UMT5-XXL in fp32, 21.2 GiB. Its authors' own release is in bf16
    (models_t5_umt5-xxl-enc-bf16.pth), and so is diffusers' documented use of those repositories (`torch_dtype` in the
    examples of pipeline_wan_i2v.py). Values differ from those of fp32 by bf16's rounding.
    """
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


def load_image_encoder(root: Path, device: torch.device | str) -> ImageEncoder:
    """CLIP's vision tower of the diffusers folder `root` in fp32; raises ModelError as `load_vae`."""
    model = _load(CLIPVisionModel, root / "image_encoder", device, dtype=torch.float32)
    folder = _component(root / "image_processor", "preprocessor_config.json")
    try:
        processor = CLIPImageProcessorPil.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise _unreadable(folder, error) from error
    return ImageEncoder(processor, model)


@torch.no_grad()
def encode_image(encoder: ImageEncoder, image: UInt8[Tensor, "3 height width"]) -> Float[Tensor, "tokens dim"]:
    """CLIP's penultimate hidden state, class token first. Pillow resizes, whatever the device."""
    pixels = encoder.processor(
        image.cpu().numpy(), input_data_format="channels_first", return_tensors="pt"
    ).pixel_values
    hidden_states = encoder.model(pixels.to(encoder.model.device), output_hidden_states=True).hidden_states
    return hidden_states[-2][0]


def release() -> None:
    """Gives what the last tensors left in CUDA's allocator back to the driver: the next stage wants other sizes.

    Nothing is collected: encoders and pipelines refer to nothing in a circle, and end with the last name for them.
    """
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def fingerprint(folder: Path) -> str:
    """The identity of a component, whatever its folder is called: sha256 in hex.

    It covers JSON files and vocabularies whole and, of each safetensors file, the header (every name, type and shape),
    the size, and the first and last MiB of data. Raises ModelError where the folder has none of these files.
    """
    files = sorted(file for file in folder.glob("*") if file.suffix in (".json", ".model", ".txt", ".safetensors"))
    if not files:
        raise ModelError(Problem("there is no component here", str(folder), "check the path of the model"))
    digest = hashlib.sha256()
    for file in files:
        part = _safetensors_identity(file) if file.suffix == ".safetensors" else file.read_bytes()
        digest.update(f"{file.name} {len(part)} ".encode())
        digest.update(part)
    return digest.hexdigest()


def _safetensors_identity(file: Path) -> bytes:
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = stream.read(8)
        header_size = int.from_bytes(length, "little")
        if header_size > size - 8:
            raise ModelError(Problem("the file is damaged or cut off", str(file), "download it again"))
        start = stream.read(header_size + _MIB)
        stream.seek(max(size - _MIB, 0))
        return str(size).encode() + length + start + stream.read()


def _read_umt5(folder: Path, device: torch.device | str) -> UMT5EncoderModel:
    config, headers = _text_config(folder), read_headers(tensor_files(folder))
    _, dtype = _text_types(folder, config, headers)
    try:
        with torch.device("meta"):
            model = UMT5EncoderModel(config)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise _unreadable(folder, error) from error
    # one tensor under two names; files have either name, or both
    named = {_EMBEDDING: headers[_SAME_EMBEDDING]} | headers if _SAME_EMBEDDING in headers else headers
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items() if name != _SAME_EMBEDDING}
    wanted = {name: named[name] for name in shapes if name in named}
    if problems := differences({name: header.shape for name, header in wanted.items()}, shapes, folder):
        raise ModelError(problems)

    def empty(name: str) -> Tensor:
        # fp16 overflows there; transformers has it in UMT5PreTrainedModel._keep_in_fp32_modules
        kept = dtype == torch.float16 and "wo" in name.split(".")
        return torch.empty(shapes[name], dtype=torch.float32 if kept else dtype, device=device)

    files = {name: WeightFile(h.file, h.start, h.nbytes, _TYPES[h.dtype]) for name, h in wanted.items()}
    model.load_state_dict(read_weights(files, empty, lambda _name, tensor: tensor), strict=False, assign=True)
    model.set_input_embeddings(model.shared)
    return model.eval().requires_grad_(False)


def _text_types(
    folder: Path, config: UMT5Config, headers: Mapping[str, TensorHeader]
) -> tuple[torch.dtype, torch.dtype]:
    found = {header.dtype: _TYPES.get(header.dtype) for header in headers.values()}
    stored: torch.dtype | None = config.dtype or next(iter(found.values()), None)
    if None in found.values() or stored is None or stored not in _TYPES.values():
        what = f"its type ({', '.join(found)}; config.json: {config.dtype}) is none that Longtake computes in"
        raise ModelError(Problem(what, str(folder), "give a text encoder in fp32, bf16 or fp16"))
    return stored, computing_type(stored, config.d_model)


def _text_config(folder: Path) -> UMT5Config:
    _component(folder, "config.json")
    try:
        return UMT5Config.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        raise _unreadable(folder, error) from error


def _latent_statistics(vae: AutoencoderKLWan, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and 1 / std, [1, channels, 1, 1, 1]; the reciprocal first, as the pipelines do, for the same rounding."""
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1).to(like)
    return mean, (1.0 / torch.tensor(vae.config.latents_std)).view(1, -1, 1, 1, 1).to(like)


def _load(kind: Any, folder: Path, device: torch.device | str, **options: Any) -> Any:
    _component(folder, "config.json")
    try:
        model, loading = kind.from_pretrained(
            str(folder), use_safetensors=True, local_files_only=True, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise _unreadable(folder, error) from error
    # a tensor that the file lacks would be drawn at random, with a log line only
    if missing := sorted(loading["missing_keys"]):
        lacking = f"{len(missing)} tensors are missing, the first is {missing[0]}"
        raise ModelError(Problem(lacking, str(folder), "download the component again"))
    return model.eval().requires_grad_(False).to(device)


def _component(folder: Path, needed: str) -> Path:
    if not (folder / needed).is_file():
        remedy = "give a diffusers folder, or one that has it in model.components"
        raise ModelError(Problem(f"there is no {folder.name} ({needed})", str(folder.parent), remedy))
    return folder


def _unreadable(folder: Path, error: Exception) -> ModelError:
    return ModelError(Problem(f"cannot be loaded: {error}", str(folder), "download the component again"))
