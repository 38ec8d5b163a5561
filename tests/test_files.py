"""Files and folders that appear whole or not at all, and whose damage is found."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from longtake import files
from longtake.errors import RunError

LIMITED = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from longtake import files
from longtake.errors import RunError

target = Path(sys.argv[1])
tensors = {"weight": torch.zeros(100_000)}
for write in (
    lambda: files.write_file(target, lambda staged: save_file(tensors, staged)),
    lambda: files.write_text(target, "x" * 100_000),
    lambda: files.write_folder(target.with_name("new"), lambda staged: save_file(tensors, staged / "a.safetensors")),
):
    try:
        write()
        print("written")
    except RunError as error:
        print(error)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_two(folder: Path) -> Path:
    """A folder `made` with `a.bin` and `b.txt`."""

    def write(staged: Path) -> None:
        (staged / "a.bin").write_bytes(bytes(range(256)) * 4)
        (staged / "b.txt").write_text("text")

    files.write_folder(folder / "made", write)
    return folder / "made"


def test_a_file_appears_under_its_name_with_its_folders(tmp_path: Path) -> None:
    files.write_text(tmp_path / "new" / "a.txt", "fä\n")
    assert (tmp_path / "new" / "a.txt").read_bytes() == "fä\n".encode()
    files.write_json(tmp_path / "new" / "a.json", {"ä": [1, None]})
    assert json.loads((tmp_path / "new" / "a.json").read_text(encoding="utf-8")) == {"ä": [1, None]}
    assert names(tmp_path / "new") == ["a.json", "a.txt"]


def test_while_a_file_is_written_the_old_one_is_there(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    files.write_text(path, "old")

    def write(staged: Path) -> None:
        assert staged.parent == path.parent  # renaming is atomic within a file system only
        staged.write_text("half of the new")
        assert path.read_text() == "old"
        assert len(names(tmp_path)) == 2
        staged.write_text("new")

    files.write_file(path, write)
    assert path.read_text() == "new"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a.txt"
    files.write_text(path, "old")

    def write(staged: Path) -> None:
        staged.write_text("half")
        raise error

    with pytest.raises(type(error)):
        files.write_file(path, write)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_folder_appears_whole_with_a_manifest(tmp_path: Path) -> None:
    made = write_two(tmp_path)
    assert names(tmp_path) == ["made"]
    assert names(made) == ["a.bin", "b.txt", "manifest.json"]
    manifest = json.loads((made / "manifest.json").read_text())
    assert manifest["a.bin"] == {"bytes": 1024, "sha256": files.sha256(made / "a.bin")}
    assert files.damage(made) is None


def test_while_a_folder_is_written_its_name_is_free_and_a_failure_leaves_nothing(tmp_path: Path) -> None:
    def write(staged: Path) -> None:
        (staged / "a").write_text("half")
        assert not (tmp_path / "made").exists()
        raise ValueError

    with pytest.raises(ValueError):
        files.write_folder(tmp_path / "made", write)
    assert names(tmp_path) == []


def test_a_folder_never_replaces_one(tmp_path: Path) -> None:
    made = write_two(tmp_path)
    with pytest.raises(RunError, match="made: cannot write: Directory not empty"):
        files.write_folder(made, lambda staged: (staged / "c").touch())
    assert files.damage(made) is None
    assert names(tmp_path) == ["made"]


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[500] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda made: flip(made / "a.bin"), "a.bin has changed since it was written"),
        (lambda made: os.truncate(made / "a.bin", 1000), "a.bin has 1000 bytes instead of 1024"),
        (lambda made: (made / "b.txt").unlink(), "b.txt is missing"),
        (lambda made: (made / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda made: os.truncate(made / "manifest.json", 20), "its manifest cannot be read (JSONDecodeError)"),
        (lambda made: (made / "manifest.json").write_text("[]"), "its manifest cannot be read (AttributeError)"),
        (lambda made: (made / "manifest.json").write_text('{"a.bin": 3}'), "its manifest cannot be read (TypeError)"),
        (lambda made: (made / "manifest.json").write_bytes(b"\xff"), "its manifest cannot be read (UnicodeDecodeErro"),
    ],
)
def test_damage_is_named(tmp_path: Path, harm: object, said: str) -> None:
    made = write_two(tmp_path)
    harm(made)  # type: ignore[operator]
    assert (files.damage(made) or "").startswith(said)


def test_every_single_flipped_byte_is_found(tmp_path: Path) -> None:
    made = write_two(tmp_path)
    content = (made / "b.txt").read_bytes()
    for index in range(len(content)):
        for bit in range(8):
            harmed = bytearray(content)
            harmed[index] ^= 1 << bit
            (made / "b.txt").write_bytes(harmed)
            assert files.damage(made) is not None
    (made / "b.txt").write_bytes(content)
    assert files.damage(made) is None


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    made = write_two(tmp_path)
    (tmp_path / f"a.txt{files.STAGED}0123").touch()
    (tmp_path / f"step{files.STAGED}0123").mkdir()
    (tmp_path / f"step{files.STAGED}0123" / "file").touch()
    files.remove_staged(tmp_path)
    assert names(tmp_path) == ["made"]
    assert files.damage(made) is None
    files.remove_staged(tmp_path / "absent")


def test_a_place_that_takes_no_file_is_a_run_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for write in (
        lambda path: files.write_text(path, "x"),
        lambda path: files.write_folder(path, lambda staged: None),
    ):
        with pytest.raises(RunError, match=r"below: cannot write: .*file is no folder; give another place") as caught:
            write(tmp_path / "file" / "below")
        assert caught.value.exit_status == 1
        assert len(caught.value.problems) == 1


def test_a_disk_that_is_full_is_a_run_error_whoever_writes_and_the_old_file_stays(tmp_path: Path) -> None:
    target = tmp_path / "weights.safetensors"
    save_file({"weight": torch.ones(3)}, target)
    before = target.read_bytes()
    child = subprocess.run(
        [sys.executable, "-c", LIMITED, str(target)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)),
    )
    lines = child.stdout.splitlines()
    assert len(lines) == 3
    assert all("cannot write: " in line and "File too large" in line and "are free there" in line for line in lines)
    assert target.read_bytes() == before
    assert names(tmp_path) == ["weights.safetensors"]
