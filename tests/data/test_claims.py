"""Claims: one owner at a time, kept fresh while it lives, taken over when it does not, and nothing left undone."""

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from longtake import files
from longtake.data.cache import STALE_SECONDS as HOUR
from longtake.data.cache import Cache
from longtake.data.claims import CLAIM, STALE_SECONDS, Claims, clock

ITEMS = ["a/0", "a/1", "a/2", "a/3", "a/4"]


def quiet(_text: str) -> None:
    """Says nothing."""


def ranks(folder: Path, say: Callable[[str], None] = quiet) -> tuple[Claims, Claims]:
    """Two ranks that do not wait for long."""
    return Claims(folder, 0, 2, say, poll_seconds=0.001), Claims(folder, 1, 2, say, poll_seconds=0.001)


def dead(folder: Path, name: str, age_seconds: float) -> Path:
    """The claim of a rank that was killed so long ago."""
    claim = folder / f"{name}{CLAIM}"
    claim.parent.mkdir(parents=True, exist_ok=True)
    claim.write_text("rank 7 (process 1 of elsewhere)\nmark\n")
    aged(claim, age_seconds)
    return claim


def aged(path: Path, seconds: float) -> None:
    """Dates the file back."""
    then = clock(path.parent) - seconds
    os.utime(path, (then, then))


def left(folder: Path) -> list[str]:
    """Files in `folder` and below."""
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_a_claim_has_one_owner_until_it_is_released(tmp_path: Path) -> None:
    one, other = ranks(tmp_path)
    with one.held("a/0", clock(tmp_path)) as mine:
        assert mine
        assert left(tmp_path) == ["0.claim"]
        with other.held("a/0", clock(tmp_path)) as too, other.held("a/1", clock(tmp_path)) as elsewhere:
            assert (too, elsewhere) == (False, True)
        assert left(tmp_path) == ["0.claim"]
    assert left(tmp_path) == []
    with other.held("a/0", clock(tmp_path)) as then:
        assert then


def test_a_claim_says_whose_it_is(tmp_path: Path) -> None:
    with ranks(tmp_path)[1].held("a/0", clock(tmp_path)):
        owner, mark, _ = (tmp_path / "a" / "0.claim").read_text().split("\n")
    assert owner == f"rank 1 (process {os.getpid()} of {socket.gethostname()})"
    assert len(mark) == 32


def test_an_error_releases_a_claim(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), ranks(tmp_path)[0].held("a/0", clock(tmp_path)):
        raise KeyboardInterrupt
    assert left(tmp_path) == []


@pytest.mark.parametrize(("age_seconds", "taken"), [(0.5 * STALE_SECONDS, False), (1.5 * STALE_SECONDS, True)])
def test_only_a_stale_claim_is_taken_over(tmp_path: Path, age_seconds: float, taken: bool) -> None:
    claim = dead(tmp_path, "a/0", age_seconds)
    with ranks(tmp_path)[0].held("a/0", clock(tmp_path)) as mine:
        assert mine == taken
        assert claim.read_text().startswith("rank 0" if taken else "rank 7")
        assert left(tmp_path) == ["0.claim"], "what was moved aside is gone"
    assert claim.exists() != taken


def test_who_was_stopped_for_long_leaves_alone_what_has_become_anothers(tmp_path: Path) -> None:
    one, other = ranks(tmp_path)
    with one.held("a/0", clock(tmp_path)):
        aged(tmp_path / "a" / "0.claim", 1.5 * STALE_SECONDS)
        second = other.held("a/0", clock(tmp_path))
        assert second.__enter__()
    assert (tmp_path / "a" / "0.claim").read_text().startswith("rank 1")
    second.__exit__(None, None, None)
    assert left(tmp_path) == []


class Slow(Claims):
    """A rank that has looked at a claim, and before it acts another takes the claim over."""

    def _is_stale(self, path: Path, now: float) -> bool:
        judged = super()._is_stale(path, now)
        if path.name == "0.claim":
            path.unlink()
            path.write_text("rank 8 (process 2 of elsewhere)\nmark\n")
        return judged


def test_of_two_that_saw_a_stale_claim_the_slower_leaves_it_to_the_faster(tmp_path: Path) -> None:
    claim = dead(tmp_path, "a/0", 1.5 * STALE_SECONDS)
    with Slow(tmp_path, 0, 2, quiet).held("a/0", clock(tmp_path)) as mine:
        assert not mine
    assert claim.read_text().startswith("rank 8")
    assert left(tmp_path) == ["0.claim"]


