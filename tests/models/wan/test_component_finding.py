"""Which files are a model's VAE, UMT5 and CLIP, and what they are known by: told by tensors, not by names."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints import write_sparse
from longtake.config.schema import ModelConfig
from longtake.data.encode import component_root
from longtake.errors import ModelError
from longtake.models.wan import encoders
from longtake.models.wan.component_files import locate_component, surrounding_components
from longtake.models.wan.detection import inspect
from longtake.models.wan.tiny import build_tiny
from longtake.models.wan.variants import variant
from longtake.models.wan.weights import ModelFiles, locate
from releases import CLIP, T5, VAES, original_vae, sentencepiece_model, weights_of

SPEC = variant("tiny-i2v").spec
LOADERS = (encoders.load_vae, encoders.load_text_encoder, encoders.load_image_encoder)


@pytest.fixture(scope="module")
def root(tiny_root: Callable[[str], Path]) -> Path:
    return tiny_root("tiny-i2v")


def test_two_files_of_one_component_are_ambiguous_and_both_named(comfyui: Path, tmp_path: Path) -> None:
    shutil.copytree(comfyui, tmp_path, dirs_exist_ok=True)
    shutil.copy(tmp_path / "vae" / "wan_2.1_vae.safetensors", tmp_path / "vae" / "another.safetensors")
    with pytest.raises(ModelError, match=r"2 files are a vae.*vae/another\.safetensors, vae/wan_2\.1_vae") as refused:
        encoders.load_vae(tmp_path, "cpu", SPEC)
    assert len(str(refused.value).splitlines()) == 1


def test_the_model_decides_between_the_vaes_of_two_generations(
    comfyui: Path, tiny_root: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(comfyui, tmp_path, dirs_exist_ok=True)
    save_file(original_vae(tiny_root("tiny-ti2v"), "tiny-ti2v"), tmp_path / "vae" / "wan2.2_vae.safetensors")
    for name, channels in (("tiny-i2v", 16), ("tiny-t2v-a14b", 16), ("tiny-ti2v", 48)):
        assert encoders.load_vae(tmp_path, "cpu", variant(name).spec).config.z_dim == channels
    (tmp_path / "vae" / "wan2.2_vae.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no vae .*wan_2\.1_vae\.safetensors is of tiny-t2v, tiny-i2v and"):
        encoders.load_vae(tmp_path, "cpu", variant("tiny-ti2v").spec)


def test_components_of_other_models_are_passed_over(comfyui: Path, tmp_path: Path) -> None:
    """T5 has UMT5's names and width, but one position bias; other VAEs and CLIPs have other names or sizes."""
    shutil.copytree(comfyui, tmp_path, dirs_exist_ok=True)
    block = "encoder.block.{}.layer.0.SelfAttention.{}.weight"
    t5 = {block.format(index, letter): (64, 64) for index in range(2) for letter in "qkvo"}
    t5 |= {"shared.weight": (100, 64), block.format(0, "relative_attention_bias"): (32, 4)}
    write_sparse(tmp_path / "text_encoders" / "t5xxl_fp16.safetensors", t5)
    write_sparse(tmp_path / "vae" / "ae.safetensors", {"encoder.conv_in.weight": (128, 3, 3, 3)})
    write_sparse(tmp_path / "clip_vision" / "g.safetensors", {"vision_model.embeddings.class_embedding": (1664,)})
    (tmp_path / "vae" / "broken.safetensors").write_bytes(b"")
    for load in LOADERS:
        load(tmp_path, "cpu", SPEC)
    with pytest.raises(ModelError, match="this is a T5 encoder"):
        inspect(tmp_path / "text_encoders" / "t5xxl_fp16.safetensors")


