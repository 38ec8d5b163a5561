"""Power that goes at any moment: what had been written before is there, nothing half-written has its name."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from longtake import disk, files
from longtake.data.cache import Cache
from longtake.lora import read_adapter, save_adapter
from longtake.lora.adapter import Adapter
from longtake.training.checkpoint import load_newest
from saved import equal, numbered, read, save
from simulated_disk import SimulatedDisk, Tree, lay_out

STEPS = (1, 2, 3)


class Losses:
    """The trees that a loss of power may leave, each with what had been promised by then."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir()
        self.disk = SimulatedDisk(root)
        self.promised = 0
        self.found: list[tuple[int, Tree]] = []

    def record(self, *writes: Callable[[], object]) -> None:
        """Makes the writes; each is promised once it has returned."""
        with self.disk.connected(self._keep):
            for write in writes:
                write()
                self.promised += 1
                for tree in self.disk.trees():
                    self._keep(tree)

    def _keep(self, tree: Tree) -> None:
        if (self.promised, tree) not in self.found[-100:]:
            self.found.append((self.promised, tree))

    def after(self, folder: Path) -> list[tuple[int, Path]]:
        """(how many writes were promised, a folder that is as the root after a loss of power)."""
        return [(promised, lay_out(tree, folder / str(i))) for i, (promised, tree) in enumerate(self.found)]


def adapter(value: float) -> Adapter:
    """One layer full of `value`."""
    layer = "blocks.0.attn1.to_q"
    halves = {f"{layer}.lora_A.weight": torch.full((2, 8), value), f"{layer}.lora_B.weight": torch.full((8, 2), value)}
    return Adapter(halves, {layer: 2.0}, {})


@pytest.mark.parametrize("keep", [1, 2])
def test_the_newest_checkpoint_is_whole_and_right_wherever_the_power_goes(tmp_path: Path, keep: int) -> None:
    losses = Losses(tmp_path / "disk")
    run = losses.root / "runs" / "run"  # neither folder is there
    written = {step: numbered(step) for step in STEPS}
    losses.record(*(lambda step=step: save(run, written[step], keep) for step in STEPS))  # type: ignore[misc]
    states = losses.after(tmp_path / "after")
    assert len(states) > 300
    for promised, root in states:
        said: list[str] = []
        newest = load_newest(root / "runs" / "run", said.append)
        assert said == [], "something damaged has a checkpoint's name"
        assert newest is not None or not promised
        if newest is not None:
            assert newest.step >= promised
            assert equal(read(newest.folder), written[newest.step])
        for folder in (root / "runs" / "run" / "checkpoints").glob("step-*"):
            assert files.STAGED in folder.name or files.damage(folder) is None


def test_a_damaged_checkpoint_that_comes_again_is_whole_wherever_the_power_goes(tmp_path: Path) -> None:
    run = tmp_path / "disk"
    (run / "checkpoints").mkdir(parents=True)
    for step in (1, 2):
        save(run, numbered(step), keep=2)
    (run / "checkpoints" / "step-00000002" / "state.json").unlink()
    simulated = SimulatedDisk(run)
    trees: list[Tree] = []
    with simulated.connected(trees.append):
        save(run, numbered(2), keep=2)
    steps = []
    for index, tree in enumerate(trees):
        newest = load_newest(lay_out(tree, tmp_path / str(index)), print)
        assert newest is not None
        assert equal(read(newest.folder), numbered(newest.step))
        steps.append(newest.step)
    assert {*steps} == {1, 2}


def test_a_cache_entry_is_whole_or_not_there_wherever_the_power_goes(tmp_path: Path) -> None:
    losses = Losses(tmp_path / "disk")
    tensors = {"latents": torch.randn(4, 3), "condition": torch.ones(2)}
    cache = Cache(losses.root / "cache")
    losses.record(lambda: cache.write("latents", "key", tensors))
    states = losses.after(tmp_path / "after")
    there = 0
    for promised, root in states:
        found = Cache(root / "cache")
        assert found.has("latents", "key") or not promised
        if found.has("latents", "key"):
            there += 1
            entry = found.read("latents", "key")
            assert all(torch.equal(entry[name], tensor) for name, tensor in tensors.items())
    assert 0 < there < len(states)


def test_an_adapter_is_the_old_or_the_new_wherever_the_power_goes(tmp_path: Path) -> None:
    losses = Losses(tmp_path / "disk")
    path = losses.root / "out" / "adapter.safetensors"
    losses.record(*(lambda value=value: save_adapter(path, adapter(value), "comfyui") for value in (1.0, 2.0)))  # type: ignore[misc]
    values = set()
    for promised, root in losses.after(tmp_path / "after"):
        found = root / "out" / "adapter.safetensors"
        assert found.exists() or not promised
        if found.exists():
            (weight, *_) = read_adapter(found).state.values()
            value = float(weight.unique())  # one value only
            assert value >= promised
            values.add(value)
    assert values == {1.0, 2.0}


def test_a_folder_that_replaces_another_is_whole_and_the_old_one_beside_it(tmp_path: Path) -> None:
    losses = Losses(tmp_path / "disk")
    path = losses.root / "transformer"
    losses.record(
        *(
            lambda text=text: files.replace_folder(path, lambda staged: (staged / "a").write_text(text))  # type: ignore[misc]
            for text in ("old", "new")
        )
    )
    for promised, root in losses.after(tmp_path / "after"):
        whole = [
            folder
            for folder in root.iterdir()
            if folder.name in ("transformer", "transformer.staged-previous", "transformer.staged-latest")
            and files.damage(folder) is None
        ]
        assert files.damage(root / "transformer") is None or not (root / "transformer").exists()
        assert whole or not promised
        if promised == 2:
            assert (root / "transformer" / "a").read_text() == "new"


def test_a_text_is_the_old_or_the_new_wherever_the_power_goes(tmp_path: Path) -> None:
    losses = Losses(tmp_path / "disk")
    path = losses.root / "config.json"
    losses.record(lambda: files.write_json(path, 1), lambda: files.write_json(path, 2))
    for promised, root in losses.after(tmp_path / "after"):
        found = root / "config.json"
        assert found.exists() or not promised
        assert not found.exists() or json.loads(found.read_text()) >= max(promised, 1)


def staged(path: Path, *, synced: bool) -> None:
    """A file that is renamed to `path`; the folder is synced, the file before only if asked for."""
    with disk.writing(path.with_name("new")):
        path.with_name("new").write_text("content")
    if synced:
        disk.sync(path.with_name("new"))
    disk.rename(path.with_name("new"), path)
    disk.sync(path.parent)


@pytest.mark.parametrize("synced", [True, False])
def test_the_simulated_disk_loses_the_content_of_a_file_that_was_not_synced(tmp_path: Path, synced: bool) -> None:
    losses = Losses(tmp_path / "disk")
    losses.record(lambda: staged(losses.root / "a", synced=synced))
    contents = {tree["a"] for _, tree in losses.found if "a" in tree}
    assert contents == ({b"content"} if synced else {b"content", b"", b"con", bytes(7)})


@pytest.mark.parametrize("synced", [True, False])
def test_the_simulated_disk_loses_a_name_in_a_folder_that_was_not_synced(tmp_path: Path, synced: bool) -> None:
    losses = Losses(tmp_path / "disk")

    def write() -> None:
        disk.make_new(losses.root / "made")
        if synced:
            disk.sync(losses.root)
        staged(losses.root / "made" / "a", synced=True)

    losses.record(write)
    at_the_end = [tree for promised, tree in losses.found if promised]
    assert all("made/a" in tree for tree in at_the_end) == synced
