# ruff: noqa: F722
"""Clips of one square that moves over a dark ground: the caption names its way, the first frame shows what it is.

Start and way are drawn independently of each other, so neither tells the other. Of the pairs of colour and way a
quarter is held out: every colour and every way is trained on, those pairs never are.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from longtake.data.video import write_clip

if TYPE_CHECKING:
    from jaxtyping import UInt8
    from torch import Tensor

GROUND = 24
COLOURS = {"red": (230, 50, 50), "yellow": (230, 210, 40), "blue": (60, 90, 240), "white": (235, 235, 235)}
WAYS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SIZES = {"small": 0.22, "big": 0.32}
"""Of the square, as a share of the picture's side."""
REPEATED = 8
VERBS = ("moves", "slides", "drifts")


@dataclass(frozen=True)
class Case:
    """One clip: what moves, from where (right and down, shares of the room that there is), and which way."""

    colour: str
    size: str
    way: str
    verb: str
    start: tuple[float, float]

    @property
    def caption(self) -> str:
        """Names all but the start; the way often, because to a random text encoder all letters matter alike."""
        return f"A {self.size} {self.colour} square {self.verb} {' '.join([self.way] * REPEATED)}."

    @property
    def silent_caption(self) -> str:
        """Names all but start and way."""
        return f"A {self.size} {self.colour} square {self.verb}."


@dataclass(frozen=True)
class Canvas:
    """The shape of the clips: pictures of `side` x `side` pixels, in which squares move by `travel` sides."""

    side: int
    frames: int
    travel: float

    def draw(self, case: Case) -> UInt8[Tensor, "frames 3 height width"]:
        """The clip."""
        clip = torch.full((self.frames, 3, self.side, self.side), GROUND, dtype=torch.uint8)
        colour = torch.tensor(COLOURS[case.colour], dtype=torch.uint8)[:, None, None]
        square, travel = round(SIZES[case.size] * self.side), self.travel * self.side
        room = self.side - 2 * travel - square
        for index, frame in enumerate(clip):
            moved = travel * index / (self.frames - 1)
            left, top = (
                round(travel + room * start + direction * moved)
                for start, direction in zip(case.start, WAYS[case.way], strict=True)
            )
            frame[:, top : top + square, left : left + square] = colour
        return clip

    def write(self, cases: Sequence[Case], folder: Path, fps: int, silent: bool) -> Path:
        """The cases as mp4, and the JSONL file that lists them with their captions; returns that file."""
        folder.mkdir(parents=True)
        rows = []
        for index, case in enumerate(cases):
            write_clip(self.draw(case), folder / f"{index}.mp4", float(fps))
            caption = case.silent_caption if silent else case.caption
            rows.append({"video": f"{index}.mp4", "start": 0.0, "frames": self.frames, "fps": fps, "caption": caption})
        (folder / "clips.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return folder / "clips.jsonl"


def training_cases(count: int) -> list[Case]:
    """`count` cases of the pairs of colour and way that are trained on."""
    return _cases(count, held_out=False)


def held_out_cases(count: int) -> list[Case]:
    """`count` cases of the held-out pairs, each way as often as the others; starts are new, too."""
    return _cases(count, held_out=True)


def _cases(count: int, held_out: bool) -> list[Case]:
    drawn = random.Random(f"held out: {held_out}")
    pairs = [(c, w) for i, w in enumerate(WAYS) for j, c in enumerate(COLOURS) if (i == j) == held_out]
    return [_case(*pairs[index % len(pairs)], drawn) for index in range(count)]


def _case(colour: str, way: str, drawn: random.Random) -> Case:
    return Case(colour, drawn.choice([*SIZES]), way, drawn.choice(VERBS), (drawn.random(), drawn.random()))
