"""The diagnosis on a terminal or in a pipe, narrow ones too."""

from collections.abc import Iterator

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from longtake.doctor.clips import Finding
from longtake.doctor.document import Diagnosis, reason_of
from longtake.doctor.totals import BucketTotal
from longtake.doctor.words import bucket_line, bucket_words, cut_words, limit_lines, place_words, shown_words, summary
from longtake.planner.words import plain

MOST_ROWS = 40
MOST_OF_A_KIND = 8
"""Lines of reasons, and of groups of clips that are alike."""
NARROW = 90
"""Columns below which a clip has lines of its own instead of a row."""


def print_diagnosis(diagnosis: Diagnosis, console: Console) -> None:
    """The clips, those with something to look at first, then the totals; all but the plan."""
    findings = sorted(diagnosis.examination.findings, key=lambda each: _order(each, diagnosis))
    shown = findings[:MOST_ROWS]
    if console.width < NARROW:
        _print_lines(shown, diagnosis, console)
    else:
        console.print(_table(shown, diagnosis))
    if len(findings) > len(shown):
        console.print(Text(f"and {len(findings) - len(shown)} more (--json has all)", style="dim"))
    console.print()
    _say(summary(diagnosis), console, "bold")
    for line in _totals(diagnosis):
        _say(line, console)
    for line in diagnosis.stops:
        _say(f"prepare would stop: {line}", console, "bold red")


def _order(finding: Finding, diagnosis: Diagnosis) -> int:
    return 2 if finding.used and not diagnosis.warnings_of(finding) else 1 if finding.used else 0


def _say(line: str, console: Console, style: str = "") -> None:
    console.print(Text(plain(line), style=style))


def _table(findings: list[Finding], diagnosis: Diagnosis) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False)
    table.add_column("clip", overflow="fold", ratio=4)
    table.add_column("shows", overflow="fold", ratio=4)
    table.add_column("trained as", overflow="fold", ratio=4)
    table.add_column("cut", justify="right", no_wrap=True)
    table.add_column("", overflow="fold", ratio=7)
    for finding in findings:
        trained = bucket_words(finding.fits) if finding.used else "left out"
        held = ", held out" if finding.used and finding.split == "validation" else ""
        texts = [place_words(finding), shown_words(finding.info, brief=True), trained + held, cut_words(finding.fits)]
        notes = "; ".join(_notes(finding, diagnosis))
        style = "" if finding.used else "red"
        table.add_row(*(Text(plain(text)) for text in (*texts, notes)), style=style)
    return table


def _print_lines(findings: list[Finding], diagnosis: Diagnosis, console: Console) -> None:
    for finding in findings:
        _say(place_words(finding), console, "bold" if finding.used else "bold red")
        if finding.info is not None:
            _say(f"  {shown_words(finding.info)}", console)
        if finding.used:
            held = ", held out" if finding.split == "validation" else ""
            _say(f"  {bucket_words(finding.fits)}{held}, {cut_words(finding.fits)} cut away", console)
        for note in _notes(finding, diagnosis):
            _say(f"  {'' if finding.used else 'left out: '}{note}", console, "yellow" if finding.used else "red")


def _notes(finding: Finding, diagnosis: Diagnosis) -> list[str]:
    return diagnosis.warnings_of(finding) if finding.used else [reason_of(problem) for problem in finding.left_out]


def _totals(diagnosis: Diagnosis) -> Iterator[str]:
    totals = diagnosis.totals
    yield from limit_lines(diagnosis)
    for reason, clips in totals.reasons[:MOST_OF_A_KIND]:
        yield f"left out: {clips} x {reason}"
    stages = {bucket.stage for bucket in totals.buckets}
    for bucket in totals.buckets:
        yield _stage(bucket, len(stages)) + bucket_line(bucket, diagnosis.global_batch_size)
    for places in totals.same_content[:MOST_OF_A_KIND]:
        yield f"the same content: {_named(places)}"
    for caption, places in totals.same_caption[:MOST_OF_A_KIND]:
        yield f"one caption for {len(places)} clips: {caption[:60]!r}: {_named(places)}"
    yield from diagnosis.examination.remarks


def _stage(bucket: BucketTotal, stages: int) -> str:
    return f"stage of {bucket.stage} frames: " if stages > 1 else ""


def _named(places: tuple[str, ...]) -> str:
    more = len(places) - MOST_OF_A_KIND
    return ", ".join(places[:MOST_OF_A_KIND]) + (f" and {more} more" if more > 0 else "")
