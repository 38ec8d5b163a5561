# ruff: noqa: F722
"""Whether models that Longtake trains from random weights follow captions and images that they have not seen.

    python benchmarks/follows_conditions.py [tiny-t2v ...]

Each tiny model is trained on clips of a moving square (`synthetic_motion`), and again with captions and images swapped
among the clips. Both, and the model before training, are asked for videos of held-out cases. A share of them does what
it is told; the script prints these shares, and exits with 1 where one is not as it must be.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from condition_runs import Runs, Settings
from synthetic_motion import WAYS, Canvas, Case, held_out_cases

if TYPE_CHECKING:
    from condition_runs import Shown
    from jaxtyping import Float
    from torch import Tensor

AMONG = 8
"""Cases among which a video must be nearest to its own."""
KINDS = ("untrained", "shuffled", "trained")
HEAD = """\
| model | share of videos that show the right | chance | untrained | shuffled | trained | at least |
|---|---|--:|--:|--:|--:|--:|"""
MARGIN = 0.25
"""By how much the trained model's share must exceed the others'."""


@dataclass(frozen=True)
class Row:
    """A model, how it is trained and asked, and by measure the least share of videos that must do as they are told."""

    name: str
    canvas: Canvas
    settings: Settings
    cases: int
    least: Mapping[str, float]

    @property
    def silent(self) -> bool:
        """Whether captions leave out the way: in flf2v the images alone decide it."""
        return "flf2v" in self.name


_FAR, _NEAR = Canvas(32, 5, 0.28), Canvas(32, 5, 0.22)  # the less a square travels, the more starts there are
_TEXT = Settings(clips=96, steps=700, batch=4, learning_rate=4e-3, sample_steps=8, guidance=3.0)
_IMAGE = replace(_TEXT, guidance=2.0)
_TWO: dict[str, Any] = {"steps": 1000, "shift": 7.0}  # half of the steps, or nearly so, are the high-noise expert's

ROWS = (
    Row("tiny-t2v", _FAR, _TEXT, 32, {"way": 0.8}),
    Row("tiny-i2v", _NEAR, _IMAGE, 32, {"object": 0.4, "way": 0.65}),
    Row("tiny-flf2v", _NEAR, replace(_TEXT, steps=300, guidance=1.0), 32, {"first": 0.8, "last": 0.7}),
    Row("tiny-ti2v", replace(_NEAR, side=64), replace(_TEXT, steps=1200), 32, {"object": 0.5, "way": 0.5}),
    Row("tiny-t2v-a14b", _FAR, replace(_TEXT, **_TWO), 32, {"way": 0.8}),
    Row("tiny-i2v-a14b", _NEAR, replace(_IMAGE, **_TWO), 32, {"object": 0.4, "way": 0.65}),
)


SHORT = Row("tiny-t2v", _FAR, replace(_TEXT, clips=64, steps=450), 24, {"way": 0.6})
"""Up to a minute: less training, and less that it must reach."""


@dataclass(frozen=True)
class Found:
    """The share of videos that do as they are told, of each kind of model, and what one that guesses would reach."""

    name: str
    measure: str
    least: float
    chance: float
    shares: dict[str, float]

    @property
    def holds(self) -> bool:
        """Whether the trained model reaches the least share, and is better than the others by the margin."""
        trained = self.shares["trained"]
        others = [share for kind, share in self.shares.items() if kind != "trained"]
        return trained >= self.least and all(trained - share >= MARGIN for share in others)


def measured(row: Row, folder: Path, kinds: Sequence[str] = KINDS) -> list[Found]:
    """What `row` comes to, for models of `kinds` made in `folder`."""
    runs = Runs(row.name, folder, row.canvas, row.settings, row.silent)
    cases = held_out_cases(row.cases)
    requests = runs.requests(cases)
    videos = {kind: runs.sample(getattr(runs, kind)(), requests) for kind in kinds}
    judge = Judge(runs, cases)
    return [
        Found(
            row.name, name, least, judge.chance(name), {kind: judge.share(name, made) for kind, made in videos.items()}
        )
        for name, least in row.least.items()
    ]


class Judge:
    """Says which of `cases` a video shows: it is compared with clips as the model's VAE shows them."""

    def __init__(self, runs: Runs, cases: Sequence[Case]) -> None:
        self.cases = cases
        self.text_alone = runs.spec.task == "t2v"
        self.shown: Callable[[Case], Shown] = cache(runs.shown)

    def share(self, measure: str, videos: Sequence[Shown]) -> float:
        """The share of `videos`, one a case, that pass `measure`."""
        passes: Callable[[int, Shown], bool] = getattr(self, f"_{measure}")
        return sum(passes(index, video) for index, video in enumerate(videos)) / len(videos)

    def chance(self, measure: str) -> float:
        """The share of a model that guesses."""
        return 1 / (len(WAYS) if measure == "way" else AMONG)

    def _way(self, index: int, video: Shown) -> bool:
        """It moves as the caption says. Without an image the start is open, and what is brightest tells the way."""
        case = self.cases[index]
        if self.text_alone:
            return way_of(video) == case.way
        ways = [case.way, *(way for way in WAYS if way != case.way)]
        return _is_nearest(video[-4:], [self.shown(replace(case, way=way))[-4:] for way in ways])

    def _object(self, index: int, video: Shown) -> bool:
        """Its last frames show the case's object where it should be, rather than others that went the same way."""
        cases = [replace(case, way=self.cases[index].way) for case in self._among(index)]
        return _is_nearest(video[-4:], [self.shown(case)[-4:] for case in cases])

    def _first(self, index: int, video: Shown) -> bool:
        """Its first frame is the case's rather than others'."""
        return _is_nearest(video[:1], [self.shown(case)[:1] for case in self._among(index)])

    def _last(self, index: int, video: Shown) -> bool:
        """Its last frame is the case's rather than others'."""
        return _is_nearest(video[-1:], [self.shown(case)[-1:] for case in self._among(index)])

    def _among(self, index: int) -> list[Case]:
        """The case and the next ones."""
        return [self.cases[(index + further) % len(self.cases)] for further in range(AMONG)]


