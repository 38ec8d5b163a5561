"""VAE, UMT5 and CLIP from original releases and ComfyUI's folders: found by their tensors, loaded as written."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from longtake.errors import ModelError
from longtake.models.wan import encoders
from longtake.models.wan.component_names import clip_in_open_clip
from longtake.models.wan.variants import variant
from releases import (
    FP8,
    VAES,
    in_layout,
    original_clip,
    original_umt5,
    original_vae,
    scaled,
    sentencepiece_model,
    unscaled,
    weights_of,
)

SPEC = variant("tiny-i2v").spec
LOADERS = (encoders.load_vae, encoders.load_text_encoder, encoders.load_image_encoder)


@pytest.fixture(scope="module")
def root(tiny_root: Callable[[str], Path]) -> Path:
    return tiny_root("tiny-i2v")


def assert_equal(model: nn.Module, expected: dict[str, Tensor], dtype: torch.dtype | None = None) -> None:
    held = model.state_dict()
    held.pop("encoder.embed_tokens.weight", None)
    assert held.keys() == expected.keys()
    for name, tensor in held.items():
        assert tensor.dtype == (dtype or expected[name].dtype), name
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name
    assert not any(tensor.is_meta or tensor.requires_grad for tensor in (*model.parameters(), *model.buffers()))
    assert not model.training


def umt5(root: Path) -> dict[str, Tensor]:
    return {name: value for name, value in weights_of(root, "text_encoder").items() if "embed_tokens" not in name}


@pytest.mark.parametrize("name", ["tiny-i2v", "tiny-ti2v"])
@pytest.mark.parametrize("form", ["pth", "safetensors", "bf16", "prefixed", "diffusers names"])
def test_a_vaes_file_of_either_generation_gives_its_weights_and_its_latents(
    tiny_root: Callable[[str], Path], tmp_path: Path, name: str, form: str
) -> None:
    root, expected = tiny_root(name), weights_of(tiny_root(name), "vae")
    state = original_vae(root, name)
    if form == "bf16":
        state = {key: tensor.bfloat16() for key, tensor in state.items()}
        expected = {key: tensor.bfloat16().float() for key, tensor in expected.items()}
    elif form == "prefixed":
        state = {f"model.{key}": tensor for key, tensor in state.items()}
    elif form == "diffusers names":
        state = expected
    if form == "pth":
        torch.save(state, tmp_path / VAES[name])
    else:
        save_file(state, tmp_path / "wan_vae.safetensors")
    vae = encoders.load_vae(tmp_path, "cpu", variant(name).spec)
    assert_equal(vae, expected, torch.float32)
    plain = encoders.load_vae(root, "cpu")
    public = [key for key in plain.config if not key.startswith("_")]
    assert {key: vae.config[key] for key in public} == {key: plain.config[key] for key in public}
    if form == "pth":
        video = torch.rand(1, 3, 5, 32, 48, generator=torch.Generator().manual_seed(3)) * 2 - 1
        assert torch.equal(encoders.encode_video(vae, video), encoders.encode_video(plain, video))


def test_an_original_release_gives_what_its_diffusers_folder_gives(release: Path, root: Path) -> None:
    text = encoders.load_text_encoder(release, "cpu", SPEC)
    assert_equal(text.model, {name: value.bfloat16() for name, value in umt5(root).items()}, torch.bfloat16)
    assert text.model.shared.weight is text.model.encoder.embed_tokens.weight
    assert (
        text.tokenizer("a rabbit").input_ids == encoders.load_text_encoder(root, "cpu").tokenizer("a rabbit").input_ids
    )
    assert encoders.encode_prompt(text, "a rabbit").shape == (9, 64)
    clip, plain = (encoders.load_image_encoder(folder, "cpu", SPEC) for folder in (release, root))
    assert_equal(clip.model, {name: value.half() for name, value in plain.model.state_dict().items()}, torch.float32)
    pixels = torch.randint(0, 256, (3, 64, 112), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    plain.model.load_state_dict(clip.model.state_dict())  # rounded to fp16 as the file is
    assert torch.equal(encoders.encode_image(clip, pixels), encoders.encode_image(plain, pixels))


def test_a_comfyui_folder_gives_the_dequantised_weights_and_its_embedded_tokenizer(comfyui: Path, root: Path) -> None:
    file = comfyui / "text_encoders" / "umt5_xxl_fp8_e4m3fn_scaled.safetensors"
    assert encoders.text_encoder_types(comfyui, SPEC) == (FP8, torch.bfloat16)
    text = encoders.load_text_encoder(comfyui, "cpu", SPEC)
    assert_equal(text.model, {name: value.bfloat16() for name, value in unscaled(load_file(file)).items()})
    assert text.tokenizer("é").input_ids == [3 + byte for byte in "▁é".encode()] + [1]
    clip = encoders.load_image_encoder(comfyui, "cpu", SPEC)
    expected = {name: value.half() for name, value in weights_of(root, "image_encoder").items()}
    assert_equal(clip.model, expected, torch.float32)
    assert_equal(encoders.load_vae(comfyui, "cpu", SPEC), weights_of(root, "vae"), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, FP8, torch.float8_e5m2])
@pytest.mark.parametrize("names", ["original", "transformers", "transformers, other embedding"])
def test_umt5_of_every_type_and_in_either_names(root: Path, tmp_path: Path, dtype: torch.dtype, names: str) -> None:
    state = {name: value.to(dtype) for name, value in umt5(root).items()}
    written = original_umt5(root, dtype) if names == "original" else dict(state)
    if "other" in names:
        written["encoder.embed_tokens.weight"] = written.pop("shared.weight")
    save_file(written, tmp_path / "umt5-xxl-enc.safetensors")
    shutil.copy(root / "tokenizer" / "tokenizer.json", tmp_path)
    text = encoders.load_text_encoder(tmp_path, "cpu")
    for name, value in text.model.state_dict().items():
        kept = dtype == torch.float16 and "wo" in name.split(".")
        computing = torch.bfloat16 if dtype.itemsize == 1 else dtype
        assert value.dtype == (torch.float32 if kept else computing)
        assert torch.equal(value, state[name if name in state else "shared.weight"].to(value.dtype)), name
    assert text.tokenizer("a rabbit", padding="max_length", max_length=512).input_ids[8:10] == [1, 0]


def test_open_clips_own_names(root: Path, tmp_path: Path) -> None:
    state = weights_of(root, "image_encoder")
    save_file(in_layout(state, clip_in_open_clip), tmp_path / "open_clip_visual.safetensors")
    assert_equal(encoders.load_image_encoder(tmp_path, "cpu", SPEC).model, state, torch.float32)


@pytest.mark.parametrize("model", ["spiece.model", "tokenizer.json", "google/umt5-xxl", ""])
def test_the_tokenizer_lies_beside_the_encoders_file(root: Path, tmp_path: Path, model: str) -> None:
    folder = tmp_path / "text_encoders"
    folder.mkdir()
    save_file(original_umt5(root), folder / "umt5-xxl-enc-bf16.safetensors")
    if model == "spiece.model":
        (folder / model).write_bytes(sentencepiece_model())
    elif model == "tokenizer.json":
        shutil.copy(root / "tokenizer" / model, folder)
    elif model:
        shutil.copytree(root / "tokenizer", tmp_path / model)
    if not model:
        with pytest.raises(
            ModelError, match=r"no tokenizer .*umt5-xxl-enc-bf16\.safetensors.*ComfyUI's file"
        ) as refused:
            encoders.load_text_encoder(tmp_path, "cpu", SPEC)
        assert len(str(refused.value).splitlines()) == 1
        return
    assert encoders.load_text_encoder(tmp_path, "cpu", SPEC).tokenizer("x").input_ids[-1] == 1


@pytest.mark.parametrize("names", ["original", "transformers"])
def test_a_text_encoder_without_its_last_block_is_refused(root: Path, tmp_path: Path, names: str) -> None:
    state = original_umt5(root) if names == "original" else umt5(root)
    kept = {name: value for name, value in state.items() if not name.startswith(("blocks.1.", "encoder.block.1."))}
    save_file(kept, tmp_path / "umt5.safetensors")
    with pytest.raises(ModelError, match=r"10 parameters are missing: encoder\.block\.1\."):
        encoders.load_text_encoder(tmp_path, "cpu", SPEC)


@pytest.mark.parametrize("damage", ["missing", "shape", "type"])
@pytest.mark.parametrize("kind", ["vae", "text_encoder", "image_encoder"])
def test_a_near_miss_is_refused_with_the_tensor_that_differs(
    root: Path, tmp_path: Path, kind: str, damage: str
) -> None:
    state = {"vae": original_vae, "text_encoder": original_umt5, "image_encoder": original_clip}[kind](root)
    name = {"vae": "conv2.weight", "text_encoder": "blocks.1.norm2.weight", "image_encoder": "visual.post_norm.weight"}
    tensor = state.pop(name[kind])
    if damage != "missing":
        state[name[kind]] = torch.ones(7) if damage == "shape" else tensor.to(torch.int8)
    torch.save(state, tmp_path / "model.pth")
    shutil.copytree(root / "tokenizer", tmp_path / "tokenizer")
    load = dict(zip(("vae", "text_encoder", "image_encoder"), LOADERS, strict=True))[kind]
    with pytest.raises(
        ModelError, match={"missing": "missing", "shape": r"\[7\]", "type": "type I8"}[damage]
    ) as refused:
        load(tmp_path, "cpu", SPEC)
    assert len(str(refused.value).splitlines()) == 1


def test_scaled_matrices_of_newer_comfyui_files(root: Path, tmp_path: Path) -> None:
    state = scaled(umt5(root), suffix=".weight_scale", keep=("shared.weight",))
    save_file(state, tmp_path / "umt5.safetensors")
    shutil.copytree(root / "tokenizer", tmp_path / "tokenizer")
    model = encoders.load_text_encoder(tmp_path, "cpu", SPEC).model
    assert_equal(model, {name: value.bfloat16() for name, value in unscaled(state, ".weight_scale").items()})
