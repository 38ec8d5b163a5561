"""A plan's pictures as inline SVG: memory and streams over a step on one axis of time, and bars of where bytes are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate, pairwise

from longtake.planner.events import KINDS, Counts, Span, Timeline
from longtake.planner.plans import Plan
from longtake.planner.words import PARTS, in_unit, scale_bytes, seconds_words, unit_of
from longtake.units import format_bytes

WIDTH, LEFT, RIGHT = 1064, 82, 8
TOP, MEMORY_HEIGHT, LANE, GAP, BOTTOM = 24, 260, 18, 6, 24
COLUMNS = 650
"""Stretches of a step for each of which the highest moment is drawn."""
NARROW = 3.0
"""Pixels: neighbours on a stream that are narrower together are drawn as one."""
READOUTS = 100
"""Strips across a step that say their bytes when pointed at."""
LANES = {"compute": "compute", "inward": "to device", "outward": "from device", "network": "network"}


def step_picture(plan: Plan, budget_bytes: int) -> str:
    """An SVG of the memory over a simulated step, and of its streams below; empty where the plan has no timeline."""
    timeline = plan.timeline
    if timeline is None or not timeline.memory or timeline.seconds <= 0:
        return ""
    bands = {part: plan.breakdown_bytes.get(part, 0) for part in PARTS[len(KINDS) :]}
    columns = _highest(timeline)
    peak = max(map(sum, columns)) + sum(bands.values())
    frame = _Frame(timeline.seconds, 1.1 * scale_bytes(peak, budget_bytes))
    lanes = [lane for lane in LANES if lane == "compute" or any(span.stream == lane for span in timeline.spans)]
    height = TOP + MEMORY_HEIGHT + len(lanes) * (LANE + GAP) + GAP + BOTTOM
    body = [
        *_grid(frame, height - BOTTOM),
        *_areas(columns, frame),
        *_bands(bands, max(map(sum, columns)), frame),
        *_budget(budget_bytes, frame),
        *_lanes(timeline.spans, lanes, frame),
        *_readouts(columns, frame, height - BOTTOM),
    ]
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="memory over a step">{"".join(body)}</svg>'


def breakdown_bar(breakdown_bytes: Mapping[str, int], most: int, budget_bytes: int, size: tuple[int, int]) -> str:
    """An SVG bar of PARTS, `size` (width, height) in pixels of which `most` bytes fill; a tick where the budget is."""
    width, height = size
    scale, held = width / max(most, 1), 0
    cells = [f'<rect class="track" width="{width}" height="{height}"/>']
    for part in PARTS:
        if nbytes := breakdown_bytes.get(part, 0):
            title = f"<title>{part.replace('_', ' ')} {format_bytes(nbytes)}</title>"
            at, wide = f"{held * scale:.1f}", f"{nbytes * scale:.1f}"
            cells.append(f'<rect class="{part}" x="{at}" width="{wide}" height="{height}">{title}</rect>')
            held += nbytes
    if budget_bytes < most:
        cells.append(f'<path class="budget" d="M{budget_bytes * scale:.1f} 0v{height}"/>')
    label = 'role="img" aria-label="where the bytes are"'
    return f'<svg class="bar" viewBox="0 0 {width} {height}" {label}>{"".join(cells)}</svg>'


def dot(part: str) -> str:
    """The colour of one of PARTS, or of `waiting`, for a legend."""
    return (
        f'<svg class="dot" viewBox="0 0 10 10" aria-hidden="true"><rect class="{part}" width="10" height="10"/></svg>'
    )


@dataclass(frozen=True)
class _Frame:
    """Maps seconds and bytes onto pixels."""

    seconds: float
    most_bytes: float

    def across(self, seconds: float) -> float:
        return LEFT + seconds / self.seconds * (WIDTH - LEFT - RIGHT)

    def up(self, nbytes: float) -> float:
        return TOP + MEMORY_HEIGHT * (1 - nbytes / self.most_bytes)


@dataclass
class _Bar:
    """Spans of a stream drawn as one; `busy` is the width in pixels that they fill."""

    left: float
    right: float
    busy: float
    spans: list[Span]


def _highest(timeline: Timeline) -> list[Counts]:
    """For each of COLUMNS equal stretches of the step the counts of its highest moment."""
    scale = COLUMNS / timeline.seconds
    columns: list[Counts] = [(0,) * len(KINDS)] * COLUMNS
    ends = [*(start for start, _ in timeline.memory[1:]), timeline.seconds]
    for (start, counts), end in zip(timeline.memory, ends, strict=True):
        first = min(int(start * scale), COLUMNS - 1)
        for column in range(first, max(first + 1, min(math.ceil(end * scale), COLUMNS))):
            columns[column] = max(columns[column], counts, key=sum)
    return columns


def _grid(frame: _Frame, floor: int) -> Iterator[str]:
    unit = unit_of([int(frame.most_bytes)])
    factor = 2**30 if unit == "GiB" else 2**20
    yield f'<text class="end" x="{LEFT - 8}" y="{TOP - 12}">{unit}</text>'
    for tick in _ticks(frame.most_bytes / factor, 6):
        y = frame.up(tick * factor)
        yield f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
        yield f'<text class="end" x="{LEFT - 8}" y="{y + 4:.1f}">{tick:g}</text>'
    yield f'<path class="axis" d="M{LEFT} {floor}H{WIDTH - RIGHT}"/>'
    for tick in _ticks(frame.seconds, 10):
        x = frame.across(tick)
        yield f'<path class="axis" d="M{x:.1f} {floor}v4"/>'
        yield f'<text class="middle" x="{x:.1f}" y="{floor + 18}">{tick:g}{" s" if not tick else ""}</text>'


def _ticks(most: float, count: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten from 0 to `most`, at most about `count`."""
    power = 10.0 ** math.floor(math.log10(most / count))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= most / count * (1 - 1e-9))
    return [index * step for index in range(math.floor(most / step * (1 + 1e-9)) + 1)]


