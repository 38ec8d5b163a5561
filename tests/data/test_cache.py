"""The cache: entries that are whole or not there, damage that is noticed, manifests that say what differs."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from longtake.data.cache import STALE_SECONDS, Cache, Entry, Manifest, digest
from longtake.errors import CacheError, Problem

SETTINGS = {"size": [832, 480], "frames": [17, 81], "vae": "abc"}


def entry(number: int, image: bool = True) -> Entry:
    """An entry whose keys carry its number."""
    return Entry(
        latents=f"l{number}",
        image=f"i{number}" if image else "",
        text=f"t{number}",
        bucket=(17, 480, 832),
        stages=(17, 81),
        clip=f"c{number}",
        prompt=f"clip {number}, ünïcode",
        where=f"clips.csv:row {number}",
        split="train",
    )


def filled(folder: Path, count: int = 2) -> tuple[Cache, Manifest]:
    """A cache with all entries of its manifest."""
    cache, manifest = Cache(folder), Manifest(SETTINGS, tuple(entry(i) for i in range(count)), "empty")
    cache.write("texts", "empty", {"prompt_embeds": torch.zeros(1, 4)})
    for index in range(count):
        cache.write("latents", f"l{index}", {"latents": torch.randn(16, 2, 4, 4)})
        cache.write("images", f"i{index}", {"image_embeds": torch.randn(17, 8)})
        cache.write("texts", f"t{index}", {"prompt_embeds": torch.randn(3, 4)})
    cache.write_manifest(manifest)
    return cache, manifest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_written_is_read_to_the_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    cache = Cache(tmp_path)
    tensors = {"latents": torch.randn(4, 3, 2).to(dtype).transpose(0, 1), "condition": torch.ones(2, dtype=dtype)}
    assert not cache.has("latents", "key")
    cache.write("latents", "key", tensors)
    assert cache.has("latents", "key")
    read = cache.read("latents", "key")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) and read[name].dtype == dtype for name, tensor in tensors.items())
    assert [path.name for path in (tmp_path / "latents").iterdir()] == ["key.safetensors"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_never_enters(tmp_path: Path, value: float) -> None:
    cache = Cache(tmp_path)
    with pytest.raises(CacheError, match="latents has values that are not finite"):
        cache.write("latents", "key", {"latents": torch.tensor([1.0, value])})
    assert not cache.has("latents", "key")


def harm(file: Path, how: str) -> None:
    content = bytearray(file.read_bytes())
    if how == "gone":
        file.unlink()
    elif how == "cut":
        file.write_bytes(content[:-4])
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "header":
        file.write_bytes(bytes(content).replace(b'"content"', b'"contend"'))
    else:
        content[-1] ^= 1
        file.write_bytes(content)


@pytest.mark.parametrize("how", ["flipped", "cut", "empty", "gone", "header"])
def test_a_damaged_entry_is_noticed_and_named(tmp_path: Path, how: str) -> None:
    cache, _ = filled(tmp_path)
    file = tmp_path / "latents" / "l1.safetensors"
    harm(file, how)
    with pytest.raises(CacheError) as raised:
        cache.read("latents", "l1")
    (problem,) = raised.value.problems
    assert problem.where == str(file)
    assert problem.remedy == "delete it and run `longtake prepare` again"
    assert raised.value.exit_status == 2


def test_an_entry_under_another_entrys_name_is_still_whole_but_a_swapped_tensor_is_not(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.write("latents", "a", {"x": torch.ones(2), "y": torch.zeros(2)})
    file = tmp_path / "latents" / "a.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"x":', b'"z":'))
    with pytest.raises(CacheError, match="has changed since it was written"):
        cache.read("latents", "a")


def test_a_manifest_comes_back(tmp_path: Path) -> None:
    cache, manifest = filled(tmp_path)
    assert cache.read_manifest(dict(SETTINGS)) == manifest


def test_a_manifest_of_other_settings_names_what_differs_from_the_nearest(tmp_path: Path) -> None:
    cache, manifest = filled(tmp_path)
    cache.write_manifest(replace(manifest, settings=SETTINGS | {"size": [1280, 720], "vae": "other"}))
    with pytest.raises(CacheError) as raised:
        cache.read_manifest(SETTINGS | {"frames": [17, 49]})
    assert str(raised.value) == (
        f"{tmp_path}: the cache was prepared with other settings: frames [17, 81] instead of [17, 49]; "
        "run `longtake prepare` with this config [cache-other-settings]"
    )


def test_an_empty_cache_says_that_it_was_not_prepared(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="the cache has not been prepared; run `longtake prepare`"):
        Cache(tmp_path / "new").read_manifest(SETTINGS)


@pytest.mark.parametrize("kind", ["latents/l0", "images/i1", "texts/t1", "texts/empty"])
def test_an_entry_that_is_gone_is_noticed_before_training(tmp_path: Path, kind: str) -> None:
    cache, manifest = filled(tmp_path)
    (tmp_path / f"{kind}.safetensors").unlink()
    assert cache.missing(manifest) == 1
    with pytest.raises(CacheError, match="1 of 7 entries are missing; run `longtake prepare` again"):
        cache.read_manifest(SETTINGS)


def broken_manifests() -> list[Any]:
    good = {"settings": SETTINGS, "entries": [], "empty_text": "e"}
    return [[], 3, {}, good | {"entries": [{"latents": "l"}]}, good | {"entries": [3]}, {"settings": SETTINGS}]


@pytest.mark.parametrize("table", [*broken_manifests(), "not JSON"], ids=str)
def test_a_manifest_that_cannot_be_read_is_named(tmp_path: Path, table: Any) -> None:
    cache, manifest = filled(tmp_path)
    path = cache.write_manifest(manifest)
    path.write_text(table if isinstance(table, str) else json.dumps(table))
    with pytest.raises(CacheError) as raised:
        cache.read_manifest(SETTINGS)
    (problem,) = raised.value.problems
    assert "the manifest cannot be read" in problem.what
    assert problem.where == str(path)


def tampered(table: dict[str, Any], how: str) -> dict[str, Any]:
    one, other = table["entries"]
    if how == "texts swapped":
        return table | {"entries": [one | {"text": other["text"]}, other | {"text": one["text"]}]}
    if how == "an entry less":
        return table | {"entries": [one]}
    if how == "another caption":
        return table | {"entries": [one | {"prompt": "something else"}, other]}
    if how == "no condition":
        return table | {"empty_text": one["text"]}
    if how == "held out":
        return table | {"entries": [one | {"split": "validation"}, other]}
    return table | {"content": "0" * 40}


@pytest.mark.parametrize(
    "how", ["texts swapped", "an entry less", "another caption", "no condition", "held out", "hash"]
)
def test_a_manifest_that_was_changed_is_noticed_and_named(tmp_path: Path, how: str) -> None:
    cache, manifest = filled(tmp_path)
    path = cache.write_manifest(manifest)
    path.write_text(json.dumps(tampered(json.loads(path.read_text()), how)))
    with pytest.raises(CacheError) as raised:
        cache.read_manifest(SETTINGS)
    (problem,) = raised.value.problems
    assert (problem.what, problem.where) == ("the manifest has changed since it was written", str(path))
    assert problem.remedy == "delete it and run `longtake prepare` again"


def test_a_manifest_under_the_name_of_other_settings_is_noticed(tmp_path: Path) -> None:
    cache, manifest = filled(tmp_path)
    others = SETTINGS | {"size": [1280, 720]}
    cache.write_manifest(manifest).rename(tmp_path / "manifests" / f"{digest(others)}.json")
    with pytest.raises(CacheError, match="the manifest has changed since it was written"):
        cache.read_manifest(others)


def test_a_manifest_of_a_version_that_wrote_no_hash_is_read(tmp_path: Path) -> None:
    cache, manifest = filled(tmp_path)
    path = cache.write_manifest(manifest)
    table = json.loads(path.read_text())
    del table["content"]
    path.write_text(json.dumps(table, indent=2))
    assert cache.read_manifest(dict(SETTINGS)) == manifest


def test_a_key_is_of_the_value_not_of_its_spelling() -> None:
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": (1, 2), "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
    assert len(digest("é")) == 40


def test_why_an_entry_could_not_be_made_is_known_to_other_ranks_until_it_is_made(tmp_path: Path) -> None:
    cache, problem = Cache(tmp_path), Problem("cannot be decoded", "row 3", "mend it")
    assert cache.rejection("latents", "key") is None
    cache.reject("latents", "key", problem)
    assert Cache(tmp_path).rejection("latents", "key") == Problem("cannot be decoded", "", "mend it")
    cache.write("latents", "key", {"latents": torch.ones(2)})
    assert cache.rejection("latents", "key") is None


@pytest.mark.parametrize("content", [b"", b"[]", b"3", b'{"what": "x"}', b"\x80\x04."])
def test_a_note_of_why_that_cannot_be_read_is_none(tmp_path: Path, content: bytes) -> None:
    cache = Cache(tmp_path)
    cache.reject("latents", "key", Problem("cannot be decoded"))
    (note,) = (tmp_path / "latents").iterdir()
    note.write_bytes(content)
    assert cache.rejection("latents", "key") is None


def test_what_killed_writers_left_is_removed_but_not_what_is_being_written(tmp_path: Path) -> None:
    cache, manifest = filled(tmp_path)
    old = [tmp_path / "latents" / "l9.safetensors.staged-0123456789ab", tmp_path / "hashes.json.staged-0123456789ab"]
    young = tmp_path / "texts" / "t9.safetensors.staged-0123456789ab"
    for path in (*old, young):
        path.touch()
    for path in old:
        before = path.stat().st_mtime - STALE_SECONDS - 1
        os.utime(path, (before, before))
    cache.remove_staged()
    assert not any(path.exists() for path in old)
    assert young.exists()
    assert cache.missing(manifest) == 0
