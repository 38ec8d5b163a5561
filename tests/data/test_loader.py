"""The sampler as a function of the step, the reader of entries, and reading ahead."""

import pickle
from collections import Counter
from pathlib import Path

import pytest
import torch

from longtake.data.cache import Cache, Entry
from longtake.data.loader import BucketSampler, EntryReader, Visit
from longtake.errors import CacheError


def entries(**buckets: int) -> list[Entry]:
    """So many clips in each bucket; `f5=3` are three of five frames, which serve all stages from 5 on."""
    found = []
    for name, count in buckets.items():
        frames = int(name[1:])
        found += [
            Entry(
                latents=f"{name}-{index}",
                image="",
                text="t",
                bucket=(frames, 32, 32),
                stages=tuple(stage for stage in (5, 9, 17) if stage >= frames),
                clip=f"{name}-{index}",
                prompt="",
                where="",
                split="train",
            )
            for index in range(count)
        ]
    return found


def visits(sampler: BucketSampler, steps: range) -> list[Visit]:
    return [visit for step in steps for visit in sampler.batch(step)]


def test_every_clip_comes_once_an_epoch_before_any_comes_again() -> None:
    sampler = BucketSampler(entries(f5=7), [(0, 5)], seed=0, global_batch_size=3)
    seen = visits(sampler, range(70))
    epochs = [seen[first : first + 7] for first in range(0, len(seen), 7)]
    for number, epoch in enumerate(epochs):
        assert sorted(visit.entry.latents for visit in epoch) == sorted(e.latents for e in entries(f5=7))
        assert {visit.epoch for visit in epoch} == {number}
    orders = {tuple(visit.entry.latents for visit in epoch) for epoch in epochs}
    assert len(orders) == len(epochs), "each epoch has its own order"
    assert len({visit.key for visit in seen}) == len(seen), "each visit draws its own noise"


def test_seeking_equals_going_there_step_by_step() -> None:
    clips = entries(f5=5, f9=3, f17=2)
    stages = [(0, 5), (10, 9), (40, 17)]
    there = BucketSampler(clips, stages, seed=3, global_batch_size=2)
    batches = [there.batch(step) for step in range(100)]
    for step in (99, 0, 41, 40, 39, 10, 9, 77):
        assert BucketSampler(clips, stages, seed=3, global_batch_size=2).batch(step) == batches[step]


def test_seeking_far_costs_no_more_than_seeking_near() -> None:
    sampler = BucketSampler(entries(f5=50, f9=37), [(0, 9)], seed=0, global_batch_size=4)
    shuffles = sampler.batch(10**12), sampler.batch(10**12)
    assert shuffles[0] == shuffles[1]
    assert len(shuffles[0]) == 4


def test_the_order_of_the_entries_does_not_matter_and_the_seed_does() -> None:
    clips = entries(f5=9, f9=4)
    steps = range(30)
    one = visits(BucketSampler(clips, [(0, 9)], 0, 2), steps)
    assert visits(BucketSampler(clips[::-1], [(0, 9)], 0, 2), steps) == one
    assert visits(BucketSampler(clips, [(0, 9)], 1, 2), steps) != one


def test_a_batch_is_of_one_bucket_and_buckets_come_in_proportion() -> None:
    clips = entries(f5=6, f9=4, f17=2)
    sampler = BucketSampler(clips, [(0, 17)], seed=0, global_batch_size=2)
    batches = [sampler.batch(step) for step in range(60)]
    assert all(len({visit.entry.bucket for visit in batch}) == 1 for batch in batches)
    shares = Counter(batch[0].entry.bucket[0] for batch in batches)
    assert shares == {5: 30, 9: 20, 17: 10}
    for lap in range(0, 60, 6):
        assert Counter(batch[0].entry.bucket[0] for batch in batches[lap : lap + 6]) == {5: 3, 9: 2, 17: 1}
    counts = Counter(visit.entry.latents for batch in batches for visit in batch)
    assert set(counts.values()) == {10}, "every clip is trained as often as every other"


def test_a_stage_has_the_clips_that_serve_it_and_begins_its_epochs_anew() -> None:
    sampler = BucketSampler(entries(f5=2, f9=2), [(0, 5), (4, 9)], seed=0, global_batch_size=1)
    batches = [sampler.batch(step)[0] for step in range(8)]
    assert {visit.entry.bucket[0] for visit in batches[:4]} == {5}
    assert Counter(visit.entry.bucket[0] for visit in batches[4:]) == {5: 2, 9: 2}
    assert [visit.stage for visit in batches] == [0] * 4 + [1] * 4
    assert batches[4].epoch == 0
    assert not {visit.key for visit in batches[:4]} & {visit.key for visit in batches[4:]}


