"""Hashes of clips: computed once, remembered by what tells a change, shared among ranks."""

import hashlib
import json
from pathlib import Path

import pytest

from longtake.data.claims import Claims
from longtake.data.hashes import NAME, content_hashes

Clips = dict[Path, str]


@pytest.fixture
def clips(tmp_path: Path) -> Clips:
    """Files and their hashes."""
    found = {}
    (tmp_path / "clips").mkdir()
    for index in range(20):
        path = tmp_path / "clips" / f"{index}.mp4"
        path.write_text(f"clip {index}")
        found[path] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def rank(folder: Path, number: int = 0, world: int = 1) -> Claims:
    """One of the ranks over a cache."""
    return Claims(folder / "cache", number, world, print, poll_seconds=0.001)


def memory(folder: Path) -> dict[str, str]:
    """What the file remembers."""
    return dict(json.loads((folder / "cache" / NAME).read_text()))


def test_the_hashes_are_those_of_the_contents(tmp_path: Path, clips: Clips) -> None:
    assert content_hashes(clips, rank(tmp_path)) == clips
    assert sorted(memory(tmp_path).values()) == sorted(clips.values())


def test_what_is_remembered_is_not_computed_again_unless_the_file_has_changed(tmp_path: Path, clips: Clips) -> None:
    content_hashes(clips, rank(tmp_path))
    (tmp_path / "cache" / NAME).write_text(json.dumps(dict.fromkeys(memory(tmp_path), "remembered")))
    assert set(content_hashes(clips, rank(tmp_path)).values()) == {"remembered"}
    changed = tmp_path / "clips" / "3.mp4"
    changed.write_text("another clip")
    found = content_hashes(clips, rank(tmp_path))
    assert found.pop(changed) == hashlib.sha256(b"another clip").hexdigest()
    assert set(found.values()) == {"remembered"}


@pytest.mark.parametrize("content", ["", "no JSON", "[1]", "3", b"\xff", "{{}: 1}"])
def test_a_memory_that_cannot_be_read_is_made_anew(tmp_path: Path, clips: Clips, content: str | bytes) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / NAME).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert content_hashes(clips, rank(tmp_path)) == clips
    assert len(memory(tmp_path)) == len(clips)


def test_a_hash_that_is_no_text_is_computed_again(tmp_path: Path, clips: Clips) -> None:
    content_hashes(clips, rank(tmp_path))
    (tmp_path / "cache" / NAME).write_text(json.dumps(dict.fromkeys(memory(tmp_path))))
    assert content_hashes(clips, rank(tmp_path)) == clips


def test_ranks_remember_what_one_process_does(tmp_path: Path, clips: Clips) -> None:
    assert content_hashes(clips, rank(tmp_path)) == clips
    whole = (tmp_path / "cache" / NAME).read_bytes()
    (tmp_path / "cache" / NAME).unlink()
    for number in (1, 0):
        assert content_hashes(clips, rank(tmp_path, number, 2)) == clips
        assert (tmp_path / "cache" / NAME).read_bytes() == whole
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [NAME]


def test_a_rank_that_was_overwritten_is_made_up_for(tmp_path: Path, clips: Clips) -> None:
    """The memory lacks what one rank has computed; the other computes it again and does not end before."""
    first = dict(list(clips.items())[:10])
    content_hashes(first, rank(tmp_path, 0, 2))
    kept = dict(list(memory(tmp_path).items())[:4])
    (tmp_path / "cache" / NAME).write_text(json.dumps(kept))
    assert content_hashes(clips, rank(tmp_path, 1, 2)) == clips
    assert len(memory(tmp_path)) == len(clips)
