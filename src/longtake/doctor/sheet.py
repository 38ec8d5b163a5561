"""A contact sheet: each clip's pictures, caption and bucket on one HTML page that needs no other file and no script."""

import base64
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import TypeVar

from longtake.doctor.clips import Finding
from longtake.doctor.document import Diagnosis, reason_of
from longtake.doctor.pictures import Picture, pictures_of
from longtake.doctor.words import bucket_line, bucket_words, cut_words, limit_lines, place_words, shown_words, summary
from longtake.errors import DataError
from longtake.files import write_text
from longtake.planner.words import plain
from longtake.progress import Reporter

T = TypeVar("T")


def write_sheet(diagnosis: Diagnosis, path: Path, most_clips: int, reporter: Reporter) -> Diagnosis:
    """Writes the page, atomically, with pictures of `most_clips` clips, evenly chosen, in their largest bucket.

    Gives `diagnosis` with a warning for each clip of which a picture cannot be read, which `prepare` will leave out.
    Raises RunError where the page cannot be written.
    """
    chosen = evenly(diagnosis.examination.used, most_clips)
    pictures: list[list[Picture]] = []
    warnings = {row: list(lines) for row, lines in diagnosis.warnings.items()}
    with reporter.bar("pictures", len(chosen), "clips") as advance:
        for done, finding in enumerate(chosen, 1):
            try:
                pictures.append(pictures_of(finding.fits[-1].placed))
            except DataError as error:
                pictures.append([])
                lines = [f"prepare will leave it out: {reason_of(problem)}" for problem in error.problems]
                warnings.setdefault((finding.source, finding.where), []).extend(lines)
            advance(done, "")
    seen = replace(diagnosis, warnings=warnings)
    write_text(path, render_sheet(seen, list(zip(chosen, pictures, strict=True))))
    return seen


def evenly(items: Sequence[T], most: int) -> list[T]:
    """At most `most` of `items`, in their order, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[index * (len(items) - 1) // max(1, most - 1)] for index in range(most)]


def render_sheet(diagnosis: Diagnosis, cards: Sequence[tuple[Finding, Sequence[Picture]]]) -> str:
    """The page; every text in it is escaped, and its policy allows pictures that are in it and its own style."""
    style = (files("longtake.doctor") / "static" / "sheet.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    title = _text(", ".join(diagnosis.sources))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title} · Longtake doctor</title>
<style>{style}</style>
</head>
<body>
<header><p class="brand">Longtake doctor</p><h1>{title}</h1><p>{_text(summary(diagnosis))}</p></header>
{"".join(_stops(diagnosis))}<ul class="totals">{"".join(_totals(diagnosis))}</ul>
<p class="note">{_text(_chosen(diagnosis, len(cards)))}</p>
<main>{"".join(_card(diagnosis, finding, pictures) for finding, pictures in cards)}</main>
{_left_out(diagnosis)}</body>
</html>
"""


def _text(text: str) -> str:
    """`text` in one line for HTML, without characters that control something."""
    return escape(plain(text))


def _stops(diagnosis: Diagnosis) -> Iterator[str]:
    yield from (f'<p class="note bad">prepare would stop: {_text(line)}</p>\n' for line in diagnosis.stops)


def _totals(diagnosis: Diagnosis) -> Iterator[str]:
    batch = diagnosis.global_batch_size
    lines = [*limit_lines(diagnosis), *(bucket_line(bucket, batch) for bucket in diagnosis.totals.buckets)]
    yield from (f"<li>{_text(line)}</li>" for line in dict.fromkeys([*lines, *diagnosis.examination.remarks]))


def _chosen(diagnosis: Diagnosis, shown: int) -> str:
    used = diagnosis.totals.clips
    which = f"all {used} clips" if shown == used else f"{shown} of {used} clips, evenly chosen (--clips shows more)"
    return (
        f"{which}: the first, the middle and the last frame at {diagnosis.fps} a second, "
        "cropped and scaled as training will see them, of the stage with the most frames"
    )


def _card(diagnosis: Diagnosis, finding: Finding, pictures: Sequence[Picture]) -> str:
    assert finding.record is not None
    strip = "".join(_figure(picture) for picture in pictures) or "<p>no picture</p>"
    warnings = "".join(f"<li>{_text(line)}</li>" for line in diagnosis.warnings_of(finding))
    held = ' <span class="held">held out</span>' if finding.split == "validation" else ""
    facts = f"{shown_words(finding.info)} → {bucket_words(finding.fits)}, {cut_words(finding.fits)} cut away"
    listed = f'<ul class="warnings">{warnings}</ul>' if warnings else ""
    return f"""<article><h2>{_text(place_words(finding))}{held}</h2><div class="strip">{strip}</div>
<p class="caption">{_text(finding.record.prompt)}</p><p class="facts">{_text(facts)}</p>{listed}</article>
"""


def _figure(picture: Picture) -> str:
    name = f"{picture.name}, {picture.seconds:.2f} s" if picture.name != "still" else picture.name
    size = f'width="{picture.width}" height="{picture.height}"'
    return f'<figure><img src="{picture.uri}" alt="{name}" {size}><figcaption>{name}</figcaption></figure>'


def _left_out(diagnosis: Diagnosis) -> str:
    rows = [
        f"<tr><td>{_text(place_words(finding))}</td><td>{_text('; '.join(map(reason_of, finding.left_out)))}</td></tr>"
        for finding in diagnosis.examination.findings
        if not finding.used
    ]
    if not rows:
        return ""
    return f"<section><h2>Left out</h2><table><tbody>{''.join(rows)}</tbody></table></section>\n"
