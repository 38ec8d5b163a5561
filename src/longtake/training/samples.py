"""What a rank trains on in a step, read and drawn, as a function of the step alone.

Processes that read ahead import this file, so it reaches neither diffusers nor a model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor

from longtake.config.schema import TrainingConfig
from longtake.data.loader import BucketSampler, EntryReader, Tensors, Visit
from longtake.training.flow_matching import Draw, draw, quantile_of


@dataclass(frozen=True)
class Sample:
    """One visit, read and drawn."""

    visit: Visit
    tensors: Tensors
    draw: Draw


@dataclass(frozen=True)
class SampleReader:
    """Reads the samples of steps; it is pickled for the processes that do.

    `share` is which of the groups of ranks with clips of their own this rank is in, and how many there are;
    `sigma_ranges` has that of each expert.
    """

    sampler: BucketSampler
    share: tuple[int, int]
    reader: EntryReader
    training: TrainingConfig
    caption_dropout: float
    sigma_ranges: tuple[tuple[float, float], ...]

    def __call__(self, step: int) -> list[Sample]:
        """This rank's share of the global batch; raises CacheError where an entry is damaged or not there."""
        return self.read(self.sampler.share(step, *self.share), self.sigma_ranges[self.turn(step)])

    def read(self, visits: Sequence[Visit], sigma_range: tuple[float, float]) -> list[Sample]:
        """Samples of any visits."""
        return [read_sample(visit, self.reader, self.training, self.caption_dropout, sigma_range) for visit in visits]

    def turn(self, step: int) -> int:
        """Which of the experts the step is of."""
        return turn_of_step(step, self.sigma_ranges, self.training)

    def described(self, step: int) -> str:
        """What is read for a step, for a line that says that it does not come."""
        clips = dict.fromkeys(visit.entry.where for visit in self.sampler.share(step, *self.share))
        more = f" and {len(clips) - 3} more" if len(clips) > 3 else ""
        return f"{self.reader.reading or self.reader.cache.folder} (of {', '.join([*clips][:3])}{more})"


def read_sample(
    visit: Visit, reader: EntryReader, training: TrainingConfig, caption_dropout: float, sigmas: tuple[float, float]
) -> Sample:
    """The visit's cached tensors and its draw; raises CacheError where an entry is damaged."""
    tensors = reader.read(visit.entry)
    return Sample(visit, tensors, draw(visit.key, tuple(tensors.latents.shape), training, caption_dropout, sigmas))


def share_of_range(sigma_range: tuple[float, float], training: TrainingConfig) -> float:
    """The probability that a sigma of the whole distribution is in the range."""
    low, high = (quantile_of(sigma, training) for sigma in sigma_range)
    return high - low


def turn_of_step(step: int, sigma_ranges: Sequence[tuple[float, float]], training: TrainingConfig) -> int:
    """Which of the experts, by the ranges of sigma, optimiser step `step` trains, as a function of it alone.

    A step is of one expert, whose range all its sigmas are of. Of two, the first has step s where floor((s + 1) p) is
    above floor(s p), p being its share of the distribution: after any number of steps it has had its share of them.
    """
    if len(sigma_ranges) == 1:
        return 0
    share = round(share_of_range(sigma_ranges[0], training), 9)  # the last bits of a share are the machine's
    return 0 if floor((step + 1) * share) > floor(step * share) else 1