def test_a_claim_is_kept_fresh_while_its_owner_works(tmp_path: Path) -> None:
    claim, started = tmp_path / "a" / "0.claim", time.monotonic()
    with Claims(tmp_path, 0, 2, quiet, refresh_seconds=0.001).held("a/0", clock(tmp_path)):
        aged(claim, 1.5 * STALE_SECONDS)
        while clock(tmp_path) - claim.stat().st_mtime > STALE_SECONDS:
            assert time.monotonic() - started < STALE_SECONDS, "nothing refreshes it"
        claim.unlink()  # which ends neither the thread nor the work


def test_the_clock_is_that_of_the_file_system(tmp_path: Path) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    before.touch()
    now = clock(tmp_path)
    after.touch()
    assert before.stat().st_mtime <= now <= after.stat().st_mtime
    assert left(tmp_path) == ["after", "before"]


def test_one_rank_does_what_is_not_done_in_order_and_claims_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    found = [*Claims(folder, 0, 1, quiet).turns(ITEMS, str, lambda item: item == "a/1")]
    assert found == ["a/0", "a/2", "a/3", "a/4"]
    assert not folder.exists()


def test_two_ranks_do_each_its_share_and_nothing_twice(tmp_path: Path) -> None:
    done: set[str] = set()
    shares: tuple[list[str], list[str]] = ([], [])
    turns = [rank.turns(ITEMS, str, done.__contains__) for rank in ranks(tmp_path)]
    for number in (0, 1, 0, 1, 0):
        done.update(shares[number][-1:])
        shares[number].append(next(turns[number]))
    assert shares == (["a/0", "a/2", "a/4"], ["a/1", "a/3"])
    done.update(ITEMS)
    assert [next(each, None) for each in turns] == [None, None]
    assert left(tmp_path) == []


@pytest.mark.parametrize(("rank", "order"), [(0, [0, 2, 4, 1, 3]), (1, [1, 3, 0, 2, 4])])
def test_a_rank_without_others_does_their_shares_after_its_own(tmp_path: Path, rank: int, order: list[int]) -> None:
    done: set[str] = set()
    found = []
    for item in ranks(tmp_path)[rank].turns(ITEMS, str, done.__contains__):
        found.append(item)
        done.add(item)
    assert found == [ITEMS[index] for index in order]


class Item:
    """Something that another rank is at; `happen` is called when it is looked at for the fifth time."""

    def __init__(self, happen: Callable[[], None]) -> None:
        self.looks = 0
        self.done = False
        self.happen = happen

    def is_done(self, _name: str) -> bool:
        """Looks."""
        self.looks += 1
        if self.looks == 5:
            self.happen()
        return self.done


def test_a_rank_waits_for_what_another_is_at_and_ends_when_that_is_done(tmp_path: Path) -> None:
    one, other = ranks(tmp_path)

    def finish() -> None:
        item.done = True

    item = Item(finish)
    with other.held("a/0", clock(tmp_path)):
        assert [*one.turns(["a/0"], str, item.is_done)] == []
    assert item.looks == 5


@pytest.mark.parametrize("how", ["it is killed", "it fails"])
def test_a_rank_takes_over_what_another_does_not_finish(tmp_path: Path, how: str) -> None:
    claim = dead(tmp_path, "a/0", 0)
    item = Item(lambda: aged(claim, 1.5 * STALE_SECONDS) if how == "it is killed" else claim.unlink())
    turns = ranks(tmp_path)[0].turns(["a/0"], str, item.is_done)
    assert next(turns) == "a/0"
    assert item.looks >= 5
    assert claim.read_text().startswith("rank 0")
    turns.close()
    assert left(tmp_path) == []


def test_what_was_finished_between_the_look_and_the_claim_is_not_done_again(tmp_path: Path) -> None:
    answers = iter([False, True])
    assert [*ranks(tmp_path)[0].turns(["a/0"], str, lambda _name: next(answers))] == []
    assert next(answers, None) is None
    assert left(tmp_path) == []


def test_a_long_wait_is_said_once_with_whom_it_is_for(tmp_path: Path) -> None:
    said: list[str] = []
    dead(tmp_path, "a/0", -1000)  # kept fresh for long

    def finish() -> None:
        item.done = True

    item = Item(finish)
    rank = Claims(tmp_path, 0, 2, said.append, stale_seconds=0.002, poll_seconds=0.001)
    assert [*rank.turns(["a/0"], str, item.is_done)] == []
    assert said == ["waits for a/0, which rank 7 (process 1 of elsewhere) is at"]


def test_preparing_removes_claims_of_an_hour_ago_and_no_other(tmp_path: Path) -> None:
    old, young = dead(tmp_path, "latents/old", HOUR + 1), dead(tmp_path, "latents/young", HOUR - 60)
    aside = dead(tmp_path, f"latents/moved{CLAIM}{files.STAGED}0123", HOUR + 1)
    Cache(tmp_path).remove_staged()
    assert (old.exists(), young.exists(), aside.exists()) == (False, True, False)
