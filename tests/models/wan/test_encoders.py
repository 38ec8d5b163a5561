"""VAE, UMT5 and CLIP: the values that diffusers' pipelines compute, and clear errors for what cannot be loaded."""

import gc
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from longtake.errors import ModelError
from longtake.models.wan import encoders

CAPTIONS = ("A grey rabbit &amp;  a squirrel\n jump", "小兔子在跑", "", "x" * 900)


@pytest.fixture(scope="module")
def root(tiny_root: Callable[[str], Path]) -> Path:
    return tiny_root("tiny-i2v")


@pytest.fixture(scope="module")
def text_encoder(root: Path) -> encoders.TextEncoder:
    return encoders.load_text_encoder(root, "cpu")


def _video(frames: int = 5, height: int = 32, width: int = 48) -> torch.Tensor:
    return torch.rand(1, 3, frames, height, width, generator=torch.Generator().manual_seed(3)) * 2 - 1


def _pixels(height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def _as_pil(pixels: torch.Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


@pytest.mark.parametrize("name", ["tiny-i2v", "tiny-ti2v"])
def test_latents_are_the_posterior_mean_normalised_by_channel(name: str, tiny_root: Callable[[str], Path]) -> None:
    vae = encoders.load_vae(tiny_root(name), "cpu")
    latents = encoders.encode_video(vae, _video())
    stride = vae.config.scale_factor_spatial
    assert latents.shape == (1, vae.config.z_dim, 2, 32 // stride, 48 // stride)
    raw = vae.encode(_video()).latent_dist.mean.detach().numpy().astype(np.float64)
    mean, std = (np.array(vae.config[key]).reshape(1, -1, 1, 1, 1) for key in ("latents_mean", "latents_std"))
    np.testing.assert_allclose(latents.numpy(), (raw - mean) / std, rtol=1e-5, atol=1e-6)


def test_decoding_undoes_the_normalisation(root: Path) -> None:
    vae = encoders.load_vae(root, "cpu")
    video = encoders.decode_latents(vae, encoders.encode_video(vae, _video()))
    plain = vae.decode(vae.encode(_video()).latent_dist.mode()).sample
    assert video.shape == (1, 3, 5, 32, 48)
    torch.testing.assert_close(video, plain, rtol=0, atol=1e-5)  # (z - m) / s * s + m rounds four times in fp32


def test_the_vae_is_fp32_and_frozen_whatever_its_file_holds(root: Path, tmp_path: Path) -> None:
    AutoencoderKLWan.from_pretrained(str(root / "vae"), torch_dtype=torch.bfloat16).save_pretrained(tmp_path / "vae")
    vae = encoders.load_vae(tmp_path, "cpu")
    assert {p.dtype for p in vae.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in vae.parameters())
    assert not vae.training
    assert not encoders.encode_video(vae, _video()).requires_grad


def test_pixels_are_normalised_as_the_pipelines_do(root: Path) -> None:
    pixels = _pixels(64, 112)
    processor = WanPipeline.from_pretrained(str(root)).video_processor
    assert torch.equal(encoders.normalise_pixels(pixels)[None], processor.preprocess(_as_pil(pixels)))
    assert torch.equal(encoders.normalise_pixels(torch.tensor([-1.0, 0.25])), torch.tensor([-1.0, 0.25]))


@pytest.mark.parametrize("caption", CAPTIONS)
def test_prompt_embeds_are_the_pipelines_without_its_padding(
    caption: str, root: Path, text_encoder: encoders.TextEncoder
) -> None:
    pipeline = WanPipeline.from_pretrained(str(root))
    with torch.no_grad():  # as in the pipeline's call; with gradients torch takes another attention kernel
        expected, _ = pipeline.encode_prompt(caption, do_classifier_free_guidance=False, max_sequence_length=512)
    embeds = encoders.encode_prompt(text_encoder, caption)
    assert torch.equal(embeds, expected[0, : len(embeds)])
    assert not expected[0, len(embeds) :].any()
    assert not embeds.requires_grad


def test_a_prompt_has_its_true_length_and_at_most_512_tokens(text_encoder: encoders.TextEncoder) -> None:
    lengths = [len(encoders.encode_prompt(text_encoder, caption)) for caption in CAPTIONS]
    assert lengths == [len("A grey rabbit & a squirrel jump") + 1, 3 * 5 + 1, 1, 512]


def test_captions_are_told_apart_by_random_embeddings(text_encoder: encoders.TextEncoder) -> None:
    captions = ("a rabbit wakes up in its burrow", "a squirrel throws a nut at him", "pine trees under a pink sky")
    embeds = [encoders.encode_prompt(text_encoder, caption) for caption in captions]
    means = torch.stack([embed.mean(0) for embed in embeds])
    assert all(0.5 < embed.std() < 1.5 for embed in embeds)
    assert torch.pdist(means).min() > 0.5


def test_the_text_encoder_keeps_the_dtype_of_its_files(root: Path, tmp_path: Path) -> None:
    model = encoders.load_text_encoder(root, "cpu").model.to(torch.bfloat16)
    model.save_pretrained(tmp_path / "text_encoder")
    shutil.copytree(root / "tokenizer", tmp_path / "tokenizer")
    loaded = encoders.load_text_encoder(tmp_path, "cpu")
    assert loaded.model.dtype == torch.bfloat16
    assert encoders.encode_prompt(loaded, "a rabbit").dtype == torch.bfloat16


@pytest.mark.parametrize("size", [(64, 112), (112, 64), (40, 40), (201, 57)])
def test_image_embeds_are_the_pipelines(size: tuple[int, int], root: Path) -> None:
    pixels = _pixels(*size)
    embeds = encoders.encode_image(encoders.load_image_encoder(root, "cpu"), pixels)
    pipeline = WanImageToVideoPipeline.from_pretrained(str(root))
    assert embeds.shape == (17, 64)
    with torch.no_grad():
        assert torch.equal(embeds, pipeline.encode_image(_as_pil(pixels))[0])


def test_encoders_load_from_the_key_names_of_the_published_files(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    clip, text = (tmp_path / part / "model.safetensors" for part in ("image_encoder", "text_encoder"))
    published = {f"vision_model.{name}": tensor for name, tensor in load_file(clip).items()}
    save_file(published, clip, metadata={"format": "pt"})
    tensors = load_file(text)
    save_file(tensors | {"encoder.embed_tokens.weight": tensors["shared.weight"].clone()}, text, {"format": "pt"})
    for load in (encoders.load_image_encoder, encoders.load_text_encoder):
        ours, plain = load(tmp_path, "cpu").model.state_dict(), load(root, "cpu").model.state_dict()
        assert all(torch.equal(ours[name], plain[name]) for name in plain)


@pytest.mark.parametrize("load", [encoders.load_vae, encoders.load_text_encoder, encoders.load_image_encoder])
def test_an_encoder_ends_with_the_last_name_for_it(load: Callable[[Path, str], Any], root: Path) -> None:
    encoder = load(root, "cpu")
    with torch.no_grad():
        if isinstance(encoder, encoders.TextEncoder):
            encoders.encode_prompt(encoder, "a rabbit")
        elif isinstance(encoder, encoders.ImageEncoder):
            encoders.encode_image(encoder, _pixels(64, 64))
        else:
            encoders.decode_latents(encoder, encoders.encode_video(encoder, _video()))
    weights = [weakref.ref(parameter) for parameter in getattr(encoder, "model", encoder).parameters()]
    gc.disable()
    try:
        del encoder
        assert not any(weight() is not None for weight in weights)
    finally:
        gc.enable()


def test_a_fingerprint_survives_moving_and_changes_with_the_content(root: Path, tmp_path: Path) -> None:
    original = encoders.fingerprint(root / "transformer")
    moved = tmp_path / "elsewhere"
    shutil.copytree(root / "transformer", moved)
    assert encoders.fingerprint(moved) == original
    weights = moved / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    for position in (-1, len(content) - 2**20 + 1, 2**19):
        content[position] ^= 1
        weights.write_bytes(content)
        assert encoders.fingerprint(moved) != original, position
        content[position] ^= 1
    weights.write_bytes(content)
    assert encoders.fingerprint(moved) == original
    config = moved / "config.json"
    config.write_text(config.read_text().replace("1e-06", "1e-05"))
    assert encoders.fingerprint(moved) != original


def test_a_fingerprint_needs_a_component(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no component here"):
        encoders.fingerprint(tmp_path / "missing")
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(ModelError, match="cut off"):
        encoders.fingerprint(tmp_path)


@pytest.mark.parametrize("load", [encoders.load_vae, encoders.load_text_encoder, encoders.load_image_encoder])
def test_a_missing_component_is_named(load: Callable[[Path, str], object], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"there is no (vae|text_encoder|image_encoder) \(config.json\)") as caught:
        load(tmp_path, "cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["vae", "text_encoder", "image_encoder"])
@pytest.mark.parametrize("damage", ["cut", "lacking", "empty config"])
def test_a_damaged_component_is_refused_in_one_line(part: str, damage: str, root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "root")
    folder = tmp_path / "root" / part
    (weights,) = folder.glob("*.safetensors")
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    elif damage == "lacking":
        tensors = load_file(weights)
        tensors.pop(max(tensors))
        save_file(tensors, weights, metadata={"format": "pt"})
    else:
        (folder / "config.json").write_bytes(b"")
    load = {
        "vae": encoders.load_vae,
        "text_encoder": encoders.load_text_encoder,
        "image_encoder": encoders.load_image_encoder,
    }[part]
    with pytest.raises(ModelError, match=part) as caught:
        load(tmp_path / "root", "cpu")
    assert len(str(caught.value).splitlines()) == 1


def test_a_damaged_tokenizer_or_image_processor_is_refused(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "root")
    (tmp_path / "root" / "tokenizer" / "tokenizer.json").write_text("{")
    (tmp_path / "root" / "image_processor" / "preprocessor_config.json").write_text("{")
    with pytest.raises(ModelError, match="tokenizer"):
        encoders.load_text_encoder(tmp_path / "root", "cpu")
    with pytest.raises(ModelError, match="image_processor"):
        encoders.load_image_encoder(tmp_path / "root", "cpu")
