"""What `longtake doctor` found, as one value and as JSON."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from longtake.data.metadata import TOLERANCE
from longtake.doctor.clips import Examination, Finding, Fit, Row
from longtake.doctor.needs import Needs
from longtake.doctor.totals import Totals
from longtake.errors import Problem


@dataclass(frozen=True)
class Diagnosis:
    """A dataset for `model` at `fps` frames a second; `warnings` are of the rows that are used."""

    model: str
    task: str
    fps: int
    sources: tuple[str, ...]
    global_batch_size: int
    examination: Examination
    warnings: Mapping[Row, list[str]]
    totals: Totals
    needs: Needs

    def warnings_of(self, finding: Finding) -> list[str]:
        """Those of one row."""
        return self.warnings.get((finding.source, finding.where), [])

    @property
    def stops(self) -> list[str]:
        """With what words `prepare` would stop; empty where it would not."""
        return [str(problem) for error in self.examination.refusals[:1] for problem in error.problems[-1:]]


def reason_of(problem: Problem) -> str:
    """What is wrong and what to do, without the place."""
    return str(replace(problem, where=""))


def to_json(diagnosis: Diagnosis) -> dict[str, Any]:
    """Everything; docs/data.md has the keys."""
    totals = diagnosis.totals
    return {
        "model": diagnosis.model,
        "task": diagnosis.task,
        "fps": diagnosis.fps,
        "sources": list(diagnosis.sources),
        "stops": diagnosis.stops,
        "remarks": list(diagnosis.examination.remarks),
        "totals": {
            **{key: value for key, value in asdict(totals).items() if isinstance(value, int | float)},
            "reasons": [{"reason": reason, "clips": clips} for reason, clips in totals.reasons],
            "buckets": [asdict(bucket) for bucket in totals.buckets],
            "same_content": [list(places) for places in totals.same_content],
            "same_caption": [{"caption": caption, "clips": list(places)} for caption, places in totals.same_caption],
            "limit": {"share": TOLERANCE, "checks": [asdict(check) for check in diagnosis.examination.checks]},
        },
        "plan": {"line": diagnosis.needs.line, "report": diagnosis.needs.report},
        "clips": [_clip(finding, diagnosis.warnings_of(finding)) for finding in diagnosis.examination.findings],
    }


def _clip(finding: Finding, warnings: list[str]) -> dict[str, Any]:
    record, info = finding.record, finding.info
    shown = None
    if info is not None:
        shown = asdict(info)
        shown["seconds"] = shown.pop("duration")
        del shown["fingerprint"]
    return {
        "where": finding.where,
        "source": finding.source,
        "split": finding.split if finding.used else None,
        "file": None if record is None else str(record.path),
        "caption": None if record is None else record.prompt,
        "shows": shown,
        "buckets": [_bucket(fit) for fit in finding.fits],
        "left_out": [reason_of(problem) for problem in finding.left_out],
        "warnings": warnings,
    }


def _bucket(fit: Fit) -> dict[str, Any]:
    clip = fit.placed.clip
    return {
        **asdict(clip.bucket),
        "stages": list(fit.placed.stages),
        "tokens": fit.tokens,
        "start_seconds": clip.window.start,
        "cropped": round(fit.cropped, 4),
        "scale": round(fit.scale, 4),
    }
