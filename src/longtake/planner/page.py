"""A report as one HTML page that needs no other file, no network, and no script but for a button. Needs no torch."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from longtake.files import write_text
from longtake.planner.page_drawing import breakdown_bar, dot, step_picture
from longtake.planner.plans import Plan, Report
from longtake.planner.words import (
    MEANINGS,
    PARTS,
    all_stages,
    bucket_words,
    case,
    command_of,
    costs,
    in_unit,
    peak_words,
    scale_bytes,
    seconds_words,
    settings,
    unit_of,
    used_of_budget,
    verdict,
    why_not,
)
from longtake.units import format_bytes

_HATCH = (
    '<svg class="defs" aria-hidden="true"><defs>'
    '<pattern id="hatch" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<rect width="6" height="6"/><path d="M0 0V6"/></pattern></defs></svg>'
)


def write_html(report: Report, path: Path) -> None:
    """The page of `report` to `path`, atomically; raises RunError where it cannot be written."""
    write_text(path, render_html(report))


def render_html(report: Report) -> str:
    """The page of `report`; every text in it is escaped, and its policy allows only its own style and script."""
    style, script = _static("page.css"), _static("page.js")
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'; form-action 'none'"
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(report.model)} · Longtake plan</title>
<style>{style}</style>
</head>
<body>
{_HATCH}
{_header(report)}
{"".join(f'<p class="note">{escape(note)}</p>' for note in report.notes)}
{_advice(report)}{_frontier(report)}
{"".join(_plans(report))}
<footer>Planned in {seconds_words(report.seconds)}. Bytes are traced, times computed.</footer>
<script>{script}</script>
</body>
</html>
"""


