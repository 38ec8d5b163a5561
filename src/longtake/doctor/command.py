"""What `longtake doctor` does: a config to a report on the terminal, as JSON, as a page of pictures."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from longtake import files
from longtake.config.schema import RunConfig
from longtake.doctor.captions import CaptionLengths
from longtake.doctor.clips import Examination, examine
from longtake.doctor.document import Diagnosis, to_json
from longtake.doctor.needs import Needs, needs_of
from longtake.doctor.sheet import write_sheet
from longtake.doctor.terminal import print_diagnosis
from longtake.doctor.totals import totals_of
from longtake.doctor.warnings import warnings_of
from longtake.errors import ConfigError, DataError, Problem
from longtake.models.wan.detection import variant_of
from longtake.planner.words import plain
from longtake.progress import Reporter

FILE_WIDTH = 120
"""Columns of what goes to a file or a pipe."""
UNPLANNED = Needs("no plan: it was not asked for")
STOPPED = Needs("no plan: prepare would stop")


@dataclass(frozen=True)
class Asked:
    """Where the report goes beside the terminal, `-` for JSON in its place; of how many clips the page has pictures."""

    json_file: str = ""
    html: Path | None = None
    most_clips: int = 200
    gpu: str = ""
    plan: bool = True


def answer(config: RunConfig, asked: Asked, reporter: Reporter) -> None:
    """Examines the dataset and says what was found.

    Raises what `prepare` would where that would stop, when all has been said: DataError, ConfigError or ModelError.
    """
    if asked.most_clips < 1:
        raise ConfigError(
            Problem(f"{asked.most_clips} clips are no page", "--clips", "use 1 or more", code="sheet-clips-none")
        )
    diagnosis = diagnose(config, reporter)
    if asked.html is not None:
        diagnosis = write_sheet(diagnosis, asked.html, asked.most_clips, reporter)
        reporter.line(f"wrote {asked.html}")
    console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH, highlight=False)
    if asked.json_file != "-":
        print_diagnosis(diagnosis, console)
    needs = _needs(config, diagnosis, asked)
    if asked.json_file != "-" and needs is not UNPLANNED:
        console.print(plain(needs.line), markup=False, emoji=False)
    _write_json(replace(diagnosis, needs=needs), asked.json_file, reporter)
    for refusal in diagnosis.examination.refusals[:1]:
        raise DataError([_printable(problem) for problem in refusal.problems])


def diagnose(config: RunConfig, reporter: Reporter) -> Diagnosis:
    """All but the plan and what only pictures tell."""
    data, spec = config.data, variant_of(config.model).spec
    examination = examine(data, spec, config.training.seed, reporter)
    lengths = CaptionLengths(config.model, spec.text_tokens)
    return Diagnosis(
        model=spec.name,
        task=spec.task,
        fps=spec.fps,
        sources=(data.source, *([data.validation] if isinstance(data.validation, str) else [])),
        global_batch_size=config.training.global_batch_size,
        examination=examination,
        warnings=warnings_of(examination, spec, lengths.excess),
        totals=totals_of(examination, data, config.training.global_batch_size),
        needs=UNPLANNED,
    )


def _needs(config: RunConfig, diagnosis: Diagnosis, asked: Asked) -> Needs:
    if diagnosis.examination.refusals:
        return STOPPED
    return needs_of(config, _shapes(diagnosis.examination), asked.gpu) if asked.plan else UNPLANNED


def _shapes(examination: Examination) -> Sequence[tuple[int, int, int]]:
    """The buckets that are trained."""
    buckets = [fit.placed.clip.bucket for each in examination.used if each.source == "train" for fit in each.fits]
    return list(dict.fromkeys((bucket.frames, bucket.height, bucket.width) for bucket in buckets))


def _write_json(diagnosis: Diagnosis, file: str, reporter: Reporter) -> None:
    if not file:
        return
    text = json.dumps(to_json(diagnosis), indent=1) + "\n"  # in ASCII: names of files need not be text
    if file == "-":
        sys.stdout.write(text)
        return
    files.write_text(Path(file), text)
    reporter.line(f"wrote {file}")


def _printable(problem: Problem) -> Problem:
    return replace(problem, what=plain(problem.what), where=plain(problem.where), remedy=plain(problem.remedy))
