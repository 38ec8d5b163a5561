"""The tiny variants as diffusers folders: random ones from a seed, or the trained ones that come with the package."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

from longtake import __version__
from longtake.errors import ModelError, Problem
from longtake.models.wan import variants
from longtake.models.wan.variants import WanVariant, variant

WEIGHTS = Path(__file__).parent / "weights"
"""Trained weights in the package: one folder a shared component, and `<variant>/transformer`."""

TEXT_COMPONENTS = ("text_encoder", "tokenizer", "scheduler")
IMAGE_COMPONENTS = ("image_encoder", "image_processor")

VAE_2_1: dict[str, Any] = {"base_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 1, "z_dim": 16}
VAE_2_2: dict[str, Any] = {
    "base_dim": 8,
    "decoder_base_dim": 8,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 1,
    "z_dim": 48,
    "is_residual": True,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "scale_factor_spatial": 16,
    "latents_mean": [round(-0.5 + channel / 48, 4) for channel in range(48)],
    "latents_std": [round(0.5 + channel / 48, 4) for channel in range(48)],
}
TEXT_ENCODER: dict[str, Any] = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
IMAGE_ENCODER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
    "hidden_act": "gelu",
}
_SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")
_CLASSES = {
    "image_encoder": ("transformers", "CLIPVisionModel"),
    "image_processor": ("transformers", "CLIPImageProcessor"),
    "scheduler": ("diffusers", "UniPCMultistepScheduler"),
    "text_encoder": ("transformers", "UMT5EncoderModel"),
    "tokenizer": ("transformers", "PreTrainedTokenizerFast"),
    "transformer": ("diffusers", "WanTransformer3DModel"),
    "transformer_2": ("diffusers", "WanTransformer3DModel"),
    "vae": ("diffusers", "AutoencoderKLWan"),
}


def bundled(name: str) -> Path:
    """The diffusers folder of the tiny variant `name`, with the trained weights where the package has them.

    It lies in a cache of the user's ($XDG_CACHE_HOME or ~/.cache) and is made at the first call after a change of the
    package. Raises ModelError where `name` is no tiny variant.
    """
    home = os.environ.get("XDG_CACHE_HOME")
    return assemble(name, WEIGHTS, (Path(home) if home else Path.home() / ".cache") / "longtake")


def assemble(name: str, weights: Path, cache: Path) -> Path:
    """The folder `cache/<version and fingerprint>/<name>`: links into `weights`, or random weights where those lack.

    A folder appears whole or not at all, so that processes that start together cannot see half of one.
    """
    chosen = _tiny(name)
    root = cache / f"{__version__}-{_content(weights)}" / name
    if _is_whole(root, chosen):
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{name}-") as scratch:
        made = Path(scratch) / name
        if _is_trained(weights, chosen):
            _link(weights, made, chosen)
        else:
            build_tiny(name, made)
        _publish(made, root, chosen)
    return root


def build_tiny(name: str, folder: Path, seed: int = 0) -> Path:
    """Writes `folder` as a diffusers pipeline of the tiny variant `name` with random weights, and returns it.

    A component's weights depend on `seed` and its own name only: variants of one seed share their encoders. The
    global random state of torch is left alone. Raises ModelError where `name` is no tiny variant.
    """
    chosen = _tiny(name)
    _write_vae(folder / "vae", chosen.vae, seed)
    _write_text_components(folder, chosen.shift, seed)
    if chosen.has_image_encoder:
        _write_image_components(folder, seed)
    for component in chosen.spec.experts:
        transformer = _seeded(lambda: WanTransformer3DModel(**chosen.transformer_config), component, seed)
        transformer.save_pretrained(folder / component)
    _write_model_index(folder, chosen)
    return folder


def write_shared_components(weights: Path, vae: Path) -> None:
    """Writes into `weights` what the trained variants share: a copy of the folder `vae`, and the seeded encoders."""
    if vae.resolve() != (weights / "vae").resolve():
        shutil.copytree(vae, weights / "vae", dirs_exist_ok=True)
    _write_text_components(weights, variant("tiny-i2v").shift, seed=0)
    _write_image_components(weights, seed=0)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token a byte of UTF-8 after pad 0, end 1 and unknown 2: every text comes back from it."""
    tokens = [*_SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def _tiny(name: str) -> WanVariant:
    chosen = variant(name)
    if chosen.hub_id:
        names = ", ".join(other for other, row in variants.VARIANTS.items() if not row.hub_id)
        what = f"{name!r} does not come with the package"
        raise ModelError(Problem(what, "model.name", f"choose one of {names}", code="model-not-bundled"))
    return chosen


def _components(chosen: WanVariant) -> tuple[str, ...]:
    images = IMAGE_COMPONENTS if chosen.has_image_encoder else ()
    return ("vae", *TEXT_COMPONENTS, *images, *chosen.spec.experts)


def _seeded(make: Callable[[], Any], component: str, seed: int) -> Any:
    digest = hashlib.sha256(f"{component} {seed}".encode()).digest()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int.from_bytes(digest[:7], "big"))
        return make()


