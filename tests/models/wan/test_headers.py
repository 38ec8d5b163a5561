"""Headers and sets of safetensors files, whole and damaged."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from checkpoints import write_sparse, write_sparse_shards
from longtake.errors import ModelError
from longtake.models.wan.headers import read_header, read_headers, tensor_files


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    path = tmp_path / "sound.safetensors"
    save_file({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(5, dtype=torch.bfloat16)}, path)
    return path


def header_of(entries: object, data: int = 0) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data)


def entry(**changes: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes


DAMAGED = {
    "zero bytes": b"",
    "three bytes": b"abc",
    "text": b"<!DOCTYPE html><html>not found</html>",
    "LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 100\n",
    "zip": b"PK\x03\x04" + bytes(64),
    "pickle": b"\x80\x02}q\x00." + bytes(64),
    "header longer than the file": (1000).to_bytes(8, "little") + b'{"a":',
    "header longer than allowed": (2**40).to_bytes(8, "little") + b"{}",
    "zeros": bytes(100),
    "no JSON": (10).to_bytes(8, "little") + b"{not json}",
    "deep JSON": (60000).to_bytes(8, "little") + b'{"a":' + b"[" * 59995,
    "list": header_of([1]),
    "no shape": header_of({"a": {"dtype": "F32"}}),
    "not an object": header_of({"a": 3}),
    "unknown type": header_of({"a": entry(dtype="F3")}, 8),
    "type of another kind": header_of({"a": entry(dtype=["F32"])}, 8),
    "size against shape": header_of({"a": entry(shape=[3])}, 8),
    "negative": header_of({"a": entry(shape=[-2], data_offsets=[8, 0])}, 8),
    "fraction": header_of({"a": entry(shape=[2.0])}, 8),
    "offsets beyond the file": header_of({"a": entry()}, 4),
    "more than the tensors": header_of({"a": entry()}, 9),
    "hole": header_of({"a": entry(), "b": entry(data_offsets=[12, 20])}, 20),
    "overlap": header_of({"a": entry(), "b": entry(data_offsets=[4, 12])}, 12),
}


def test_a_header_tells_type_shape_and_place(sound: Path) -> None:
    header = read_header(sound)["a"]
    assert (header.dtype, header.shape, header.nbytes) == ("F32", (2, 3), 24)
    data = sound.read_bytes()[header.start : header.start + header.nbytes]
    assert torch.frombuffer(bytearray(data), dtype=torch.float32).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_gives_one_line_with_its_path(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(DAMAGED[damage])
    with pytest.raises(ModelError) as refused:
        read_header(path)
    assert len(str(refused.value).splitlines()) == 1
    assert str(path) in str(refused.value)


def test_a_file_cut_anywhere_is_refused(sound: Path, tmp_path: Path) -> None:
    whole = sound.read_bytes()
    cut = tmp_path / "cut.safetensors"
    for length in range(len(whole)):
        cut.write_bytes(whole[:length])
        with pytest.raises(ModelError):
            read_header(cut)


def test_a_fifo_and_a_missing_file_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.safetensors")
    with pytest.raises(ModelError, match="not a regular file"):
        read_header(tmp_path / "fifo.safetensors")
    with pytest.raises(ModelError, match="no such file"):
        read_header(tmp_path / "missing.safetensors")


def test_shards_are_found_from_the_folder_the_index_and_any_shard(tmp_path: Path) -> None:
    shapes = {f"t{index}": (index + 1,) for index in range(7)}
    index = write_sparse_shards(tmp_path, "diffusion_pytorch_model", shapes, 3)
    files = tensor_files(tmp_path)
    assert len(files) == 3
    assert tensor_files(index) == tensor_files(files[1]) == files
    index.unlink()
    assert tensor_files(tmp_path) == tensor_files(files[2]) == files
    assert {name: header.shape for name, header in read_headers(files).items()} == shapes


def test_missing_shards_are_named(tmp_path: Path) -> None:
    index = write_sparse_shards(tmp_path, "model", {f"t{index}": (1,) for index in range(4)}, 4)
    for shard in (2, 3):
        (tmp_path / f"model-{shard:05}-of-00004.safetensors").unlink()
    for path in (index, tmp_path):
        with pytest.raises(ModelError, match=r"00002-of-00004.*00003-of-00004"):
            tensor_files(path)
    index.unlink()
    with pytest.raises(ModelError, match=r"00002-of-00004.*00003-of-00004"):
        tensor_files(tmp_path)


def test_all_damaged_shards_are_reported_together(tmp_path: Path) -> None:
    files = tensor_files(write_sparse_shards(tmp_path, "model", {f"t{index}": (1,) for index in range(3)}, 3))
    for file in files[1:]:
        file.write_bytes(b"")
    with pytest.raises(ModelError) as refused:
        read_headers(files)
    assert len(refused.value.problems) == 2


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    files = [write_sparse(tmp_path / f"{name}.safetensors", {"a": (1,)}) for name in "xy"]
    with pytest.raises(ModelError, match="a is in x"):
        read_headers(files)


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"weight_map": {}}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": []}}']
)
def test_a_damaged_index_is_refused(tmp_path: Path, text: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(ModelError, match=r"index|weight_map"):
        tensor_files(index)


def test_an_index_cannot_name_a_file_outside_its_folder(tmp_path: Path) -> None:
    write_sparse(tmp_path / "outside.safetensors", {"a": (1,)})
    index = tmp_path / "inner" / "model.safetensors.index.json"
    index.parent.mkdir()
    index.write_text(json.dumps({"weight_map": {"a": "../outside.safetensors"}}))
    with pytest.raises(ModelError, match="own folder"):
        tensor_files(index)


def test_a_folder_of_two_models_asks_for_a_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no safetensors file"):
        tensor_files(tmp_path)
    for name in ("high", "low"):
        write_sparse(tmp_path / f"{name}.safetensors", {"a": (1,)})
    with pytest.raises(ModelError, match="2 models: high, low"):
        tensor_files(tmp_path)


@pytest.mark.parametrize("length", [0x280, 0x480])
def test_a_header_whose_length_looks_like_a_pickles_protocol_is_read(tmp_path: Path, length: int) -> None:
    """The first bytes are 80 02 and 80 04."""
    entry = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    text = entry + b" " * (length - len(entry) - 1) + b"}"
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\x07")
    assert read_header(tmp_path / "model.safetensors")["a"].shape == (1,)


def test_a_gguf_file_is_refused_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ModelError, match="GGUF"):
        read_header(tmp_path / "model.gguf")