def _areas(columns: Sequence[Counts], frame: _Frame) -> Iterator[str]:
    """The highest area first, so that each following one covers what is not above it."""
    stacks = [list(accumulate(counts)) for counts in columns]
    for index in reversed(range(len(KINDS))):
        if any(stack[index] > (stack[index - 1] if index else 0) for stack in stacks):
            yield f'<path class="{KINDS[index]}" d="{_contour([stack[index] for stack in stacks], frame)}Z"/>'


def _bands(bands: Mapping[str, int], held: int, frame: _Frame) -> Iterator[str]:
    """What tensors do not hold, above the most that they do: the allocator keeps what it has reserved."""
    bottom = held
    for part, nbytes in bands.items():
        y, height = frame.up(bottom + nbytes), frame.up(bottom) - frame.up(bottom + nbytes)
        title = f"<title>{part.replace('_', ' ')} {format_bytes(nbytes)}</title>"
        size = f'x="{LEFT}" y="{y:.1f}" width="{WIDTH - LEFT - RIGHT}" height="{height:.1f}"'
        yield f'<rect class="{part}" {size}>{title}</rect>'
        bottom += nbytes
    label = f"{format_bytes(bottom)}, of which tensors hold {format_bytes(held)}"
    yield f'<text class="label end" x="{WIDTH - RIGHT - 8}" y="{frame.up(bottom) - 5:.1f}">{label}</text>'


def _contour(values: Sequence[int], frame: _Frame) -> str:
    """From the floor up, along the steps of `values`, and down to the floor."""
    floor = frame.up(0)
    parts, last = [f"M{LEFT} {floor:.0f}"], ""
    for column, value in enumerate(values):
        y = f"{frame.up(value):.1f}"
        if y != last:
            x = LEFT + column * (WIDTH - LEFT - RIGHT) / len(values)
            parts.append(f"H{x:.1f}V{y}" if column else f"V{y}")
            last = y
    return "".join([*parts, f"H{WIDTH - RIGHT}V{floor:.0f}"])


