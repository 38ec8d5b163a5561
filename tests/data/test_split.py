"""Which clips are held out: whole clips, by seed, and never all of them."""

import pytest

from longtake.data.cache import Entry
from longtake.data.split import split


def entries(clips: int, buckets: int = 2, held: int = 0) -> list[Entry]:
    """`clips` clips in `buckets` buckets each; the last `held` come from a validation source."""
    return [
        Entry(
            latents=f"{clip}-{bucket}",
            image="",
            text="t",
            bucket=(4 * bucket + 1, 32, 32),
            stages=(4 * bucket + 1,),
            clip=f"clip{clip}",
            prompt="",
            where=f"row {clip}",
            split="validation" if clip >= clips - held else "train",
        )
        for clip in range(clips)
        for bucket in range(buckets)
    ]


@pytest.mark.parametrize(
    ("share", "clips", "held"),
    [(0.0, 20, 0), (0.05, 20, 1), (0.05, 5, 1), (0.25, 20, 5), (1.0, 4, 3), (0.05, 1, 0), (0.5, 2, 1), (0.01, 40, 1)],
)
def test_a_share_of_the_clips_is_held_out(share: float, clips: int, held: int) -> None:
    training, validation = split(entries(clips), share, seed=0)
    assert len({entry.clip for entry in validation}) == held
    assert sorted(training + validation, key=lambda entry: entry.latents) == sorted(
        entries(clips), key=lambda entry: entry.latents
    )


def test_a_clip_is_on_one_side_with_all_its_buckets() -> None:
    training, validation = split(entries(20, buckets=3), 0.3, seed=1)
    assert not {entry.clip for entry in training} & {entry.clip for entry in validation}
    assert len(validation) == 6 * 3


def test_the_choice_is_a_function_of_the_seed_and_not_of_the_order() -> None:
    first = split(entries(30), 0.2, seed=0)[1]
    assert {e.clip for e in split(entries(30)[::-1], 0.2, seed=0)[1]} == {entry.clip for entry in first}
    assert {e.clip for e in split(entries(30), 0.2, seed=1)[1]} != {entry.clip for entry in first}


def test_a_clip_that_joins_moves_few_others() -> None:
    before = {entry.clip for entry in split(entries(40), 0.25, seed=0)[1]}
    after = {entry.clip for entry in split(entries(41), 0.25, seed=0)[1]}
    assert len(before ^ after) <= 2


def test_a_source_of_its_own_is_held_out_as_it_is() -> None:
    training, validation = split(entries(6, held=2), "held-out.csv", seed=0)
    assert {entry.clip for entry in validation} == {"clip4", "clip5"}
    assert {entry.clip for entry in training} == {f"clip{index}" for index in range(4)}
