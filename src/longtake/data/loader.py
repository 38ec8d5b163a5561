"""Which entries a step trains on, as a function of the step alone, and reading them."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import gcd
from typing import Any

import torch

from longtake.data.cache import Cache, Entry, Kind
from longtake.errors import CacheError, Problem

Stage = tuple[int, int]
"""(first step, frames) of a stage of the curriculum."""


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
            what = f"no clip is left to train on at {empty} frames"
            raise CacheError(Problem(what, "data", "add clips", code="data-no-clip-at-frames"))

    def batch(self, step: int) -> list[Visit]:
        """The visits of the global batch of optimiser step `step`, all of one bucket."""
        stage = max(index for index, (first, _) in enumerate(self.stages) if first <= step)
        within = step - self.stages[stage][0]
        sizes = tuple(len(entries) for entries in self.buckets[stage])
        lap, position = divmod(within, len(_lap_order(self.seed, stage, 0, sizes)))
        order = _lap_order(self.seed, stage, lap, sizes)
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
    """Reads and checks the tensors of entries; pickled, it reads the empty caption again where it goes.

    `reading` is the file that is being read, for a line that says what does not come.
    """

    def __init__(self, cache: Cache, empty_text: str) -> None:
        self.cache = cache
        self.empty_text = empty_text
        self.reading = ""
        assert self.empty is not None  # read now: what is damaged is said before anything begins

    @cached_property
    def empty(self) -> torch.Tensor:
        """The embedding of the empty caption; raises CacheError."""
        return self._read("texts", self.empty_text)["prompt_embeds"]

    def __getstate__(self) -> dict[str, Any]:
        return {"cache": self.cache, "empty_text": self.empty_text, "reading": ""}

    def read(self, entry: Entry) -> Tensors:
        """All tensors of `entry`; raises CacheError, which names the clip, where one is missing or damaged."""
        try:
            latents = self._read("latents", entry.latents)
            image = self._read("images", entry.image)["image_embeds"] if entry.image else None
            prompt = self._read("texts", entry.text)["prompt_embeds"]
            return Tensors(latents["latents"], latents.get("condition"), image, prompt, self.empty)
        except CacheError as error:
            named = [replace(problem, what=f"{problem.what}, of clip {entry.where}") for problem in error.problems]
            raise CacheError(named) from None

    def _read(self, kind: Kind, key: str) -> dict[str, torch.Tensor]:
        self.reading = str(self.cache.path(kind, key))
        try:
            return self.cache.read(kind, key)
        finally:
            self.reading = ""


@lru_cache(maxsize=32)
def _lap_order(seed: int, stage: int, lap: int, sizes: tuple[int, ...]) -> list[int]:
    """The buckets, by number, in the order in which a lap has them."""
    unit = gcd(*sizes)
    order = [bucket for bucket, size in enumerate(sizes) for _ in range(size // unit)]
    random.Random(f"{seed}:{stage}:{lap}").shuffle(order)
    return order


def _buckets(entries: Sequence[Entry], frames: int) -> list[list[Entry]]:
    chosen = [entry for entry in entries if frames in entry.stages]
    counts = Counter(entry.bucket for entry in chosen)
    ordered = sorted(chosen, key=lambda entry: (entry.latents, entry.text))
    return [[entry for entry in ordered if entry.bucket == bucket] for bucket in sorted(counts)]
