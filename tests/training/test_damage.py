"""Checkpoints that a disk has damaged, in any file and in any way: named, never read, and the one before is taken."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from longtake import files
from longtake.training.checkpoint import checkpoint_path, load_newest
from rank_threads import on_ranks
from saved import Saved, equal, numbered, read, save

WORLDS = (1, 2)
POSITIONS = (0, 1, 7, 8, 9, 0.3, 0.6, -4, -1)
"""Bytes, or shares of the length: safetensors has the header's length in the first eight."""

Harm = Callable[[Path, Path], None]


def flipped(position: float, bit: int) -> Harm:
    """One bit of one byte."""

    def harm(file: Path, _before: Path) -> None:
        content = bytearray(file.read_bytes())
        content[position if isinstance(position, int) else int(position * len(content))] ^= 1 << bit
        file.write_bytes(content)

    return harm


def rewritten(change: Callable[[bytes], bytes]) -> Harm:
    """The file's content becomes another."""

    def harm(file: Path, _before: Path) -> None:
        file.write_bytes(change(file.read_bytes()))

    return harm


def removed(file: Path, _before: Path) -> None:
    """The file goes."""
    file.unlink()


def a_folder(file: Path, _before: Path) -> None:
    """A folder has the file's name."""
    file.unlink()
    file.mkdir()


def older(file: Path, before: Path) -> None:
    """The file of the checkpoint before, which is whole and of the same size."""
    shutil.copy(before / file.name, file)


HARMS: Mapping[str, Harm] = {
    **{f"a bit of byte {position}": flipped(position, index % 8) for index, position in enumerate(POSITIONS)},
    "a byte less": rewritten(lambda content: content[:-1]),
    "half": rewritten(lambda content: content[: len(content) // 2]),
    "eight bytes": rewritten(lambda content: content[:8]),
    "empty": rewritten(lambda content: b""),
    "a byte more": rewritten(lambda content: content + b"\0"),
    "zeros": rewritten(lambda content: bytes(len(content))),
    "zeros at the end": rewritten(lambda content: content[:-16] + bytes(16)),
    "removed": removed,
    "a folder": a_folder,
    "older": older,
}


def sharded(run: Path, saved: Saved, world: int) -> Path:
    """Writes the checkpoint from `world` ranks, each of which has a part of every tensor."""
    on_ranks(world, lambda ranks: save(run, saved, 2, ranks))
    return checkpoint_path(run, saved.step)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """A run with two checkpoints, each of that many ranks."""
    runs = {world: tmp_path_factory.mktemp("whole") for world in WORLDS}
    for world, run in runs.items():
        for step in (1, 2):
            sharded(run, numbered(step), world)
    return runs.__getitem__


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def found_instead(run: Path) -> str:
    """What is said of the checkpoint after step 2, instead of which the one before is found as it was written."""
    said: list[str] = []
    newest = load_newest(run, said.append)
    assert newest is not None
    assert newest.step == 1
    assert equal(read(newest.folder), numbered(1))
    (line,) = said
    assert line.startswith(f"{checkpoint_path(run, 2)}: the checkpoint is damaged (")
    return line


@pytest.mark.parametrize("world", WORLDS)
def test_what_any_number_of_ranks_wrote_comes_back_whole(whole: Callable[[int], Path], world: int) -> None:
    folder = checkpoint_path(whole(world), 2)
    assert len(names(folder)) == 3 * world + 2
    newest = load_newest(whole(world), pytest.fail)
    assert newest is not None
    assert equal(read(newest.folder), numbered(2))


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("kind", HARMS)
def test_damage_in_any_file_is_named_and_the_checkpoint_before_is_found(
    tmp_path: Path, whole: Callable[[int], Path], world: int, kind: str
) -> None:
    for name in names(checkpoint_path(whole(world), 2)):
        run = shutil.copytree(whole(world), tmp_path / name)
        file = checkpoint_path(run, 2) / name
        HARMS[kind](file, checkpoint_path(run, 1))
        line = found_instead(run)
        assert name in line or name == files.MANIFEST


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("added", ["notes.txt", "trained-00003-of-00003.safetensors", "zeros.safetensors", "a/"])
def test_what_was_added_is_named_and_the_checkpoint_before_is_found(
    tmp_path: Path, whole: Callable[[int], Path], world: int, added: str
) -> None:
    run = shutil.copytree(whole(world), tmp_path / "run")
    folder = checkpoint_path(run, 2)
    if added.endswith("/"):
        (folder / added).mkdir()
    else:
        shutil.copy(next(checkpoint_path(run, 1).glob("trained*")), folder / added)
    assert f"{added.removesuffix('/')} is not in its manifest" in found_instead(run)


def test_hidden_files_that_systems_leave_are_no_damage(tmp_path: Path, whole: Callable[[int], Path]) -> None:
    run = shutil.copytree(whole(1), tmp_path / "run")
    for name in (".DS_Store", ".nfs000000000001"):
        (checkpoint_path(run, 2) / name).touch()
    newest = load_newest(run, pytest.fail)
    assert newest is not None
    assert newest.step == 2


@pytest.mark.parametrize("content", ["{}", "[]", "null", "[" * 100_000, '{"state.json": {}}', '{"state.json": []}'])
def test_a_manifest_that_says_nothing_is_named(tmp_path: Path, whole: Callable[[int], Path], content: str) -> None:
    run = shutil.copytree(whole(1), tmp_path / "run")
    (checkpoint_path(run, 2) / files.MANIFEST).write_text(content)
    assert "the checkpoint is damaged" in found_instead(run)


@pytest.mark.parametrize("bit", [0, 5])  # the second makes capitals of letters
def test_every_flipped_byte_of_a_manifest_is_noticed(tmp_path: Path, whole: Callable[[int], Path], bit: int) -> None:
    run = shutil.copytree(whole(1), tmp_path / "run")
    manifest = checkpoint_path(run, 2) / files.MANIFEST
    content = manifest.read_bytes()
    for index in range(len(content)):
        harmed = bytearray(content)
        harmed[index] ^= 1 << bit
        manifest.write_bytes(harmed)
        assert files.damage(manifest.parent) is not None, harmed[max(0, index - 20) : index + 20]


def test_a_checkpoint_by_another_step_s_name_is_not_taken_for_it(tmp_path: Path, whole: Callable[[int], Path]) -> None:
    run = shutil.copytree(whole(1), tmp_path / "run")
    shutil.rmtree(checkpoint_path(run, 2))
    shutil.copytree(checkpoint_path(run, 1), checkpoint_path(run, 2))
    assert "it is the one after step 1" in found_instead(run)
