"""Malicious pickles in every place where a file is read: none is run, each is refused in an error's line."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from longtake.errors import LongtakeError
from malicious import malicious_pickles, unpickled
from read_files import DOCTOR, STEP, Place, Slot, component_slots, every_file, run_slots, slow_slots, transformer_slots
from releases import original_vae

SLOTS = transformer_slots() | component_slots() | run_slots()
SLOW = slow_slots()
REFUSED = "refused"


@dataclass(frozen=True)
class Attack:
    """The pickles by name, and the folder where each would leave a file of its name."""

    marks: Path
    pickles: dict[str, bytes]

    def left(self) -> list[str]:
        return sorted(path.name for path in self.marks.iterdir())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_root: Callable[[str], Path]) -> Place:
    return every_file(tmp_path_factory.mktemp("files"), tiny_root)


@pytest.fixture(scope="module")
def pickled(tmp_path_factory: pytest.TempPathFactory, tiny_root: Callable[[str], Path]) -> Attack:
    marks = tmp_path_factory.mktemp("marks")
    return Attack(marks, malicious_pickles(marks, original_vae(tiny_root("tiny-i2v"))))


@pytest.fixture
def attack(pickled: Attack) -> Attack:
    """Of which no test has left anything."""
    for path in pickled.marks.iterdir():
        path.unlink()
    return pickled


def came_of(place: Place, slot: Slot, content: bytes) -> str:
    """`REFUSED`, or what else was said of `content` in the slot."""
    with place.holding(slot, content) as path:
        if isinstance(slot.read, str):
            outcome = place.run(slot.read, path)
            status, lines = outcome.status, outcome.errors
            said = "\n".join(line for line in outcome.err.splitlines() if "--set" not in line)
        else:
            try:
                slot.read(path)
            except LongtakeError as error:
                status, said = error.exit_status, str(error)
                lines = said.splitlines()
            else:
                status, said, lines = 0, "", []
    named = any(name in said for name in {path.name, path.parent.name} - {place.folder.name})
    return REFUSED if status in (1, 2) and lines and named else f"status {status}: {said}"


def test_each_would_run_where_it_is_read_without_care(attack: Attack) -> None:
    for name, content in attack.pickles.items():
        unpickled(name, content)
    assert attack.left() == sorted(attack.pickles)


@pytest.mark.parametrize("name", SLOTS)
def test_none_runs_wherever_a_file_is_read(place: Place, attack: Attack, name: str) -> None:
    found = {form: came_of(place, SLOTS[name], content) for form, content in attack.pickles.items()}
    assert found == dict.fromkeys(attack.pickles, REFUSED)
    assert attack.left() == []


@pytest.mark.parametrize("name", SLOW)
def test_none_runs_when_a_cache_is_prepared_or_a_run_begins_or_goes_on(place: Place, attack: Attack, name: str) -> None:
    assert came_of(place, SLOW[name], attack.pickles["among tensors"]) == REFUSED
    assert attack.left() == []


@pytest.mark.parametrize("ending", [".mp4", ".mkv", ".png", ".jpg", ".webp", ".txt"])
def test_none_runs_as_a_clip_a_still_or_a_caption(place: Place, attack: Attack, tmp_path: Path, ending: str) -> None:
    """A pickle that is text is, as a caption, the text that it is."""
    for name, content in attack.pickles.items():
        shutil.copy(place.folder / "data" / "a.mp4", tmp_path / f"{name}.mp4")
        (tmp_path / f"{name}.txt").write_text("a caption")
        (tmp_path / f"{name}{ending}").write_bytes(content)
        if ending in (".mkv", ".png", ".jpg", ".webp"):
            (tmp_path / f"{name}.mp4").unlink()
    outcome = place.run(DOCTOR + "data.source={path}", tmp_path)
    text = {name for name, content in attack.pickles.items() if content.isascii() and b"\0" not in content}
    clip, refused = (".mp4", attack.pickles.keys() - text) if ending == ".txt" else (ending, attack.pickles)
    assert outcome.status == 2
    assert {line.partition(": ")[0] for line in outcome.errors} == {
        "dataset",
        *(f"{tmp_path.name}/{name}{clip}" for name in refused),
    }
    assert attack.left() == []


def test_what_a_run_and_a_cache_only_note_for_themselves_is_made_anew(place: Place, attack: Attack) -> None:
    notes = [place.folder / "run" / name for name in (".job", "metrics.jsonl", "plan.json", "report.html", "README.md")]
    for path in (*notes, place.folder / "cache" / "t2v" / "hashes.json"):
        path.write_bytes(attack.pickles["stack global"])
    assert place.run("prepare {path}", place.folder / "t2v.toml").status == 0
    assert place.run("train {path} --resume", place.folder / "t2v.toml").status == 0
    assert attack.left() == []
    assert (place.folder / STEP).is_dir()
