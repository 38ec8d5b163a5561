"""The encoders on `meta`: sizes and types of the published files, and of the tiny models' own folders."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from longtake.models.wan import encoders as real
from longtake.models.wan.tiny import build_tokenizer
from longtake.models.wan.variants import VARIANTS, variant
from longtake.planner import encoders
from longtake.planner.encoders import META

CPU = torch.device("cpu")
I2V, T2V, TI2V = (variant(name) for name in ("wan2.1-i2v-14b-480p", "wan2.1-t2v-14b", "wan2.2-ti2v-5b"))
TINY = [name for name in VARIANTS if name.startswith("tiny")]


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("model", "parameters", "file_bytes", "itemsize"),
    [
        # bytes of vae/*.safetensors and text_encoder/*.safetensors in the repositories; CLIP's file is half as large,
        # in 16 bits, and has a projection of 1280 x 1024 values more, that the vision tower leaves out
        (encoders.vae(I2V), 126_892_531, 507_591_892, 4),
        (encoders.vae(TI2V), 704_688_668, 2_818_777_808, 4),
        # Wan2.1's files are in fp32, 22,723,671,744 bytes, and are computed in bf16
        (encoders.text_encoder(I2V), 5_680_910_336, 22_723_671_744 // 2, 2),
        (encoders.text_encoder(TI2V), 5_680_910_336, 11_361_851_208, 2),
        (encoders.image_encoder(I2V), 630_766_080, 2 * (1_264_217_760 - 2 * 1280 * 1024), 4),
    ],
)
def test_the_encoders_have_the_values_and_the_types_of_the_published_files(
    model: nn.Module, parameters: int, file_bytes: int, itemsize: int
) -> None:
    assert count(model) == parameters
    nbytes = sum(parameter.nbytes for parameter in model.parameters())
    assert nbytes == itemsize * parameters
    assert 0 < file_bytes - nbytes < 2**18, "what is left is headers"


@pytest.mark.parametrize("name", VARIANTS)
def test_the_plan_computes_text_in_the_type_that_the_loader_takes(name: str) -> None:
    assert encoders.computing_type is real.computing_type
    chosen = variant(name)
    stored = torch.bfloat16 if "Wan2.2" in chosen.hub_id else torch.float32
    model = encoders.text_encoder(chosen)
    assert model.dtype == real.computing_type(stored, model.config.d_model)
    assert model.dtype == (torch.bfloat16 if chosen.hub_id else torch.float32)


def test_umt5s_values_are_those_of_its_layers_added_up() -> None:
    width, inner = 4096, 10240
    layer = 4 * width * 64 * 64 + 3 * width * inner + 2 * width + 32 * 64
    assert count(encoders.text_encoder(I2V)) == 256384 * width + 24 * layer + width


@pytest.mark.parametrize("name", TINY)
def test_tiny_models_have_the_encoders_of_their_own_folder(name: str, tiny_root: Callable[[str], Path]) -> None:
    root, chosen = tiny_root(name), variant(name)
    assert count(encoders.vae(chosen)) == count(real.load_vae(root, CPU))
    assert count(encoders.text_encoder(chosen)) == count(real.load_text_encoder(root, CPU).model)
    assert encoders.text_encoder(chosen).config.vocab_size == len(build_tokenizer())
    found = encoders.image_encoder(chosen)
    assert (found is not None) == chosen.has_image_encoder
    assert found is None or count(found) == count(real.load_image_encoder(root, CPU).model)


def test_the_encoders_causal_cache_has_1404_values_a_pixel() -> None:
    """6 of the video's own, 768 of the first level's, and so on; at 832x480 in fp32 that is 2.09 GiB."""
    vae, (height, width) = encoders.vae(T2V), (64, 96)
    cache: list[Any] = [None] * vae._cached_conv_counts["encoder"]
    for frames in (1, 4, 4):
        vae.encoder(torch.empty(1, 3, frames, height, width, device=META), feat_cache=cache, feat_idx=[0])
    assert sum(kept.numel() for kept in cache if kept is not None) == 1404 * height * width
