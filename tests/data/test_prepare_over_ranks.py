"""`longtake prepare` in several processes: they make what one makes, once, and go on where one of them is killed."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from longtake import files
from longtake.config.dump import to_toml
from longtake.data import encode
from longtake.data.cache import STALE_SECONDS as HOUR
from longtake.data.claims import CLAIM, STALE_SECONDS
from longtake.progress import TimeLeft
from runs import Recorder, Scene, contents, scene, with_a_clip_that_breaks_off

# the audit event is os.replace's, too: every entry that is written is renamed to its name
NOTING = """
import os, sys
written = os.open(sys.argv.pop(1), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
def note(event, arguments):
    if event == "os.rename" and str(arguments[1]).endswith((".safetensors", ".rejected.json")):
        os.write(written, f"{arguments[1]}\\n".encode())
sys.addaudithook(note)
from longtake.cli import main
main()
"""


@dataclass(frozen=True)
class Rank:
    """A process of `longtake prepare` with the files that it fills."""

    process: subprocess.Popen[bytes]
    folder: Path

    def finish(self) -> "Rank":
        """Waits for its end, which must be a good one."""
        assert self.process.wait() == 0, self.said
        return self

    def kill(self) -> None:
        """With a signal that it cannot handle."""
        self.process.kill()
        assert self.process.wait() == -signal.SIGKILL

    @property
    def printed(self) -> str:
        """What it wrote to stdout."""
        return (self.folder / "stdout").read_text()

    @property
    def said(self) -> str:
        """What it wrote to stderr."""
        return (self.folder / "stderr").read_text()

    @property
    def left_out(self) -> list[str]:
        """The lines that say what it leaves out."""
        return [line for line in self.said.splitlines() if "left out: " in line]

    @property
    def written(self) -> list[str]:
        """The entries that it made or rejected."""
        return [Path(line).name for line in (self.folder / "written").read_text().splitlines()]


class Ranks:
    """Starts processes over the cache of `scene`; `whole` is the cache that one process made of the same clips."""

    def __init__(self, scene: Scene, folder: Path) -> None:
        self.scene = scene
        self.folder = folder
        self.config = folder / "run.toml"
        files.write_text(self.config, to_toml(scene.config(folder / "run")))
        whole = replace(scene, cache=folder / "whole")
        whole.prepare(whole.config(folder / "run"))
        self.whole = whole.cache
        self.started: list[Rank] = []

    def start(self, rank: int, world: int = 2) -> Rank:
        """Rank `rank` of `world`, which nobody coordinates."""
        folder = self.folder / f"process-{len(self.started)}"
        folder.mkdir()
        command = [sys.executable, "-c", NOTING, str(folder / "written"), "prepare", str(self.config)]
        environment = os.environ | {"RANK": str(rank), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
        with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
            process = subprocess.Popen(command, stdout=out, stderr=err, env=environment)
        self.started.append(Rank(process, folder))
        return self.started[-1]

    def assert_whole(self) -> None:
        """The cache has the files that one process makes, to the byte, and no other."""
        made, expected = contents(self.scene.cache), contents(self.whole)
        assert sorted(made) == sorted(expected)
        assert made == expected


@contextmanager
def ranks_over(scene: Scene, folder: Path) -> Iterator[Ranks]:
    """Ends what a failed test leaves running."""
    ranks = Ranks(scene, folder)
    try:
        yield ranks
    finally:
        for rank in ranks.started:
            rank.process.kill()
            rank.process.wait()


def stopped_in_the_middle(rank: Rank, cache: Path) -> Path:
    """Stops a rank while it is at a clip's latents, and gives its claim on them."""
    while True:
        assert rank.process.poll() is None, "it ended before it was stopped"
        for claim in claims_of(rank, cache):
            rank.process.send_signal(signal.SIGSTOP)
            _, status = os.waitpid(rank.process.pid, os.WUNTRACED)
            assert os.WIFSTOPPED(status)
            if claim in claims_of(rank, cache) and not entry_of(claim).exists():
                return claim
            rank.process.send_signal(signal.SIGCONT)
        time.sleep(0.001)


def claims_of(rank: Rank, cache: Path) -> list[Path]:
    """What a rank is at."""
    found = []
    for claim in (cache / "latents").glob(f"*{CLAIM}"):
        try:
            if f"(process {rank.process.pid} of " in claim.read_text():
                found.append(claim)
        except FileNotFoundError:
            continue
    return found


def entry_of(claim: Path) -> Path:
    """What is claimed."""
    return claim.with_name(claim.name.removesuffix(CLAIM) + ".safetensors")


def let_a_minute_pass(claims: Sequence[Path]) -> None:
    """Dates claims back, as if their owners had been dead for longer than a claim is good."""
    for claim in claims:
        then = claim.stat().st_mtime - 2 * STALE_SECONDS
        os.utime(claim, (then, then))


@pytest.fixture(scope="module")
def both(
    tiny_root: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Ranks, list[Rank]]]:
    """Two ranks at once over 20 clips and two that cannot be decoded; both have ended."""
    folder = tmp_path_factory.mktemp("both")
    clips = with_a_clip_that_breaks_off(scene("tiny-i2v", tiny_root("tiny-i2v"), folder, 20))
    with ranks_over(clips, folder) as ranks:
        yield ranks, [rank.finish() for rank in [ranks.start(0), ranks.start(1)]]


