"""Draws docs/memory-over-time.svg: the device memory of one traced LoRA training step under three strategies.

python benchmarks/memory_over_time.py
python benchmarks/memory_over_time.py --out picture.svg
"""

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path

from meta_training import Step, meta_batch, trace
from trace_step import MOST_FRUGAL, PLAIN, SWAPPED, Case, model_of, strategies

PICTURE = Path(__file__).parents[1] / "docs" / "memory-over-time.svg"
CASE = Case("wan2.1-i2v-14b-480p", (832, 480), 32)
FRAMES = 129
LABELS = {
    PLAIN: "gradient checkpointing per block",
    SWAPPED: "+ inputs to host, all blocks swapped",
    MOST_FRUGAL: "+ 16 slices, 4 head groups, optimiser in host memory",
}
CARDS = (80, 16)
"""GiB at which a line is drawn."""
WIDTH, HEIGHT = 860, 430
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 84, 46
INTERVALS = 720
"""Each shows the greatest number of bytes in it."""
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #444 }
.title { font-weight: 600; fill: #111 }
.grid { stroke: #8884; stroke-width: 1 }
.card { stroke: #777; stroke-width: 1.2; stroke-dasharray: 6 4 }
.line { fill: none; stroke-width: 1.8; stroke-linejoin: round }
.a { stroke: #c2410c } .b { stroke: #7c3aed } .c { stroke: #0f766e }
@media (prefers-color-scheme: dark) {
  text { fill: #bbb } .title { fill: #eee } .card { stroke: #999 }
  .a { stroke: #fb923c } .b { stroke: #a78bfa } .c { stroke: #2dd4bf }
}
"""


@dataclass(frozen=True)
class Frame:
    """Maps FLOPs and bytes onto the picture."""

    flops: float
    gib: float

    def across(self, flops: float) -> float:
        """Pixels from the left."""
        return LEFT + flops / self.flops * (WIDTH - LEFT - RIGHT)

    def up(self, gib: float) -> float:
        """Pixels from the top."""
        return HEIGHT - BOTTOM - gib / self.gib * (HEIGHT - TOP - BOTTOM)


def traced() -> dict[str, Step]:
    """A step under each strategy of LABELS."""
    model = model_of(CASE)
    named = strategies(len(model.transformer.blocks))
    return {name: trace(model, named[name], meta_batch(model.spec, FRAMES, CASE.size)) for name in LABELS}


def picture(steps: Mapping[str, Step]) -> str:
    """The SVG, which reads on light and on dark pages."""
    frame = Frame(max(step.flops for step in steps.values()), 1.08 * max(CARDS))
    what = f"{CASE.model}, {CASE.size[0]}x{CASE.size[1]}, {FRAMES} frames"
    title = f"Device memory of a LoRA training step, GiB. {what}; traced"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>",
        f'<text class="title" x="{LEFT}" y="20">{escape(title)}</text>',
        *_legend(steps),
        *_grid(frame, steps[PLAIN].forward_flops),
        *(f'<path class="line {letter}" d="{_path(step, frame)}"/>' for letter, step in _lettered(steps)),
        "</svg>\n",
    ]
    return "\n".join(parts)


def _lettered(steps: Mapping[str, Step]) -> Iterator[tuple[str, Step]]:
    return zip("abc", (steps[name] for name in LABELS), strict=True)


def _legend(steps: Mapping[str, Step]) -> Iterator[str]:
    for row, ((letter, step), label) in enumerate(zip(_lettered(steps), LABELS.values(), strict=True)):
        y = 38 + 17 * row
        yield f'<path class="line {letter}" d="M{LEFT} {y - 4}h22"/>'
        peak = f"{label}: at most {step.peak.total() / 2**30:.1f} GiB"
        yield f'<text x="{LEFT + 30}" y="{y}">{escape(peak)}</text>'


def _grid(frame: Frame, forward: int) -> Iterator[str]:
    right, floor = WIDTH - RIGHT, HEIGHT - BOTTOM
    for gib in range(0, int(frame.gib) + 1, 20):
        y = frame.up(gib)
        yield f'<path class="grid" d="M{LEFT} {y:.1f}H{right}"/>'
        yield f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{gib}</text>'
    for peta in range(0, int(frame.flops / 1e15) + 1, 2):
        yield f'<text x="{frame.across(peta * 1e15):.1f}" y="{floor + 18}" text-anchor="middle">{peta}</text>'
    for card in CARDS:
        y = frame.up(card)
        yield f'<path class="card" d="M{LEFT} {y:.1f}H{right}"/>'
        yield f'<text x="{LEFT + 6}" y="{y - 5:.1f}">{card} GiB</text>'
    x = frame.across(forward)
    yield f'<path class="grid" d="M{x:.1f} {TOP}V{floor}"/>'
    yield f'<text x="{x - 6:.1f}" y="{TOP + 12}" text-anchor="end">forward</text>'
    yield f'<text x="{x + 6:.1f}" y="{TOP + 12}">backward</text>'
    yield f'<text x="{right}" y="{HEIGHT - 8}" text-anchor="end">PFLOP computed so far; the update comes last</text>'


def _path(step: Step, frame: Frame) -> str:
    """Steps from one interval's greatest bytes to the next one's."""
    edges = [frame.across(index / INTERVALS * frame.flops) for index in range(INTERVALS + 1)]
    parts, last = [f"M{edges[0]:.1f} {frame.up(0):.1f}"], 0
    for index, held in enumerate([*_highest(step, frame), 0]):
        if held != last:
            parts.append(f"H{edges[index]:.1f}V{frame.up(held / 2**30):.1f}")
        last = held
    return "".join(parts)


def _highest(step: Step, frame: Frame) -> list[int]:
    """The greatest bytes of each interval; an operator holds its bytes while it computes."""
    highest, begun = [0] * INTERVALS, 0
    for flops, held in step.timeline:
        ended = min(int(flops / frame.flops * INTERVALS), INTERVALS - 1)
        for index in range(begun, ended + 1):
            highest[index] = max(highest[index], held)
        begun = ended
    return highest


def main() -> None:
    """Writes the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=PICTURE)
    out: Path = parser.parse_args().out
    out.write_text(picture(traced()), encoding="utf-8")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
