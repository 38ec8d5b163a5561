"""A line chart as one SVG figure: axes, ticks, several series, values on hover; no script, no library."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Literal

Point = tuple[float, float]
Line = Literal["accent", "faint", "neutral", "dashed"]

WIDTH, HEIGHT = 520, 210
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 26
MOST_POINTS = 1200
MOST_HOVERS = 240
MOST_DOTS = 24


@dataclass(frozen=True)
class Series:
    """One line: its name in the legend, its (x, y) points in the order of x, and how it is drawn."""

    label: str
    points: Sequence[Point]
    line: Line = "accent"


def line_chart(
    title: str, series: Sequence[Series], *, unit: str = "", log: bool = False, from_zero: bool = False
) -> str:
    """An HTML `<figure>` with an inline SVG chart of `series` over whole-numbered x (steps).

    Points that are not finite, and with `log` those that are not positive, are left out. `from_zero` makes a linear
    axis begin at 0. Every text is escaped. Without any point the figure says so.
    """
    drawable = [Series(one.label, _drawable(one.points, log), one.line) for one in series]
    drawable = [one for one in drawable if one.points]
    if not drawable:
        return f'<figure class="chart">{_caption(title, unit, [])}<p class="empty">nothing recorded</p></figure>'
    xs = [x for one in drawable for x, _ in one.points]
    ys = [y for one in drawable for _, y in one.points] + ([0.0] if from_zero and not log else [])
    across = _Axis(*_spread(min(xs), max(xs), log=False, margin=0.0), LEFT, WIDTH - RIGHT)
    up = _Axis(
        *_spread(min(ys), max(ys), log=log, margin=0.06, floor=0.0 if from_zero else None), HEIGHT - BOTTOM, TOP, log
    )
    body = [*_grid(across, up), *(_path(one, across, up) for one in drawable), *_hovers(drawable, across, unit)]
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(body)}</svg>'
    return f'<figure class="chart">{_caption(title, unit, drawable)}{svg}</figure>'


@dataclass(frozen=True)
class _Axis:
    """Maps values from `low` to `high` onto pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        scale: Callable[[float], float] = math.log10 if self.log else float
        share = (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))
        return self.start + share * (self.end - self.start)

    def ticks(self, most: int, *, whole: bool = False) -> list[float]:
        if self.log:
            return _log_ticks(self.low, self.high, most)
        step = _nice(max((self.high - self.low) / most, 1.0 if whole else 0.0))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]


def _drawable(points: Sequence[Point], log: bool) -> list[Point]:
    return [(x, y) for x, y in points if math.isfinite(y) and (y > 0 or not log)]


def _spread(low: float, high: float, *, log: bool, margin: float, floor: float | None = None) -> tuple[float, float]:
    """`low` and `high` with a margin around them, and apart even where they are the same."""
    if log:
        factor = max((high / low) ** margin, 1.05)
        return low / factor, high * factor
    rest = (high - low) * margin or (abs(high) * margin if high == low else 0.0)
    if high == low and rest == 0:
        rest = 1.0
    return (low - rest if floor is None else min(floor, low)), high + rest


def _nice(step: float) -> float:
    """The least of 1, 2, 5 times a power of ten that is at least `step`."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * (1 - 1e-9))


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    """1, 2, 5 times powers of ten where few decades are spanned, powers of ten thinned out where many are."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 5), (1,)):
        ticks = [factor * 10.0**exponent for exponent in exponents for factor in factors]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= most + 1:
            return ticks if len(ticks) > 1 else [low, high]
    return ticks[:: math.ceil(len(ticks) / most)]


def _number(value: float) -> str:
    """`value` in four significant digits, as short as it gets."""
    size = abs(value)
    if size and not 1e-3 <= size < 1e5:
        mantissa, _, exponent = f"{value:.3e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.0f}" if size >= 1000 else f"{value:.4g}"


def _caption(title: str, unit: str, drawn: Sequence[Series]) -> str:
    legend = "".join(f'<span class="key"><i class="{one.line}"></i>{escape(one.label)}</span>' for one in drawn)
    shown = f" <small>{escape(unit)}</small>" if unit else ""
    return f"<figcaption><b>{escape(title)}{shown}</b>{legend if len(drawn) > 1 else ''}</figcaption>"


def _grid(across: _Axis, up: _Axis) -> list[str]:
    parts = []
    for tick in up.ticks(6):
        y = up.at(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="up" x="{LEFT - 8}" y="{y + 3.5:.1f}">{_number(tick)}</text>')
    floor = HEIGHT - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{floor}" y2="{floor}"/>')
    for tick in across.ticks(6, whole=True):
        x = across.at(tick)
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{floor}" y2="{floor + 4}"/>')
        parts.append(f'<text class="across" x="{x:.1f}" y="{floor + 17}">{_number(tick)}</text>')
    return parts


def _path(series: Series, across: _Axis, up: _Axis) -> str:
    places = [f"{across.at(x):.1f},{up.at(y):.1f}" for x, y in _thinned(series.points)]
    line = f'<polyline class="{series.line}" points="{" ".join(places)}"/>'
    if len(places) > (MOST_DOTS if series.line == "accent" else 1):
        return line
    dots = (place.split(",") for place in places)
    return line + "".join(f'<circle class="{series.line}" cx="{x}" cy="{y}" r="2.5"/>' for x, y in dots)


def _thinned(points: Sequence[Point]) -> list[Point]:
    """About MOST_POINTS points: of each run of neighbours the lowest and the highest, so that no spike is lost."""
    size = math.ceil(2 * len(points) / MOST_POINTS)
    if size <= 2:
        return list(points)
    kept: list[Point] = []
    for start in range(0, len(points), size):
        run = points[start : start + size]
        kept += sorted({min(run, key=lambda point: point[1]), max(run, key=lambda point: point[1])})
    return kept


def _hovers(drawn: Sequence[Series], across: _Axis, unit: str) -> list[str]:
    """Upright strips, one a step, that show a hairline and the values of every series when pointed at."""
    values: dict[float, list[str]] = {}
    for one in drawn:
        for x, y in one.points:
            values.setdefault(x, []).append(f"{one.label} {_number(y)} {unit}".strip())
    steps = sorted(values)
    steps = steps[:: math.ceil(len(steps) / MOST_HOVERS)]
    places = [across.at(step) for step in steps]
    edges = [LEFT, *((a + b) / 2 for a, b in pairwise(places)), WIDTH - RIGHT]
    parts = []
    for index, step in enumerate(steps):
        label = escape("\n".join([f"step {step:.0f}", *values[step]]))
        width = edges[index + 1] - edges[index]
        strip = f'<rect x="{edges[index]:.1f}" y="{TOP}" width="{width:.1f}" height="{HEIGHT - BOTTOM - TOP}"/>'
        hair = f'<line x1="{places[index]:.1f}" x2="{places[index]:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        parts.append(f'<g class="hover"><title>{label}</title>{strip}{hair}</g>')
    return parts
