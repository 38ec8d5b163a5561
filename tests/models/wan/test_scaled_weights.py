"""Transformers in fp8 with scales: dequantised as they are read, in every layout, and never taken for plain bytes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from longtake.config.schema import ModelConfig
from longtake.errors import ModelError
from longtake.models.wan.detection import inspect
from longtake.models.wan.keys import to_diffusers, to_original
from longtake.models.wan.tiny import bundled
from longtake.models.wan.variants import KEEP_FP32, variant
from longtake.models.wan.weights import Loading, ModelFiles, load_transformer, locate, weight_files
from longtake.models.weight_files import read_weights
from releases import FP8, scaled, unscaled, weights_of, write_comfyui

CPU = torch.device("cpu")
NAMES = ("tiny-t2v", "tiny-i2v", "tiny-flf2v", "tiny-ti2v")
SUFFIXES = (".scale_weight", ".weight_scale")


def original(root: Path) -> dict[str, Tensor]:
    """The transformer under the original names, its zeros and ones replaced: every tensor is told from the others."""
    draw = torch.Generator().manual_seed(0)
    state = weights_of(root, "transformer")
    return {to_original(name): torch.randn(value.shape, generator=draw) * 0.1 for name, value in state.items()}


def files(name: str, path: Path) -> ModelFiles:
    return ModelFiles(variant(name), {"transformer": path}, None)


def final(name: str, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if any(part in KEEP_FP32 for part in name.split(".")) else dtype


def expected(written: dict[str, Tensor], suffix: str, dtype: torch.dtype, prefix: str = "") -> dict[str, Tensor]:
    named = {to_diffusers(name.removeprefix(prefix)): value for name, value in unscaled(written, suffix).items()}
    return {name: value.to(final(name, dtype)) for name, value in named.items()}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model."])
@pytest.mark.parametrize("name", NAMES)
def test_a_scaled_file_gives_the_products_rounded_once(
    tiny_root: Callable[[str], Path], tmp_path: Path, name: str, prefix: str, suffix: str
) -> None:
    path, written = tmp_path / "model.safetensors", scaled(original(tiny_root(name)), prefix, suffix)
    save_file(written, path)
    loaded = load_transformer(files(name, path), "transformer", torch.bfloat16, CPU).state_dict()
    dequantised = expected(written, suffix, torch.bfloat16, prefix)
    assert loaded.keys() == dequantised.keys() == variant(name).parameter_shapes().keys()
    for key, tensor in loaded.items():
        assert tensor.dtype == dequantised[key].dtype, key
        assert torch.equal(tensor, dequantised[key]), key
    embedding = "condition_embedder.image_embedder.pos_embed"
    assert (embedding in loaded) == (name == "tiny-flf2v")
    assert embedding not in loaded or loaded[embedding].any()
    facts = inspect(path)
    assert (facts["kind"], facts["dtype"]) == ("transformer", "fp8_e4m3 with scales")
    assert (facts["layout"], facts["parameters"]) == ("comfyui" if prefix else "original", variant(name).parameters)


def test_diffusers_names_with_scales(tiny_root: Callable[[str], Path], tmp_path: Path) -> None:
    written = scaled({to_diffusers(name): value for name, value in original(tiny_root("tiny-t2v")).items()})
    save_file(written, tmp_path / "model.safetensors")
    loaded = load_transformer(files("tiny-t2v", tmp_path / "model.safetensors"), "transformer", torch.float32, CPU)
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in unscaled(written).items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, FP8, torch.float8_e5m2])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_every_plain_type_is_read(
    tiny_root: Callable[[str], Path], tmp_path: Path, prefix: str, dtype: torch.dtype
) -> None:
    path = tmp_path / "model.safetensors"
    state = {prefix + name: value.to(dtype) for name, value in original(tiny_root("tiny-flf2v")).items()}
    save_file(state, path)
    loaded = load_transformer(files("tiny-flf2v", path), "transformer", torch.bfloat16, CPU).state_dict()
    assert len(loaded) == len(state)
    for name, value in state.items():
        key = to_diffusers(name.removeprefix(prefix))
        assert torch.equal(loaded[key], value.to(torch.float32).to(final(key, torch.bfloat16))), name
    assert (
        inspect(path)["dtype"]
        == {
            torch.bfloat16: "bf16",
            torch.float16: "fp16",
            torch.float32: "fp32",
            FP8: "fp8_e4m3",
            torch.float8_e5m2: "fp8_e5m2",
        }[dtype]
    )


@pytest.mark.parametrize("shape", ["row", "rows and one", "blocks"])
@pytest.mark.parametrize("values", [2**22, 1000, 7])
def test_scales_of_rows_and_of_parts_of_rows(
    tiny_root: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shape: str,
    values: int,
) -> None:
    """However the values are cut into the pieces that are multiplied at a time."""
    monkeypatch.setattr("longtake.models.weight_files._SCALED_VALUES", values)
    state = original(tiny_root("tiny-t2v"))
    weight = state["blocks.1.self_attn.q.weight"].to(FP8)
    parts = {"row": (160,), "rows and one": (160, 1), "blocks": (160, 5, 1)}[shape]
    scale = torch.rand(parts, generator=torch.Generator().manual_seed(1)) + 0.5
    quantised = {"blocks.1.self_attn.q.weight": weight, "blocks.1.self_attn.q.scale_weight": scale}
    save_file(state | quantised, tmp_path / "model.safetensors")
    chosen = files("tiny-t2v", tmp_path / "model.safetensors")
    only = Loading(lambda name: CPU if name == "blocks.1.attn1.to_q.weight" else None)
    loaded = load_transformer(chosen, "transformer", torch.bfloat16, CPU, only)
    product = (weight.float().view(160, -1, 32) * scale.view(160, -1, 1)).view(160, 160)
    assert torch.equal(loaded.blocks[1].attn1.to_q.weight, product.bfloat16())


def test_parts_of_scaled_weights_are_read_as_sharded_engines_do(
    tiny_root: Callable[[str], Path], tmp_path: Path
) -> None:
    """From any value on, whatever row it is in: `training.model` reads so under FSDP2 and ZeRO."""
    state = original(tiny_root("tiny-t2v"))
    name, scale = "blocks.0.ffn.0", torch.linspace(0.5, 2, 640)
    weight = state[f"{name}.weight"].to(FP8)
    save_file(state | {f"{name}.weight": weight, f"{name}.scale_weight": scale}, tmp_path / "model.safetensors")
    place = weight_files(files("tiny-t2v", tmp_path / "model.safetensors"), "transformer")[
        "blocks.0.ffn.net.0.proj.weight"
    ]
    product = (weight.float() * scale[:, None]).bfloat16().view(-1)
    for first, count in ((0, 1), (159, 2), (1000, 5000), (160 * 639 + 3, 157), (320, 160)):
        read = read_weights(
            {"part": place.part(first, count)},
            lambda _name, count=count: torch.empty(count, dtype=torch.bfloat16),  # type: ignore[misc]
            lambda _name, tensor: tensor,
        )
        assert torch.equal(read["part"], product[first : first + count]), first
    assert place.part(5, 100).part(3, 2) == place.part(8, 2)


def test_scaled_weights_are_not_in_the_file_as_they_are(tiny_root: Callable[[str], Path], tmp_path: Path) -> None:
    state = original(tiny_root("tiny-t2v"))
    state = {name: value.bfloat16() for name, value in state.items()}
    save_file(state | {"blocks.0.ffn.0.scale_weight": torch.tensor(2.0)}, tmp_path / "model.safetensors")
    found = weight_files(files("tiny-t2v", tmp_path / "model.safetensors"), "transformer")
    weight = found["blocks.0.ffn.net.0.proj.weight"]
    assert weight.dtype == torch.bfloat16
    assert not weight.holds(torch.bfloat16)
    assert found["blocks.0.ffn.net.2.weight"].holds(torch.bfloat16)
    assert replace(weight, scale=None).holds(torch.bfloat16)
    loaded = load_transformer(files("tiny-t2v", tmp_path / "model.safetensors"), "transformer", torch.bfloat16, CPU)
    assert torch.equal(loaded.blocks[0].ffn.net[0].proj.weight, state["blocks.0.ffn.0.weight"] * 2)


def test_a_comfyui_folder_is_a_whole_model(tiny_root: Callable[[str], Path], tmp_path: Path) -> None:
    path = write_comfyui(tmp_path / "models", tiny_root("tiny-i2v"))
    found = locate(ModelConfig(path=str(path)), bundled, print)
    assert found == ModelFiles(variant("tiny-i2v"), {"transformer": path}, tmp_path / "models")
    elsewhere = tmp_path / "model.safetensors"
    path.rename(elsewhere)
    assert locate(ModelConfig(path=str(elsewhere)), bundled, print).root is None
    given = ModelConfig(path=str(elsewhere), components=str(tmp_path / "models"))
    assert locate(given, bundled, print).root == tmp_path / "models"


def _lacking(state: dict[str, Tensor]) -> None:
    del state["blocks.2.ffn.2.scale_weight"]


def _alone(state: dict[str, Tensor]) -> None:
    state["blocks.2.nothing.scale_weight"] = torch.ones(())


def _misshapen(state: dict[str, Tensor]) -> None:
    state["blocks.2.ffn.2.scale_weight"] = torch.ones(7)


def _of_integers(state: dict[str, Tensor]) -> None:
    state["blocks.2.ffn.2.scale_weight"] = torch.ones(160, 20, dtype=torch.uint8)


def _int8(state: dict[str, Tensor]) -> None:
    state["blocks.2.ffn.2.weight"] = torch.ones(160, 640, dtype=torch.int8)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_lacking, r"1 of its fp8 weights have no scale: blocks\.2\.ffn\.2\.weight"),
        (_alone, r"there is a blocks\.2\.nothing\.scale_weight and no blocks\.2\.nothing\.weight"),
        (_misshapen, r"scale_weight is F32 \[7\] for a \[160, 640\] weight"),
        (_of_integers, r"scale_weight is U8 \[160, 20\]"),
        (_int8, r"blocks\.2\.ffn\.net\.2\.weight is of type I8"),
    ],
)
def test_other_quantisations_are_refused_in_one_line(
    tiny_root: Callable[[str], Path], tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], reason: str
) -> None:
    state = scaled(original(tiny_root("tiny-t2v")))
    change(state)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=reason) as refused:
        load_transformer(files("tiny-t2v", tmp_path / "model.safetensors"), "transformer", torch.bfloat16, CPU)
    assert len(str(refused.value).splitlines()) == 1


def test_a_file_that_loads_again_is_what_was_read(tiny_root: Callable[[str], Path], tmp_path: Path) -> None:
    """The round trip of the helper itself: a scaled file differs from its source by fp8's rounding alone."""
    state = original(tiny_root("tiny-t2v"))
    save_file(scaled(state), tmp_path / "model.safetensors")
    for name, value in unscaled(load_file(tmp_path / "model.safetensors")).items():
        assert (value - state[name]).abs().max() <= state[name].abs().max() / 28, name  # 3 bits of mantissa