def _is_nearest(frames: Shown, candidates: Sequence[Shown]) -> bool:
    """Whether the first candidate is the nearest."""
    distances = [(frames - candidate).square().mean() for candidate in candidates]
    return int(torch.stack(distances).argmin()) == 0


def way_of(video: Shown) -> str:
    """The way in which what differs from the ground moves from the first frame to the last."""
    moved = _centre(video[-1]) - _centre(video[0])
    return max(WAYS, key=lambda way: float(moved @ torch.tensor(WAYS[way], dtype=torch.float32)))


def _centre(frame: Float[Tensor, "3 height width"]) -> Float[Tensor, 2]:
    """(right, down) of what differs from the median colour, in pixels."""
    pixels = frame.flatten(1)
    energy = (pixels - pixels.median(1, keepdim=True).values).square().sum(0).view(frame.shape[1:])
    energy = energy * (energy > energy.max() / 4)
    down, right = torch.meshgrid(*(torch.arange(length) for length in energy.shape), indexing="ij")
    return torch.stack([(energy * right).sum(), (energy * down).sum()]) / energy.sum()


def line(found: Found) -> str:
    """A row of the table."""
    shares = " | ".join(f"{found.shares[kind]:.2f}" for kind in KINDS)
    held = "" if found.holds else ", not held"
    return f"| {found.name} | {found.measure} | {found.chance:.2f} | {shares} | {found.least:.2f}{held} |"


def main(names: Sequence[str]) -> int:
    """The status."""
    found: list[Found] = []
    print(HEAD)
    for row in ROWS:
        if names and row.name not in names:
            continue
        with tempfile.TemporaryDirectory() as folder:
            results = measured(row, Path(folder))
        print("\n".join(map(line, results)), flush=True)
        found += results
    return 0 if all(result.holds for result in found) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
