"""Tiny variants: whole pipelines of the real classes, the same for a seed, and assembled once in a cache."""

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoTokenizer

from longtake.errors import ModelError
from longtake.models.wan import tiny
from longtake.models.wan.encoders import fingerprint
from longtake.models.wan.variants import variant

NAMES = ("tiny-t2v", "tiny-i2v", "tiny-flf2v", "tiny-ti2v", "tiny-t2v-a14b", "tiny-i2v-a14b")


@pytest.fixture(scope="module")
def roots(tiny_root: Callable[[str], Path]) -> dict[str, Path]:
    return {name: tiny_root(name) for name in NAMES}


@pytest.fixture(scope="module")
def weights(roots: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the package's, with "trained" transformers for t2v and i2v."""
    folder = tmp_path_factory.mktemp("weights")
    tiny.write_shared_components(folder, roots["tiny-i2v"] / "vae")
    for name in ("tiny-t2v", "tiny-i2v"):
        tiny.build_tiny(name, folder / "scratch", seed=7)
        (folder / name).mkdir()
        (folder / "scratch" / "transformer").rename(folder / name / "transformer")
    return folder


def _files(root: Path) -> dict[str, bytes]:
    return {str(file.relative_to(root)): file.read_bytes() for file in sorted(root.rglob("*")) if file.is_file()}


def _pipeline(root: Path) -> WanPipeline | WanImageToVideoPipeline:
    name = json.loads((root / "model_index.json").read_text())["_class_name"]
    kind = {"WanPipeline": WanPipeline, "WanImageToVideoPipeline": WanImageToVideoPipeline}[name]
    pipeline = kind.from_pretrained(str(root))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("name", NAMES)
def test_diffusers_loads_and_runs_every_tiny_variant(name: str, roots: dict[str, Path]) -> None:
    pipeline = _pipeline(roots[name])
    width, height = variant(name).size
    images = {key: Image.new("RGB", (width, height), (200, 90, 10)) for key in ("image", "last_image")}
    if variant(name).spec.task in ("t2v", "ti2v"):
        images = {}
    elif variant(name).spec.task == "i2v":
        del images["last_image"]
    video = pipeline(
        prompt_embeds=torch.zeros(1, 512, 64),
        height=height,
        width=width,
        num_frames=5,
        num_inference_steps=2,
        guidance_scale=1.0,
        output_type="pt",
        generator=torch.Generator().manual_seed(0),
        **images,
    ).frames
    assert video.shape == (1, 5, 3, height, width)
    assert video.isfinite().all()


def test_the_ti2v_variant_runs_from_an_image_too(roots: dict[str, Path]) -> None:
    pipeline = WanImageToVideoPipeline.from_pretrained(str(roots["tiny-ti2v"]))
    pipeline.set_progress_bar_config(disable=True)
    image = Image.new("RGB", (128, 64), (0, 90, 10))
    shape = {"height": 64, "width": 128, "num_frames": 5, "num_inference_steps": 2, "guidance_scale": 1.0}
    video = pipeline(image=image, prompt_embeds=torch.zeros(1, 512, 64), output_type="pt", **shape).frames
    assert video.shape == (1, 5, 3, 64, 128)


@pytest.mark.parametrize("name", NAMES)
def test_the_transformer_is_the_one_of_the_table(name: str, roots: dict[str, Path]) -> None:
    transformer = WanTransformer3DModel.from_pretrained(str(roots[name] / "transformer"))
    expected = variant(name)
    assert sum(p.numel() for p in transformer.parameters()) == expected.parameters
    assert sum(p.numel() for p in transformer.blocks[0].parameters()) == expected.block_parameters
    assert {key: transformer.config[key] for key in expected.transformer_config} == {
        key: list(value) if isinstance(value, tuple) else value for key, value in expected.transformer_config.items()
    }


@pytest.mark.parametrize("name", NAMES)
def test_the_index_is_the_one_that_diffusers_writes(name: str, roots: dict[str, Path], tmp_path: Path) -> None:
    ours = json.loads((roots[name] / "model_index.json").read_text())
    _pipeline(roots[name]).save_pretrained(str(tmp_path))
    theirs = json.loads((tmp_path / "model_index.json").read_text())
    del theirs["_name_or_path"]
    assert ours.keys() == theirs.keys()
    # diffusers writes the class behind the public name; hub folders have the public one
    renamed = {key for key in ours if ours[key] != theirs[key]}
    assert renamed <= {"tokenizer", "image_processor"}


def test_a_seed_gives_the_same_bytes_and_leaves_the_global_random_state_alone(
    roots: dict[str, Path], tmp_path: Path
) -> None:
    before = torch.random.get_rng_state()
    again = tiny.build_tiny("tiny-i2v", tmp_path / "again")
    other = tiny.build_tiny("tiny-i2v", tmp_path / "other", seed=1)
    assert torch.equal(before, torch.random.get_rng_state())
    assert _files(again) == _files(roots["tiny-i2v"])
    for part in ("vae", "text_encoder", "image_encoder", "transformer"):
        assert fingerprint(other / part) != fingerprint(again / part)


def test_variants_of_a_seed_share_their_encoders(roots: dict[str, Path]) -> None:
    for part in ("vae", "text_encoder", "tokenizer"):
        assert fingerprint(roots["tiny-t2v"] / part) == fingerprint(roots["tiny-i2v"] / part)
    assert fingerprint(roots["tiny-flf2v"] / "image_encoder") == fingerprint(roots["tiny-i2v"] / "image_encoder")


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_every_text_comes_back_from_the_tokenizer(text: str) -> None:
    tokenizer = tiny.build_tokenizer()
    tokens = tokenizer(text).input_ids
    assert tokens[-1] == tokenizer.eos_token_id == 1
    assert tokenizer.unk_token_id not in tokens or "<unk>" in text
    # the special tokens' own spelling is read as the token, as in every tokenizer
    if not any(special in text for special in ("<pad>", "</s>", "<unk>")):
        assert tokenizer.decode(tokens, skip_special_tokens=True) == text


def test_the_saved_tokenizer_loads_without_sentencepiece(roots: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(roots["tiny-t2v"] / "tokenizer"))
    padded = tokenizer("小兔子跑", padding="max_length", max_length=20)
    assert padded.input_ids[12:] == [1, 0, 0, 0, 0, 0, 0, 0]
    assert padded.input_ids == tiny.build_tokenizer()("小兔子跑", padding="max_length", max_length=20).input_ids
    assert set(padded.keys()) == {"input_ids", "attention_mask"}


def test_trained_weights_are_linked_and_not_copied(weights: Path, tmp_path: Path) -> None:
    root = tiny.assemble("tiny-i2v", weights, tmp_path)
    assert (root / "vae").resolve() == (weights / "vae").resolve()
    assert (root / "transformer").resolve() == (weights / "tiny-i2v" / "transformer").resolve()
    assert _pipeline(root).transformer.config.image_dim == 64
    assert tiny.assemble("tiny-i2v", weights, tmp_path) == root


def test_where_links_fail_the_files_are_copied(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "symlink", refuse)
    root = tiny.assemble("tiny-t2v", weights, tmp_path)
    assert not (root / "vae").is_symlink()
    assert fingerprint(root / "vae") == fingerprint(weights / "vae")


def test_variants_without_trained_weights_are_random_ones(weights: Path, tmp_path: Path) -> None:
    for name in ("tiny-flf2v", "tiny-ti2v"):
        root = tiny.assemble(name, weights, tmp_path)
        assert not (root / "transformer").is_symlink()
        assert (root / "transformer" / "config.json").is_file()


def test_changed_weights_give_another_folder(roots: dict[str, Path], tmp_path: Path) -> None:
    empty = tmp_path / "weights"
    empty.mkdir()
    before = tiny.assemble("tiny-t2v", empty, tmp_path / "cache")
    tiny.write_shared_components(empty, roots["tiny-t2v"] / "vae")
    after = tiny.assemble("tiny-t2v", empty, tmp_path / "cache")
    assert before != after
    assert not (after / "vae").is_symlink(), "no transformer was trained, so nothing of it may be"


def test_a_gap_or_an_empty_file_in_the_cache_is_mended(tmp_path: Path) -> None:
    empty = tmp_path / "weights"
    root = tiny.assemble("tiny-ti2v", empty, tmp_path / "cache")
    expected = _files(root)
    (root / "vae" / "config.json").write_bytes(b"")
    tiny.assemble("tiny-ti2v", empty, tmp_path / "cache")
    assert _files(root) == expected
    (root / "text_encoder" / "model.safetensors").unlink()
    (root / "text_encoder" / "config.json").unlink()
    tiny.assemble("tiny-ti2v", empty, tmp_path / "cache")
    assert _files(root) == expected


def test_callers_at_the_same_time_all_get_a_whole_folder(weights: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        roots = list(pool.map(lambda _: tiny.assemble("tiny-i2v", weights, tmp_path), range(16)))
    assert len(set(roots)) == 1
    assert [path.name for path in roots[0].parent.iterdir()] == ["tiny-i2v"]
    assert (roots[0] / "transformer" / "config.json").is_file()


def test_bundled_lies_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    root = tiny.bundled("tiny-ti2v")
    assert root.is_relative_to(tmp_path / "longtake")
    assert root.name == "tiny-ti2v"
    assert json.loads((root / "model_index.json").read_text())["expand_timesteps"] is True


@pytest.mark.parametrize("name", ["wan2.1-t2v-1.3b", "tiny-x2v"])
def test_a_model_that_is_not_tiny_is_refused_with_the_names(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="tiny-i2v"):
        tiny.build_tiny(name, tmp_path)
