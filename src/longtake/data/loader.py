"""Which entries a step trains on, as a function of the step alone, and reading them ahead of need."""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from math import gcd
from typing import Generic, TypeVar

import torch

from longtake.data.cache import Cache, Entry
from longtake.errors import CacheError, Problem

Stage = tuple[int, int]
"""(first step, frames) of a stage of the curriculum."""

Loaded = TypeVar("Loaded")


@dataclass(frozen=True)
class Visit:
    """One use of an entry: `epoch` counts how often its bucket has been gone through in its stage before."""

    entry: Entry
    stage: int
    epoch: int

    @property
    def key(self) -> str:
        """What the visit's random draws are a function of, beside the seed."""
        return f"{self.stage}:{self.epoch}:{self.entry.latents}"


class BucketSampler:
    """Global batches of one bucket each, a pure function of the step: seeking costs nothing.

    Each bucket is an endless sequence of shuffled epochs, so no clip is trained twice before all others of its bucket
    were. Within a lap the buckets take turns in shuffled order, each as often as its share of the clips.
    """

    def __init__(self, entries: Sequence[Entry], stages: Sequence[Stage], seed: int, global_batch_size: int) -> None:
        self.stages = list(stages)
        self.seed = seed
        self.global_batch_size = global_batch_size
        self.buckets = [_buckets(entries, frames) for _, frames in stages]
        empty = [frames for (_, frames), buckets in zip(stages, self.buckets, strict=True) if not buckets]
        if empty:
            raise CacheError(Problem(f"no clip is left to train on at {empty} frames", "data", "add clips"))
        self._lap = lru_cache(maxsize=8)(self._lap_order)

    def batch(self, step: int) -> list[Visit]:
        """The visits of the global batch of optimiser step `step`, all of one bucket."""
        stage = max(index for index, (first, _) in enumerate(self.stages) if first <= step)
        within = step - self.stages[stage][0]
        lap_size = len(self._lap(stage, 0))
        lap, position = divmod(within, lap_size)
        order = self._lap(stage, lap)
        bucket = order[position]
        batch = lap * order.count(bucket) + order[:position].count(bucket)
        first = batch * self.global_batch_size
        return [self._visit(stage, bucket, index) for index in range(first, first + self.global_batch_size)]

    def share(self, step: int, own: int, groups: int) -> list[Visit]:
        """The part of `batch` that the ranks of group `own` of `groups` train on: neighbours, as one process has them.

        The batch is of one bucket, so that all ranks have as much to do; it must come out even.
        """
        visits = self.batch(step)
        size, rest = divmod(len(visits), groups)
        assert not rest, "a batch that ranks cannot share"
        return visits[own * size : (own + 1) * size]

    def largest(self, tokens: Callable[[int, int, int], int], size: int, first_step: int) -> list[Visit]:
        """`size` visits of the bucket with the most `tokens` among those that are trained from `first_step` on."""
        begun = max(index for index, (first, _) in enumerate(self.stages) if first <= first_step)
        buckets = [(stage, entries) for stage in range(begun, len(self.stages)) for entries in self.buckets[stage]]
        stage, entries = max(buckets, key=lambda found: tokens(*found[1][0].bucket))
        return [Visit(entries[index % len(entries)], stage, 0) for index in range(size)]

    def _visit(self, stage: int, bucket: int, index: int) -> Visit:
        entries = self.buckets[stage][bucket]
        epoch, position = divmod(index, len(entries))
        order = list(range(len(entries)))
        random.Random(f"{self.seed}:{stage}:{bucket}:{epoch}").shuffle(order)
        return Visit(entries[order[position]], stage, epoch)

    def _lap_order(self, stage: int, lap: int) -> list[int]:
        sizes = [len(entries) for entries in self.buckets[stage]]
        unit = gcd(*sizes)
        order = [bucket for bucket, size in enumerate(sizes) for _ in range(size // unit)]
        random.Random(f"{self.seed}:{stage}:{lap}").shuffle(order)
        return order


@dataclass(frozen=True)
class Tensors:
    """The cached tensors of one entry; shapes without the batch axis. Absent ones are None.

    `latents` [channels, frames, height, width], `condition` [20, frames, height, width], `image_embeds`
    [image tokens, dim], `prompt_embeds` and `empty_embeds` [true tokens, dim].
    """

    latents: torch.Tensor
    condition: torch.Tensor | None
    image_embeds: torch.Tensor | None
    prompt_embeds: torch.Tensor
    empty_embeds: torch.Tensor


class EntryReader:
    """Reads and checks the tensors of entries."""

    def __init__(self, cache: Cache, empty_text: str) -> None:
        self.cache = cache
        self.empty = cache.read("texts", empty_text)["prompt_embeds"]

    def read(self, entry: Entry) -> Tensors:
        """All tensors of `entry`; raises CacheError where one is missing or damaged."""
        latents = self.cache.read("latents", entry.latents)
        image = self.cache.read("images", entry.image)["image_embeds"] if entry.image else None
        prompt = self.cache.read("texts", entry.text)["prompt_embeds"]
        return Tensors(latents["latents"], latents.get("condition"), image, prompt, self.empty)


class Prefetcher(Generic[Loaded]):
    """Calls `load` for the next step on a thread while the current one is used."""

    def __init__(self, load: Callable[[int], Loaded], last: int) -> None:
        self.load = load
        self.last = last

    def steps(self, first: int) -> Iterator[tuple[int, Loaded]]:
        """(step, loaded) from `first` to before `last`, in order; errors of `load` are raised here."""
        with ThreadPoolExecutor(1, thread_name_prefix="loader") as pool:
            ahead = pool.submit(self.load, first) if first < self.last else None
            for step in range(first, self.last):
                assert ahead is not None
                loaded = ahead.result()
                ahead = pool.submit(self.load, step + 1) if step + 1 < self.last else None
                yield step, loaded


def _buckets(entries: Sequence[Entry], frames: int) -> list[list[Entry]]:
    chosen = [entry for entry in entries if frames in entry.stages]
    counts = Counter(entry.bucket for entry in chosen)
    ordered = sorted(chosen, key=lambda entry: (entry.latents, entry.text))
    return [[entry for entry in ordered if entry.bucket == bucket] for bucket in sorted(counts)]
