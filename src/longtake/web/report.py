"""report.html of a run: loss, memory, samples and settings on one page that needs no other file and no network."""

import base64
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from statistics import median

from longtake.files import write_text
from longtake.units import format_bytes, format_seconds
from longtake.web.chart import Point, Series, line_chart
from longtake.web.run_folder import NOISES, Record, RunFolder, SampleVideo, points, read_run

EMBEDDED_BYTES = 64 * 2**20
"""Sample videos up to this sum are in the page, newest first; the rest are links into the run folder."""

SHOWN_EVENTS = 100

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; media-src data: 'self' file:; img-src data:"


def write_report(run: Path) -> Path:
    """Write `report.html` into the run folder `run` and return its path; an older one is replaced in one move.

    Raises InputError where `run` is no run folder and RunError where the page cannot be written.
    """
    target = run / "report.html"
    write_text(target, render_report(read_run(run)))
    return target


def render_report(run: RunFolder, embedded_bytes: int = EMBEDDED_BYTES) -> str:
    """The page of `run` as HTML with up to `embedded_bytes` of video; everything that comes from the run is escaped."""
    name = escape(run.path.resolve().name)
    model = run.config.get("model", {})
    title = model.get("name") or model.get("path") or "" if isinstance(model, dict) else ""
    css = (files("longtake.web") / "static" / "report.css").read_text(encoding="utf-8")
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in run.notes)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{name} · Longtake</title>
<style>
{css}</style>
</head>
<body>
<header><p class="brand">Longtake run</p><h1>{name}</h1><p class="model">{escape(str(title))}</p></header>
{notes}<dl class="summary">{"".join(_summary(run))}</dl>
<section class="charts">{"".join(_charts(run))}</section>
{_samples(run, embedded_bytes)}{_events(run)}
<section><details><summary>Settings <small>config.toml, resolved</small></summary>
<pre>{escape(run.settings) or "nothing recorded"}</pre></details></section>
</body>
</html>
"""


def _summary(run: RunFolder) -> Iterable[str]:
    losses = [value for _, value in points(run.validations, "validation_loss")]
    done = int(run.steps[-1]["step"]) if run.steps else 0
    planned_steps = _setting(run, "training", "steps")
    yield _fact("Steps", str(done), f"of {planned_steps}" if planned_steps else "")
    if losses:
        change = (
            f"{100 * (losses[-1] / losses[0] - 1):+.1f} %".replace("-", "−") if losses[0] > 0 < len(losses) - 1 else ""
        )
        shown = f"{losses[0]:.4g} → {losses[-1]:.4g}" if len(losses) > 1 else f"{losses[0]:.4g}"
        yield _fact("Validation loss", shown, change)
    seconds = [value for _, value in points(run.steps, "step_seconds")]
    if seconds:
        expected = [value for _, value in points(run.steps, "planned_step_seconds")]
        beside = f", planned {median(expected):.3g} s" if expected else ""
        yield _fact("Time in steps", format_seconds(sum(seconds)), f"{median(seconds):.3g} s a step{beside}")
    size, frames = _setting(run, "data", "size"), _setting(run, "data", "num_frames")
    if isinstance(size, list) and frames:
        yield _fact("Clips", f"{frames} frames", " × ".join(map(str, size)))
    peaks = [value for _, value in points(run.steps, "device_peak_bytes")]
    planned = [value for _, value in points(run.steps, "planned_peak_bytes")]
    if peaks:
        yield _fact("Device peak", format_bytes(max(peaks)), f"planned {format_bytes(max(planned))}" if planned else "")
    for adapter in [str(path.resolve()) for path in run.adapters] or ["not written yet"]:
        yield f'<div class="path"><dt>Adapter</dt><dd>{escape(adapter)}</dd></div>'


def _fact(name: str, value: str, detail: str = "") -> str:
    small = f"<small>{escape(detail)}</small>" if detail else ""
    return f"<div><dt>{escape(name)}</dt><dd>{escape(value)}{small}</dd></div>"


def _setting(run: RunFolder, section: str, key: str) -> object:
    values = run.config.get(section)
    return values.get(key) if isinstance(values, dict) else None


def _charts(run: RunFolder) -> Iterable[str]:
    loss = points(run.steps, "loss")
    if not run.noise:
        yield _loss_chart("Loss", loss)
    for noise in NOISES if run.noise else ():  # apart: the level of a loss is that of its noise
        own = [(step, value) for step, value in loss if run.noise.get(step) == noise]
        yield _loss_chart(f"Loss, {noise} noise", own)
    yield line_chart("Validation loss", [Series("validation loss", points(run.validations, "validation_loss"))])
    yield _memory_chart(run.steps)
    yield _time_chart(run.steps)
    yield line_chart("Gradient norm", [Series("gradient norm", points(run.steps, "grad_norm"))], log=True)
    yield line_chart("Learning rate", [Series("learning rate", points(run.steps, "learning_rate"))], from_zero=True)


def _loss_chart(title: str, loss: list[Point]) -> str:
    return line_chart(title, [Series("each step", loss, "faint"), Series("smoothed", _smoothed(loss))])


def _memory_chart(steps: Sequence[Record]) -> str:
    keys = ("device_peak_bytes", "host_peak_bytes", "planned_peak_bytes")
    largest = max((record[key] for record in steps for key in keys if key in record), default=0.0)
    unit, scale = ("GiB", 2.0**30) if largest >= 2**30 else ("MiB", 2.0**20)
    device, host, planned = (points(steps, key, scale) for key in keys)
    series = [Series("planned", planned, "dashed"), Series("host peak", host, "neutral"), Series("device peak", device)]
    return line_chart("Memory", series, unit=unit, from_zero=True)


def _time_chart(steps: Sequence[Record]) -> str:
    planned = Series("planned", points(steps, "planned_step_seconds"), "dashed")
    return line_chart("Step time", [planned, Series("step", points(steps, "step_seconds"))], unit="s", from_zero=True)


def _smoothed(values: Sequence[Point]) -> list[Point]:
    """An exponential moving average over about a twentieth of the steps, corrected for its start at zero."""
    keep = 1 - 2 / (max(5.0, len(values) / 20) + 1)
    total, weight, smooth = 0.0, 0.0, []
    for step, value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        smooth.append((step, total / weight))
    return smooth


def _samples(run: RunFolder, embedded_bytes: int) -> str:
    if not run.samples:
        return ""
    left, groups = embedded_bytes, []
    for step, group in groupby(run.samples, key=lambda sample: sample.step):
        shown = []
        for sample in group:
            left -= sample.video.stat().st_size
            shown.append(_sample(sample, embedded=left >= 0))
        groups.append(f'<h3>Step {step}</h3><div class="samples">{"".join(shown)}</div>')
    return f"<section><h2>Samples</h2>{''.join(groups)}</section>\n"


def _events(run: RunFolder) -> str:
    """The last of them; a run that goes on for weeks over a bad disk has many."""
    if not run.events:
        return ""
    shown = run.events[-SHOWN_EVENTS:]
    before = f" <small>the last {len(shown)} of {len(run.events)}</small>" if len(shown) < len(run.events) else ""
    rows = "".join(
        f"<tr><td>{escape(event.time)}</td><td>{'' if event.step is None else event.step}</td>"
        f"<td>{escape(event.kind)}</td><td>{escape(event.what)}</td></tr>"
        for event in shown
    )
    head = "<tr><th>Time</th><th>Step</th><th>Kind</th><th>What</th></tr>"
    return f'<section><h2>Events{before}</h2><table class="events">{head}{rows}</table></section>\n'


def _sample(sample: SampleVideo, *, embedded: bool) -> str:
    link = f"samples/{sample.video.name}"
    source = "data:video/mp4;base64," + base64.b64encode(sample.video.read_bytes()).decode() if embedded else link
    seed = f"<small>seed {sample.seed}</small>" if sample.seed is not None else ""
    prompt = f'<span title="{escape(sample.prompt)}">{escape(sample.prompt) or "no prompt recorded"}</span>'
    playing = "autoplay" if embedded else 'preload="none"'
    video = f'<video src="{escape(source)}" controls loop muted playsinline {playing}></video>'
    return f"<figure>{video}<figcaption>{prompt}{seed}</figcaption></figure>"