@pytest.mark.long
def test_two_processes_make_the_same_files_as_one(both: tuple[Ranks, list[Rank]]) -> None:
    both[0].assert_whole()


@pytest.mark.long
def test_two_processes_make_every_entry_once(both: tuple[Ranks, list[Rank]]) -> None:
    ranks, ended = both
    names = [path.name for path in ranks.whole.rglob("*") if path.name.endswith((".safetensors", ".rejected.json"))]
    assert Counter(ended[0].written + ended[1].written) == Counter(names)


@pytest.mark.long
def test_a_clip_is_rejected_by_one_of_two_processes_and_left_out_by_both(both: tuple[Ranks, list[Rank]]) -> None:
    first, second = both[1]
    rejected = [sum(name.endswith(".rejected.json") for name in rank.written) for rank in (first, second)]
    assert sum(rejected) == 4, "the latents and the image of each"
    assert rejected[0] <= len(first.left_out) <= 4, "it also says what it finds rejected"
    assert rejected[1] == len(second.left_out)
    assert all(line.startswith("rank 1: left out: clips/") for line in second.left_out)
    assert first.printed.startswith("20 clips ready in ")


@pytest.mark.long
def test_only_the_first_of_two_processes_shows_its_progress_and_the_end(both: tuple[Ranks, list[Rank]]) -> None:
    ended = both[1]
    assert "captions" in ended[0].said
    assert "captions" not in ended[1].said
    assert len(ended[0].printed.splitlines()) == 1
    assert ended[1].printed == ""


@pytest.mark.long
def test_a_rank_that_is_killed_leaves_nothing_undone(tiny_root: Callable[[str], Path], tmp_path: Path) -> None:
    with ranks_over(scene("tiny-t2v", tiny_root("tiny-t2v"), tmp_path, 6), tmp_path) as ranks:
        doomed = ranks.start(1)
        claim = stopped_in_the_middle(doomed, ranks.scene.cache)
        other = ranks.start(0)
        expected = len([*(ranks.whole / "latents").iterdir()])
        while len([*(ranks.scene.cache / "latents").glob("*.safetensors")]) < expected - 1:
            os.utime(claim)  # as the stopped rank does while it lives
            assert other.process.poll() is None, other.said
            time.sleep(0.001)
        assert not entry_of(claim).exists()
        assert other.process.poll() is None, "it waits for what the stopped rank is at"
        doomed.kill()
        let_a_minute_pass([claim])
        other.finish()
        ranks.assert_whole()
        assert entry_of(claim).name in other.written


@pytest.mark.long
def test_when_all_were_killed_another_start_finishes(tiny_root: Callable[[str], Path], tmp_path: Path) -> None:
    with ranks_over(scene("tiny-t2v", tiny_root("tiny-t2v"), tmp_path, 12), tmp_path) as ranks:
        claims = [stopped_in_the_middle(ranks.start(number), ranks.scene.cache) for number in (0, 1)]
        for rank in ranks.started:
            rank.kill()
        assert all(claim.exists() and not entry_of(claim).exists() for claim in claims)
        let_a_minute_pass(claims)
        for rank in [ranks.start(0), ranks.start(1)]:
            rank.finish()
        ranks.assert_whole()


@pytest.mark.long
def test_torchrun_prepares_with_all_its_ranks(tiny_root: Callable[[str], Path], tmp_path: Path) -> None:
    ranks = Ranks(scene("tiny-t2v", tiny_root("tiny-t2v"), tmp_path, 4), tmp_path)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "longtake", "prepare", str(ranks.config)]
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("4 clips ready in ") == 1
    ranks.assert_whole()


class Helped(Recorder):
    """Keeps what the bar of captions showed; when it appears, another rank has just made the entries `others`."""

    def __init__(self, others: Sequence[str], whole: Path, cache: Path) -> None:
        super().__init__()
        self.others = others
        self.whole = whole
        self.cache = cache
        self.shown: list[int] = []

    @contextmanager
    def bar(
        self, title: str, total: int, unit: str, done: int = 0, left: TimeLeft = lambda _done: None
    ) -> Iterator[Callable[[int, str], None]]:
        """A bar that is remembered."""
        if title != "captions":
            yield lambda _count, _text: None
            return
        assert (done, total) == (0, 5)
        for name in self.others:
            shutil.copy(self.whole / name, self.cache / name)
        yield lambda count, _text: self.shown.append(count)


@pytest.mark.parametrize(("count_seconds", "shown"), [(0.0, [3, 4, 5]), (HOUR, [1, 2, 3, 5])])
def test_the_bar_counts_what_other_ranks_have_made(
    tiny_root: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    count_seconds: float,
    shown: list[int],
) -> None:
    """At times as it goes on, and in the end."""
    monkeypatch.setattr(encode, "COUNT_SECONDS", count_seconds)
    one = scene("tiny-t2v", tiny_root("tiny-t2v"), tmp_path, 4)
    whole = replace(one, cache=tmp_path / "whole")
    manifest = whole.prepare(whole.config(tmp_path / "run"))
    others = [f"texts/{entry.text}.safetensors" for entry in manifest.entries[:2]]
    helped = Helped(others, whole.cache, one.cache)
    one.prepare(one.config(tmp_path / "run"), helped, ranks=(0, 2))
    assert helped.shown == shown
    assert contents(one.cache) == contents(whole.cache)
