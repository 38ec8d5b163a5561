"""What is opened is the regular file that was meant, whatever has taken its place since."""

import os
from pathlib import Path

import pytest

from longtake.data.regular_files import content_hash, fingerprint, open_regular
from longtake.errors import DataError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data set, with its secret neighbour."""
    (tmp_path / "set" / "inner").mkdir(parents=True)
    (tmp_path / "set" / "inner" / "a.mp4").write_bytes(b"content")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "a.mp4").write_bytes(b"secret")
    return tmp_path.resolve() / "set"


def code_of(path: Path) -> str:
    with pytest.raises(DataError) as found, open_regular(path, "row 2"):
        pass
    (problem,) = found.value.problems
    assert problem.where == "row 2"
    return problem.code


def test_a_regular_file_is_read(root: Path) -> None:
    with open_regular(root / "inner" / "a.mp4", "row 2") as file:
        assert file.read() == b"content"


def test_a_folder_that_became_a_link_after_it_was_looked_at_is_not_followed(root: Path) -> None:
    path = root / "inner" / "a.mp4"
    content_hash(path)
    (root / "inner").rename(root / "before")
    (root / "inner").symlink_to(root.parent / "secret")
    assert path.read_bytes() == b"secret"
    assert code_of(path) == "file-unreadable"


def test_a_folder_that_may_be_entered_and_not_listed_is_gone_through(root: Path) -> None:
    (root / "inner").chmod(0o111)
    try:
        assert content_hash(root / "inner" / "a.mp4")
    finally:
        (root / "inner").chmod(0o755)


def test_a_fingerprint_is_of_the_first_64_kib_and_the_size_and_not_of_the_name(root: Path) -> None:
    content = {
        "a": bytes(100_000),
        "b": bytes(100_000),
        "other at the end": bytes(99_999) + b"x",
        "other at the 64 KiB": bytes(65_535) + b"x" + bytes(34_464),
        "longer": bytes(100_001),
        "short": b"x",
    }
    for name, written in content.items():
        (root / name).write_bytes(written)
    found = [fingerprint(root / name, "row 2") for name in content]
    assert found[0] == found[1] == found[2]
    assert len({*found}) == 4


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("gone", "file-missing"),
        ("empty", "file-empty"),
        ("link", "file-irregular"),
        ("pipe", "file-irregular"),
        ("folder", "file-irregular"),
    ],
)
def test_what_is_no_regular_file_is_refused_at_once(root: Path, name: str, code: str) -> None:
    (root / "empty").touch()
    (root / "link").symlink_to("inner/a.mp4")
    os.mkfifo(root / "pipe")
    (root / "folder").mkdir()
    assert code_of(root / name) == code
