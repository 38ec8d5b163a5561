"""Checkpoints: what is written comes back, damage is noticed, the last ones are kept, a refusing disk is named."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from longtake.errors import RunError
from longtake.training.checkpoint import checkpoint_path, load_newest
from refusals import file_size_limit
from saved import Saved, equal, read, save
from saved import numbered as checkpoint


def names(run: Path) -> list[str]:
    """What lies in the folder of checkpoints."""
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.mark.parametrize("ema", [True, False])
def test_what_is_written_comes_back(tmp_path: Path, ema: bool) -> None:
    written = checkpoint(7, ema)
    folder = save(tmp_path, written, keep=3)
    assert folder == checkpoint_path(tmp_path, 7) == tmp_path / "checkpoints" / "step-00000007"
    assert equal(read(folder), written)
    assert (folder / "ema.safetensors").exists() == ema
    assert json.loads((folder / "manifest.json").read_text()).keys() == {
        path.name for path in folder.iterdir() if path.name != "manifest.json"
    }


def test_a_run_without_checkpoints_has_no_newest(tmp_path: Path) -> None:
    assert load_newest(tmp_path, print) is None


def test_the_last_ones_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10, 11):
        save(tmp_path, checkpoint(step), keep=2)
    assert names(tmp_path) == ["step-00000010", "step-00000011"]


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("part", ["trained.safetensors", "optimizer.safetensors", "ema.safetensors", "state.json"])
@pytest.mark.parametrize("harm", ["flipped", "cut", "gone"])
def test_a_damaged_checkpoint_is_said_and_the_one_before_taken(tmp_path: Path, part: str, harm: str) -> None:
    for step in (1, 2):
        save(tmp_path, checkpoint(step), keep=2)
    file = checkpoint_path(tmp_path, 2) / part
    if harm == "flipped":
        flip(file)
    elif harm == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file.unlink()
    said: list[str] = []
    newest = load_newest(tmp_path, said.append)
    assert newest is not None
    assert newest.step == 1
    (line,) = said
    assert "step-00000002" in line
    assert part in line


@pytest.mark.parametrize("content", [None, "", "[]", '{"trained.safetensors": 3}'])
def test_a_checkpoint_without_a_readable_manifest_is_damaged(tmp_path: Path, content: str | None) -> None:
    save(tmp_path, checkpoint(1), keep=2)
    manifest = checkpoint_path(tmp_path, 1) / "manifest.json"
    manifest.unlink() if content is None else manifest.write_text(content)
    with pytest.raises(RunError, match="all checkpoints are damaged") as raised:
        load_newest(tmp_path, print)
    assert str(tmp_path) in str(raised.value)


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, checkpoint(step), keep=2)
    flip(checkpoint_path(tmp_path, 2) / "trained.safetensors")
    again = checkpoint(2)
    save(tmp_path, again, keep=2)
    newest = load_newest(tmp_path, print)
    assert newest is not None
    assert equal(read(newest.folder), again)


def test_half_written_and_half_removed_ones_are_no_checkpoints(tmp_path: Path) -> None:
    kept = checkpoint(1)
    folder = save(tmp_path, kept, keep=2)
    for name in ("step-00000002.staged-0123456789ab", "step-00000000.staged-removed"):
        shutil.copytree(folder, folder.with_name(name))
    newest = load_newest(tmp_path, print)
    assert newest is not None
    assert newest.step == 1
    save(tmp_path, checkpoint(3), keep=2)
    assert {"step-00000001", "step-00000003"} <= set(names(tmp_path))


def test_looking_at_a_run_does_not_disturb_its_writer(tmp_path: Path) -> None:
    folder = save(tmp_path, checkpoint(1), keep=2)
    being_written = folder.with_name("step-00000002.staged-0123456789ab")
    being_written.mkdir()
    load_newest(tmp_path, print)
    assert being_written.is_dir()


def test_a_refusing_disk_is_named_and_the_last_checkpoint_stays(tmp_path: Path) -> None:
    before = checkpoint(1)
    save(tmp_path, before, keep=1)
    large = Saved(2, {"a": torch.zeros(100_000)})
    with file_size_limit(10_000), pytest.raises(RunError) as raised:
        save(tmp_path, large, keep=1)
    (problem,) = raised.value.problems
    assert "cannot write" in problem.what
    assert "step-00000002" in problem.where
    assert "free" in problem.remedy
    assert names(tmp_path) == ["step-00000001"]
    newest = load_newest(tmp_path, print)
    assert newest is not None
    assert equal(read(newest.folder), before)