@pytest.mark.parametrize("load", LOADERS)
def test_a_folder_without_a_component_says_what_would_do(load: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    for file in (tmp_path / "cut.pth", tmp_path / "vae" / "cut.safetensors"):
        file.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(
        ModelError, match=r"there is no \w+ \(config\.json\) and no file.*cut\.pth: .*ComfyUI"
    ) as refused:
        load(tmp_path, "cpu", SPEC)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("kind", ["release", "comfyui"])
def test_fingerprints_change_with_the_content_and_with_nothing_else(
    release: Path, comfyui: Path, tmp_path: Path, kind: str
) -> None:
    source = release if kind == "release" else comfyui
    names: list[encoders.ComponentName] = ["vae", "text_encoder", "tokenizer", "image_encoder", "image_processor"]
    before = {name: encoders.component_fingerprint(source, name, SPEC) for name in names}
    moved = tmp_path / "elsewhere"
    shutil.copytree(source, moved)
    assert {name: encoders.component_fingerprint(moved, name, SPEC) for name in names} == before
    for name in ("vae", "text_encoder", "image_encoder"):
        file = locate_component(moved, name, SPEC.name).path
        renamed = file.with_name(f"other-{name}{file.suffix}")
        file.rename(renamed)
        assert encoders.component_fingerprint(moved, name, SPEC) == before[name]
        found = locate_component(moved, name, SPEC.name).found
        assert found is not None
        held = [tensor for tensor in found.tensors.values() if tensor.nbytes]
        for tensor in held[:: len(held) // 2]:
            content = bytearray(renamed.read_bytes())
            content[tensor.start + tensor.nbytes // 2] ^= 1
            renamed.write_bytes(content)
            assert encoders.component_fingerprint(moved, name, SPEC) != before[name]
            content[tensor.start + tensor.nbytes // 2] ^= 1
            renamed.write_bytes(content)
    assert encoders.component_fingerprint(moved, "tokenizer", SPEC) == before["tokenizer"]
    if kind == "release":
        config = moved / "google" / "umt5-xxl" / "tokenizer.json"
        config.write_text(config.read_text() + "\n")
    else:
        save_file(with_tokenizer(sentencepiece_model((("▁a", -1.0, 1),)), moved), file_of(moved))
    assert encoders.component_fingerprint(moved, "tokenizer", SPEC) != before["tokenizer"]


def file_of(models: Path) -> Path:
    return locate_component(models, "text_encoder", SPEC.name).path


def with_tokenizer(model: bytes, models: Path) -> dict[str, Tensor]:
    return load_file(file_of(models)) | {"spiece_model": torch.frombuffer(bytearray(model), dtype=torch.uint8)}


def test_the_scale_is_part_of_a_fingerprint(comfyui: Path, tmp_path: Path) -> None:
    shutil.copytree(comfyui, tmp_path, dirs_exist_ok=True)
    before = encoders.component_fingerprint(tmp_path, "text_encoder", SPEC)
    state = load_file(file_of(tmp_path))
    state["encoder.block.1.layer.0.SelfAttention.q.scale_weight"] *= 1.01
    save_file(state, file_of(tmp_path))
    assert encoders.component_fingerprint(tmp_path, "text_encoder", SPEC) != before


def test_a_models_own_folder_is_that_of_its_components(
    release: Path, comfyui: Path, root: Path, tmp_path: Path
) -> None:
    transformer = next((comfyui / "diffusion_models").iterdir())
    assert surrounding_components(transformer, []) == comfyui
    assert surrounding_components(release, []) == release
    assert surrounding_components(release / "diffusion_pytorch_model.safetensors", []) == release
    assert surrounding_components(root, []) == root
    shutil.copy(transformer, tmp_path)
    assert surrounding_components(tmp_path / transformer.name, []) is None


@pytest.mark.parametrize(
    ("file", "facts"),
    [
        (VAES["tiny-i2v"], ("vae", "original", "fp32")),
        (T5, ("text_encoder", "original", "bf16")),
        (CLIP, ("image_encoder", "original", "fp16")),
        ("vae/wan_2.1_vae.safetensors", ("vae", "original", "fp32")),
        ("text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors", ("text_encoder", "comfyui", "fp8_e4m3 with scales")),
        ("clip_vision/clip_vision_h.safetensors", ("image_encoder", "diffusers", "fp16")),
        (
            "diffusion_models/wan2.1_i2v_480p_14B_fp8_scaled.safetensors",
            ("transformer", "comfyui", "fp8_e4m3 with scales"),
        ),
    ],
)
def test_inspect_says_what_each_file_is(
    release: Path, comfyui: Path, root: Path, file: str, facts: tuple[str, str, str]
) -> None:
    found = inspect((release if file.endswith(".pth") else comfyui) / file)
    assert (found["kind"], found["layout"], found["dtype"]) == facts
    component = "transformer" if facts[0] == "transformer" else facts[0]
    held = {name: value for name, value in weights_of(root, component).items() if "embed_tokens" not in name}
    extra = {CLIP: 64 * 32, "clip_vision/clip_vision_h.safetensors": 0}.get(
        file, 0
    )  # CLIP's head is of its vision half
    assert found["parameters"] == sum(value.numel() for value in held.values()) + extra
    assert "tiny-i2v" in str(found["candidates"])


def test_a_transformer_alone_is_not_enough_and_a_vae_that_is_refused_is_named(tmp_path: Path) -> None:
    alone = ModelFiles(variant("tiny-t2v"), {}, None)
    with pytest.raises(ModelError, match=r"^model\.components: only a transformer .* are needed; set"):
        component_root(alone, "model.components")
    transformer = build_tiny("tiny-t2v", tmp_path / "tiny") / "transformer"
    (transformer / "Wan2.1_VAE.pth").write_bytes(b"PK\x03\x04" + bytes(100))
    model = ModelConfig(path=str(transformer), name="tiny-t2v")
    with pytest.raises(ModelError, match=r"are needed \(Wan2\.1_VAE\.pth: this pickle is damaged, .*\); set"):
        component_root(locate(model, Path, print), "model.components")
    with pytest.raises(ModelError, match=r"no file of a VAE \(Wan2\.1_VAE\.pth: this pickle is damaged, .*\); give"):
        locate(model.model_copy(update={"components": str(transformer)}), Path, print)