def _static(name: str) -> str:
    return (files("longtake.planner") / "static" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """What allows exactly this text inline (CSP level 3, 6.7.3.3)."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _header(report: Report) -> str:
    plan = report.plans[report.chosen or 0] if report.plans else None
    head = f'<p class="brand">Longtake plan</p>{_headline(report, plan)}<p class="case">{escape(case(report))}</p>'
    facts = "" if plan is None else f'<dl class="summary">{"".join(_facts(report, plan))}</dl>'
    return f"<header>{head}</header>{facts}"


def _headline(report: Report, plan: Plan | None) -> str:
    if report.chosen is None or plan is None:
        return f'<h1 class="no">Nothing fits {format_bytes(report.budget_bytes)}</h1>'
    return f"<h1>Fits: {used_of_budget(report, plan)}, {seconds_words(plan.step_seconds)} a step</h1>"


def _facts(report: Report, plan: Plan) -> Iterator[str]:
    """The numbers of the chosen plan, or the nearest."""
    whose = "" if plan.fits else ", nearest plan"
    of = f"of {format_bytes(report.budget_bytes)}"
    yield _fact(f"Device{whose}", format_bytes(plan.peak_bytes.get("device", 0)), of)
    yield _fact("Peak", peak_words(plan).partition(" at ")[0], bucket_words(plan.bucket))
    waiting = f"{seconds_words(plan.stalled_seconds)} of it waiting" if plan.stalled_seconds else "no waiting"
    yield _fact("Step", seconds_words(plan.step_seconds), waiting)
    yield _fact("Bound by", plan.bound_by)
    for tier, budget in (("host", report.host_budget_bytes), ("disk", report.disk_budget_bytes)):
        nbytes = plan.peak_bytes.get(tier, 0)  # type: ignore[call-overload]
        yield _fact(tier.capitalize(), format_bytes(nbytes) if nbytes else "nothing", f"of {format_bytes(budget)}")


def _fact(name: str, value: str, detail: str = "") -> str:
    small = f"<small>{escape(detail)}</small>" if detail else ""
    return f"<div><dt>{escape(name)}</dt><dd>{escape(value)}{small}</dd></div>"


def _advice(report: Report) -> str:
    if not report.advice or report.chosen is not None:
        return ""
    rows = [
        [escape(each.change), format_bytes(each.device_bytes), seconds_words(each.step_seconds)]
        for each in report.advice
    ]
    return f"<section><h2>What would make it fit</h2>{_table(['change', '#device', '#a step'], rows)}</section>"


def _frontier(report: Report) -> str:
    """All plans, and those for comparison."""
    everything = (*report.plans, *report.references)
    if not everything:
        return ""
    unit = unit_of(plan.peak_bytes.get("device", 0) for plan in everything)
    # bars far beyond the budget are cut off, so that those that fit can be read
    most = min(max(plan.peak_bytes.get("device", 0) for plan in everything), int(1.3 * report.budget_bytes))
    rows = []
    for index, plan in enumerate(report.plans):
        link = f'<a href="#plan-{index}">{escape(plan.name)}</a>'
        chosen = ' class="chosen"' if index == report.chosen else ""
        rows.append(f"<tr{chosen}>{_cells(report, plan, link, (most, unit))}</tr>")
    rows += [f"<tr>{_cells(report, plan, _compared(plan), (most, unit))}</tr>" for plan in report.references]
    names = ["plan", "device", f"#{unit}", f"#host {unit}", f"#disk {unit}", "#a step", "bound by", "fits"]
    table = f'<table class="frontier"><thead><tr>{_heads(names)}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    return f'<section><h2>Plans <small>fastest first</small></h2><div class="scroll">{table}</div></section>'


def _compared(plan: Plan) -> str:
    return f"{escape(plan.name)} <small>for comparison</small>"


def _cells(report: Report, plan: Plan, name: str, scale: tuple[int, str]) -> str:
    most, unit = scale
    gauge = breakdown_bar(plan.breakdown_bytes, most, report.budget_bytes, (190, 10))
    sizes = [in_unit(plan.peak_bytes.get(tier, 0), unit) for tier in ("device", "host", "disk")]
    numbers = "".join(f'<td class="number">{text}</td>' for text in (*sizes, seconds_words(plan.step_seconds)))
    says = verdict(report, plan)
    fits = "<td>" if plan.fits else '<td class="no">'
    bound = escape(plan.bound_by)
    return f'<td class="name">{name}</td><td class="gauge">{gauge}</td>{numbers}<td>{bound}</td>{fits}{says}</td>'


def _plans(report: Report) -> Iterator[str]:
    """The chosen one, or the nearest, in sight; the others folded."""
    shown = report.chosen or 0
    for index in sorted(range(len(report.plans)), key=lambda index: index != shown):
        plan = report.plans[index]
        body = f'<div class="plan" id="plan-{index}">{"".join(_plan(report, plan))}</div>'
        if index == shown:
            label = "The plan" if report.chosen is not None else "The nearest plan"
            yield f"<section><h2>{label}: {escape(plan.name)}</h2>{body}</section>"
            continue
        device, seconds = format_bytes(plan.peak_bytes.get("device", 0)), seconds_words(plan.step_seconds)
        says = f"<small>{device}, {seconds} a step</small>"
        yield f"<details><summary>{escape(plan.name)}{says}</summary>{body}</details>\n"


def _plan(report: Report, plan: Plan) -> Iterator[str]:
    refusal = f'<p class="costs no">Does not fit: {escape(why_not(report, plan))}</p>' if not plan.fits else ""
    yield f'{refusal}<p class="costs">Takes {escape(costs(plan))}.</p>'
    if picture := step_picture(plan, report.budget_bytes):
        held = [part for part in PARTS if plan.breakdown_bytes.get(part, 0)] + ["waiting"] * bool(plan.stalled_seconds)
        legend = "".join(f'<span class="key">{dot(part)}{part.replace("_", " ")}</span>' for part in held)
        title = "<b>Memory over a step, and its streams</b>"
        yield f'<figure><figcaption>{title}<br>{legend}</figcaption><div class="scroll">{picture}</div></figure>'
    yield f'<div class="side"><div class="breakdown">{_breakdown(report, plan)}</div><div>{_needs(plan)}</div></div>'
    if command := command_of(report, plan):
        yield f"<h3>Run</h3>{_copied(command)}"
    yield f"<h3>Settings</h3>{_copied(_sections(plan))}"


def _breakdown(report: Report, plan: Plan) -> str:
    """Where the bytes of the peak are."""
    device = plan.peak_bytes.get("device", 0)
    most = scale_bytes(device, report.budget_bytes)
    bar = breakdown_bar(plan.breakdown_bytes, most, report.budget_bytes, (500, 22))
    rows = [
        [f"{dot(part)}{part.replace('_', ' ')} <small>{MEANINGS[part]}</small>", format_bytes(nbytes)]
        for part in PARTS
        if (nbytes := plan.breakdown_bytes.get(part, 0))
    ]
    rows.append([f"<b>at the peak</b> <small>{escape(peak_words(plan))}</small>", f"<b>{format_bytes(device)}</b>"])
    return f"<h3>Where the bytes are</h3>{bar}{_table(['', '#'], rows)}"


def _needs(plan: Plan) -> str:
    stages = [
        [escape(stage.stage), escape(stage.what), format_bytes(stage.device_bytes), _some(stage.host_bytes)]
        for stage in all_stages(plan)
    ]
    shown = f"<h3>Stages</h3>{_table(['stage', 'what', '#device', '#host'], stages)}" if stages else ""
    if len(plan.buckets) < 2:
        return shown
    buckets = [
        [bucket_words(needs.bucket), format_bytes(needs.device_bytes), seconds_words(needs.step_seconds)]
        for needs in plan.buckets
    ]
    return f"{shown}<br><h3>Buckets</h3>{_table(['bucket', '#device', '#a step'], buckets)}"


def _some(nbytes: int) -> str:
    return format_bytes(nbytes) if nbytes else ""


def _sections(plan: Plan) -> str:
    """The settings as TOML."""
    lines: list[str] = []
    section = ""
    for key, value in settings(plan):
        name, _, field = key.partition(".")
        if name != section:
            lines += [""] * bool(lines) + [f"[{name}]"]
            section = name
        lines.append(f"{field} = {value}")
    return "\n".join(lines)


def _copied(text: str) -> str:
    button = '<button class="copy" type="button" hidden>copy</button>'
    return f'<div class="run"><pre>{escape(text)}</pre>{button}</div>'


def _heads(names: Iterable[str]) -> str:
    return "".join(f'<th{_kind(name)} scope="col">{name.removeprefix("#")}</th>' for name in names)


def _table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows of HTML under `names`; columns whose name begins with # are numbers."""
    body = "".join(
        f"<tr>{''.join(f'<td{_kind(name)}>{cell}</td>' for name, cell in zip(names, row, strict=True))}</tr>"
        for row in rows
    )
    head = f"<thead><tr>{_heads(names)}</tr></thead>" if any(name.strip("#") for name in names) else ""
    return f"<table>{head}<tbody>{body}</tbody></table>"


def _kind(name: str) -> str:
    return ' class="number"' if name.startswith("#") else ""