def _budget(budget_bytes: int, frame: _Frame) -> Iterator[str]:
    label = f"budget {format_bytes(budget_bytes)}"
    if budget_bytes <= frame.most_bytes:
        y = frame.up(budget_bytes)
        yield f'<path class="budget" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
        yield f'<text class="label" x="{LEFT + 8}" y="{y - 5:.1f}">{label}</text>'
    else:
        yield f'<text class="label" x="{LEFT + 8}" y="{TOP - 12}">{label}, far above</text>'


def _lanes(spans: Sequence[Span], lanes: Sequence[str], frame: _Frame) -> Iterator[str]:
    for index, lane in enumerate(lanes):
        y = TOP + MEMORY_HEIGHT + GAP + GAP + index * (LANE + GAP)
        yield f'<text class="end" x="{LEFT - 8}" y="{y + 13}">{LANES[lane]}</text>'
        yield f'<rect class="track" x="{LEFT}" y="{y}" width="{WIDTH - LEFT - RIGHT}" height="{LANE}"/>'
        for stream in (lane, "stall") if lane == "compute" else (lane,):
            bars = _merged([span for span in spans if span.stream == stream], frame)
            yield f'<g class="lane {stream}" transform="translate(0 {y})">{"".join(map(_bar, bars))}</g>'


def _merged(spans: Sequence[Span], frame: _Frame) -> list[_Bar]:
    """Spans in the order of time; neighbours that are narrow together as one bar."""
    bars: list[_Bar] = []
    for span in sorted(spans, key=lambda span: span.start):
        left, right = frame.across(span.start), frame.across(span.end)
        if bars and right - bars[-1].left < NARROW:
            last = bars[-1]
            last.busy += right - max(left, min(right, last.right))
            last.right = max(last.right, right)
            last.spans.append(span)
        else:
            bars.append(_Bar(left, right, right - left, [span]))
    return bars


def _bar(bar: _Bar) -> str:
    """As dark as it is busy."""
    first, last = bar.spans[0], bar.spans[-1]
    what = first.label if len(bar.spans) == 1 else f"{len(bar.spans)}: {first.label} to {last.label}"
    title = escape(f"{what}\n{first.start:.3f} to {last.end:.3f} s")
    width = max(bar.right - bar.left, 0.5)
    share = bar.busy / width
    faint = f' fill-opacity="{max(share, 0.3):.1f}"' if share < 0.95 and len(bar.spans) > 1 else ""
    return f'<path d="M{bar.left:.1f} 0h{width:.1f}v{LANE}h-{width:.1f}z"{faint}><title>{title}</title></path>'


def _readouts(columns: Sequence[Counts], frame: _Frame, floor: int) -> Iterator[str]:
    """Upright strips with a hairline down to the streams, at the highest moment in each."""
    edges = [round(index * len(columns) / READOUTS) for index in range(READOUTS + 1)]
    unit = unit_of([int(frame.most_bytes)])
    for first, end in pairwise(edges):
        highest = max(range(first, end), key=lambda column: sum(columns[column]))
        left, right, at = (frame.across(edge / len(columns) * frame.seconds) for edge in (first, end, highest + 0.5))
        held = columns[highest]
        lines = [f"{kind} {in_unit(nbytes, unit)}" for kind, nbytes in zip(KINDS, held, strict=True) if nbytes]
        total = f"{format_bytes(sum(held))} in tensors at {seconds_words(highest / len(columns) * frame.seconds)}"
        strip = f'<rect x="{left:.1f}" y="{TOP}" width="{right - left:.1f}" height="{MEMORY_HEIGHT}"/>'
        title = "\n".join([total, *reversed(lines)])
        yield f'<g class="hover"><title>{title}</title>{strip}<path d="M{at:.1f} {TOP}V{floor}"/></g>'