def test_a_batch_larger_than_the_data_goes_on_into_the_next_epoch() -> None:
    sampler = BucketSampler(entries(f5=2), [(0, 5)], seed=0, global_batch_size=5)
    seen = visits(sampler, range(2))
    assert [visit.epoch for visit in seen] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_a_stage_without_clips_is_named() -> None:
    with pytest.raises(CacheError, match=r"no clip is left to train on at \[33\] frames"):
        BucketSampler(entries(f5=2), [(0, 5), (10, 33)], 0, 1)


def test_an_entry_is_read_with_the_empty_caption_beside_it(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    empty, text, latents = torch.zeros(1, 4), torch.randn(3, 4), torch.randn(16, 2, 4, 4)
    condition, image = torch.randn(20, 2, 4, 4), torch.randn(17, 8)
    cache.write("texts", "empty", {"prompt_embeds": empty})
    cache.write("texts", "t", {"prompt_embeds": text})
    cache.write("latents", "plain", {"latents": latents})
    cache.write("latents", "conditioned", {"latents": latents, "condition": condition})
    cache.write("images", "i", {"image_embeds": image})
    reader = EntryReader(cache, "empty")
    plain = Entry("plain", "", "t", (5, 32, 32), (5,), "c", "", "", "train")
    read = reader.read(plain)
    assert torch.equal(read.latents, latents)
    assert torch.equal(read.prompt_embeds, text)
    assert torch.equal(read.empty_embeds, empty)
    assert read.condition is None
    assert read.image_embeds is None
    conditioned = reader.read(Entry("conditioned", "i", "t", (5, 32, 32), (5,), "c", "", "", "train"))
    assert conditioned.condition is not None
    assert torch.equal(conditioned.condition, condition)
    assert conditioned.image_embeds is not None
    assert torch.equal(conditioned.image_embeds, image)


def test_a_sampler_is_the_same_in_another_process() -> None:
    sampler = BucketSampler(entries(f5=5, f9=3), [(0, 5), (10, 9)], seed=3, global_batch_size=2)
    expected = visits(sampler, range(30))
    assert visits(pickle.loads(pickle.dumps(sampler)), range(30)) == expected


def test_what_cannot_be_read_is_named_with_its_clip_and_the_file(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    for key in ("empty", "t"):
        cache.write("texts", key, {"prompt_embeds": torch.zeros(1, 4)})
    cache.write("latents", "l", {"latents": torch.zeros(16, 2, 4, 4)})
    reader = EntryReader(cache, "empty")
    cache.path("texts", "t").unlink()
    with pytest.raises(CacheError) as raised:
        reader.read(Entry("l", "", "t", (5, 32, 32), (5,), "c", "", "clips/kite.mp4", "train"))
    (problem,) = raised.value.problems
    assert problem.where == str(cache.path("texts", "t"))
    assert problem.what.startswith("the entry cannot be read (")
    assert problem.what.endswith("), of clip clips/kite.mp4")
    assert problem.remedy == "delete it and run `longtake prepare` again"
    assert reader.reading == ""


def test_an_empty_caption_that_is_damaged_is_said_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="the entry cannot be read"):
        EntryReader(Cache(tmp_path), "empty")


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_ranks_share_a_batch_whole_in_order_and_in_one_bucket(groups: int) -> None:
    sampler = BucketSampler(entries(f5=5, f9=3, f17=7), [(0, 5), (6, 9), (20, 17)], seed=2, global_batch_size=8)
    for step in range(60):
        shares = [sampler.share(step, own, groups) for own in range(groups)]
        assert [visit for share in shares for visit in share] == sampler.batch(step)
        assert {len(share) for share in shares} == {8 // groups}, "none waits for another"
        assert len({visit.entry.bucket for share in shares for visit in share}) == 1


def test_uneven_data_is_trained_once_an_epoch_by_whichever_rank() -> None:
    sampler = BucketSampler(entries(f5=7), [(0, 5)], seed=0, global_batch_size=4)
    seen = [visit for step in range(7) for own in range(4) for visit in sampler.share(step, own, 4)]
    assert Counter(visit.entry.latents for visit in seen) == dict.fromkeys((f"f5-{index}" for index in range(7)), 4)
    assert len({visit.key for visit in seen}) == 28
