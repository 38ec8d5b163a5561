"""A report as JSON, and as the text that `longtake plan` prints. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from longtake.planner.plans import Plan, Report
from longtake.planner.words import (
    LETTERS,
    PARTS,
    all_stages,
    answer,
    bucket_words,
    case,
    costs,
    in_unit,
    peak_words,
    plain,
    scale_bytes,
    seconds_words,
    settings,
    unit_of,
    verdict,
)
from longtake.units import format_bytes

COLOURS = {
    "weights": "blue",
    "adapters": "cyan",
    "gradients": "green",
    "optimizer": "yellow",
    "checkpoints": "bright_blue",
    "block": "red",
    "buffers": "magenta",
    "workspace": "bright_magenta",
    "allocator_slack": "bright_black",
    "context": "white",
}


def to_json(report: Report) -> dict[str, Any]:
    """`report` as `longtake plan --json` writes it: bytes and seconds, without the timelines."""
    return {
        "model": report.model,
        "task": report.task,
        "method": report.method,
        "tokens": report.tokens,
        "bucket": list(report.bucket),
        "budget_bytes": report.budget_bytes,
        "host_budget_bytes": report.host_budget_bytes,
        "disk_budget_bytes": report.disk_budget_bytes,
        "gpu": report.gpu,
        "gpus": report.gpus,
        "chosen": report.chosen,
        "plans": [_plan_as_json(plan) for plan in report.plans],
        "references": [_plan_as_json(plan) for plan in report.references],
        "advice": [asdict(advice) for advice in report.advice],
        "notes": list(report.notes),
        "command": report.command,
        "seconds": report.seconds,
    }


def _plan_as_json(plan: Plan) -> dict[str, Any]:
    return {
        "name": plan.name,
        "strategy": {
            "memory": plan.strategy.model_dump(mode="json"),
            "parallel": plan.parallel.model_dump(mode="json"),
        },
        "micro_batch_size": plan.micro_batch_size,
        "fits": plan.fits,
        "why_not": plan.why_not,
        "stage": plan.stage,
        "bucket": list(plan.bucket),
        "peak_bytes": {tier: plan.peak_bytes.get(tier, 0) for tier in ("device", "host", "disk")},
        "allocated_bytes": plan.allocated_bytes,
        "step_seconds": plan.step_seconds,
        "stalled_seconds": plan.stalled_seconds,
        "bound_by": plan.bound_by,
        "breakdown_bytes": {part: plan.breakdown_bytes.get(part, 0) for part in PARTS},
        "stages": [asdict(stage) for stage in plan.stages],
        "buckets": [{**asdict(needs), "bucket": list(needs.bucket)} for needs in plan.buckets],
    }


def print_report(report: Report, console: Console) -> None:
    """`report` on `console`: the answer in one line, then what it stands on; letters instead of colours in a pipe."""
    console.print(Text(answer(report), style="bold" if report.chosen is not None else "bold red"))
    console.print(Text(case(report), style="dim"))
    console.print()
    shown = report.plans[report.chosen or 0] if report.plans else None
    if report.chosen is None:
        _print_what_would_fit(report, console)
    if shown is not None:
        _print_strategy(shown, report.chosen is not None, console)
    if report.plans:
        console.print()
        console.print(_frontier(report))
    for reference in report.references:
        console.print(Text(f"for comparison: {_reference(reference)}"))
    if shown is not None:
        _print_needs(report, shown, console)
    _print_end(report, console)


def _print_what_would_fit(report: Report, console: Console) -> None:
    if not report.advice:
        return
    console.print(Text("what would make it fit:"))
    table = _listing(right=(1, 2))
    for advice in report.advice:
        needs = format_bytes(advice.device_bytes)
        table.add_row(plain(advice.change), needs, f"{seconds_words(advice.step_seconds)} a step")
    console.print(Padding(table, (0, 0, 1, 2)))


def _print_strategy(plan: Plan, chosen: bool, console: Console) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(overflow="fold")
    table.add_row("strategy" if chosen else "nearest", Text(plain(plan.name)))
    table.add_row("costs", Text(costs(plan)))
    table.add_row("settings", Text(", ".join(f"{key}={value}" for key, value in settings(plan))))
    console.print(table)


def _frontier(report: Report) -> Table:
    """The plans, fastest first; the chosen one is marked."""
    unit = unit_of(plan.peak_bytes.get(tier, 0) for plan in report.plans for tier in plan.peak_bytes)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), collapse_padding=True, show_edge=False)
    table.add_column("", width=1)
    table.add_column("plan", overflow="fold", ratio=1)
    for tier in ("device", "host", "disk"):
        table.add_column(f"{tier}\n{unit}", justify="right", no_wrap=True)
    table.add_column("a step\ns", justify="right", no_wrap=True)
    table.add_column("bound by", no_wrap=True)
    table.add_column("fits", no_wrap=True)
    for index, plan in enumerate(report.plans):
        chosen = index == report.chosen
        sizes = [in_unit(plan.peak_bytes.get(tier, 0), unit) for tier in ("device", "host", "disk")]
        seconds = seconds_words(plan.step_seconds).removesuffix(" s")
        row = [*sizes, seconds, plain(plan.bound_by), verdict(report, plan)]
        style = "bold" if chosen else "" if plan.fits else "dim"
        table.add_row(">" if chosen else "", Text(plain(plan.name)), *row, style=style)
    return table


def _reference(plan: Plan) -> str:
    device = format_bytes(plan.peak_bytes.get("device", 0))
    return f"{plain(plan.name)}: {device} {'fits' if plan.fits else 'does not fit'}"


def _print_needs(report: Report, plan: Plan, console: Console) -> None:
    """Where the bytes of one plan are, and what its other stages and buckets need."""
    device = plan.peak_bytes.get("device", 0)
    above = "where the bytes are" if report.chosen is not None else "where the bytes of the nearest are"
    of = f"{format_bytes(device)} at the peak, in {peak_words(plan)}; the budget is {format_bytes(report.budget_bytes)}"
    console.print()
    console.print(Text(f"{above}: {of}"))
    console.print(_bar(plan, report.budget_bytes, console), no_wrap=True, overflow="crop")
    console.print(Padding(_legend(plan, console), (0, 0, 1, 0)))
    console.print(_stages(plan))
    if len(plan.buckets) > 1:
        console.print(Padding(_buckets(plan), (1, 0, 0, 0)))


def _bar(plan: Plan, budget_bytes: int, console: Console) -> Text:
    """Characters that stand for equally many bytes, up to the budget or the peak; `|` is the budget in a longer bar."""
    device = plan.peak_bytes.get("device", 0)
    most, width = scale_bytes(device, budget_bytes), console.width
    bar, held = Text(), 0
    for part in PARTS:
        held += plan.breakdown_bytes.get(part, 0)
        count = round(held * width / most) - len(bar)
        bar.append(_mark(part, console) * max(0, count), COLOURS[part])
    bar.append("." * (width - len(bar)), "dim")
    if device > budget_bytes:
        at = min(budget_bytes * width // most, width - 1)
        bar = Text.assemble(bar[:at], ("|", "bold"), bar[at + 1 :])
    return bar


def _legend(plan: Plan, console: Console) -> Table:
    """What each mark of the bar is, in as many columns as there is room for."""
    columns = max(1, console.width // 27)
    table = Table.grid(padding=(0, 2))
    for _ in range(columns):
        table.add_column(no_wrap=True)
    entries = [_entry(part, nbytes, console) for part in PARTS if (nbytes := plan.breakdown_bytes.get(part, 0))]
    for start in range(0, len(entries), columns):
        table.add_row(*entries[start : start + columns])
    return table


def _entry(part: str, nbytes: int, console: Console) -> Text:
    name = part.replace("_", " ")
    return Text.assemble((_mark(part, console), COLOURS[part]), f" {name} {format_bytes(nbytes)}")


def _mark(part: str, console: Console) -> str:
    coloured = console.is_terminal and console.color_system is not None and not console.no_color
    return "█" if coloured and not console.options.ascii_only else LETTERS[part]


def _stages(plan: Plan) -> Table:
    table = _listing(right=(2, 3))
    for stage in all_stages(plan):
        host = f"host {format_bytes(stage.host_bytes)}" if stage.host_bytes else ""
        mark = "the peak" if stage.stage == plan.stage else ""
        table.add_row(stage.stage, Text(plain(stage.what)), format_bytes(stage.device_bytes), host, mark)
    return table


def _buckets(plan: Plan) -> Table:
    table = _listing(right=(1, 2))
    for needs in plan.buckets:
        seconds = f"{seconds_words(needs.step_seconds)} a step"
        table.add_row(bucket_words(needs.bucket), format_bytes(needs.device_bytes), seconds)
    return table


def _listing(right: Iterable[int]) -> Table:
    """A table without rules; columns of words wrap, those of numbers do not."""
    table, numbers = Table.grid(padding=(0, 2)), set(right)
    for column in range(max(numbers) + 1):
        table.add_column(justify="right" if column in numbers else "left", no_wrap=column in numbers)
    return table


def _print_end(report: Report, console: Console) -> None:
    if report.notes:
        console.print()
    for note in report.notes:
        console.print(Text(f"note: {plain(note)}"))
    if report.command and report.chosen is not None:
        console.print(Text("\ntrain with:"))
        # a line that one copies is not broken
        console.print(Text(f"  {plain(report.command)}"), soft_wrap=True)