def _write_vae(folder: Path, generation: str, seed: int) -> None:
    config = VAE_2_2 if generation == "2.2" else VAE_2_1
    _seeded(lambda: AutoencoderKLWan(**config), f"vae {generation}", seed).save_pretrained(folder)


def _write_text_components(folder: Path, shift: float, seed: int) -> None:
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    config = UMT5Config(vocab_size=len(tokenizer), **TEXT_ENCODER)
    _seeded(lambda: UMT5EncoderModel(config), "text_encoder", seed).save_pretrained(folder / "text_encoder")
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    scheduler.save_pretrained(folder / "scheduler")


def _write_image_components(folder: Path, seed: int) -> None:
    config = CLIPVisionConfig(**IMAGE_ENCODER)
    _seeded(lambda: CLIPVisionModel(config), "image_encoder", seed).save_pretrained(folder / "image_encoder")
    side = config.image_size
    processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    processor.save_pretrained(folder / "image_processor")


def _write_model_index(folder: Path, chosen: WanVariant) -> None:
    conditioned = chosen.spec.task in ("i2v", "flf2v")
    index: dict[str, Any] = {
        "_class_name": "WanImageToVideoPipeline" if conditioned else "WanPipeline",
        "_diffusers_version": version("diffusers"),
        "boundary_ratio": chosen.spec.boundary_ratio,
        "expand_timesteps": chosen.spec.expand_timesteps,
        "transformer_2": [None, None],
        **({name: [None, None] for name in IMAGE_COMPONENTS} if conditioned else {}),
        **{name: list(_CLASSES[name]) for name in _components(chosen)},
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _content(weights: Path) -> str:
    """What `weights` and the code of the random ones are, and where: links point to a place."""
    digest = hashlib.sha256(str(weights.resolve()).encode())
    stored = (file for file in weights.rglob("*") if file.is_file())
    for file in (Path(__file__), Path(variants.__file__), *sorted(stored)):
        digest.update(f"{file.name} {file.stat().st_size} ".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _source(weights: Path, chosen: WanVariant, component: str) -> Path:
    return weights / chosen.name / component if component in chosen.spec.experts else weights / component


def _is_trained(weights: Path, chosen: WanVariant) -> bool:
    return all(_source(weights, chosen, component).is_dir() for component in _components(chosen))


def _is_whole(root: Path, chosen: WanVariant) -> bool:
    """A crash of the machine can leave empty files behind the rename, a cleaner of caches can leave gaps."""
    if not (root / "model_index.json").is_file():
        return False
    folders = [root / component for component in _components(chosen)]
    filled = all(folder.is_dir() and any(folder.iterdir()) for folder in folders)
    return filled and all(file.stat().st_size for folder in folders for file in folder.iterdir() if file.is_file())


def _link(weights: Path, folder: Path, chosen: WanVariant) -> None:
    folder.mkdir()
    for component in _components(chosen):
        source = _source(weights, chosen, component).resolve()
        try:
            (folder / component).symlink_to(source, target_is_directory=True)
        except OSError:  # a file system or a Windows account without links
            shutil.copytree(source, folder / component)
    _write_model_index(folder, chosen)


def _publish(made: Path, root: Path, chosen: WanVariant) -> None:
    if root.exists() and not _is_whole(root, chosen):
        shutil.rmtree(root)
    try:
        made.rename(root)
    except OSError:
        if not _is_whole(root, chosen):  # else another process was first, with the same content
            raise
