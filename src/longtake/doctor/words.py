"""Rows and totals in words, for the terminal and the page."""

from collections.abc import Iterator

from longtake.data.metadata import TOLERANCE
from longtake.data.video import ClipInfo
from longtake.doctor.clips import Check, Finding, Fit
from longtake.doctor.document import Diagnosis
from longtake.doctor.totals import BucketTotal
from longtake.units import format_seconds

_STEPS = {"rows": "rows cannot be read", "files": "files cannot be used"}


def place_words(finding: Finding) -> str:
    """Where the row is, and its file where that does not tell: `clips.csv:row 3 (kite.mp4)`."""
    name = finding.record.path.name if finding.record is not None else ""
    return finding.where if name in finding.where else f"{finding.where} ({name})"


def shown_words(info: ClipInfo | None, brief: bool = False) -> str:
    """`1920x1080, 29.97 fps, 5.0 s, 150 frames, turned 90°, h264 yuv420p`; a `brief` one without frames and codec."""
    if info is None:
        return ""
    parts = [f"{info.width}x{info.height}"]
    parts += ["still"] if info.is_image else [f"{info.fps:.4g} fps", f"{info.duration:.1f} s"]
    parts += [] if info.is_image or brief else [f"{info.frames} frames"]
    parts += [f"turned {info.rotation}°"] if info.rotation else []
    parts += [] if brief else [f"{info.codec} {info.pixel_format}".strip()]
    return ", ".join(filter(None, parts))


def bucket_words(fits: tuple[Fit, ...]) -> str:
    """`81 frames of 832x480`; `17, 49, 81 frames of 832x480`."""
    if not fits:
        return ""
    bucket = fits[-1].placed.clip.bucket
    counts = ", ".join(str(fit.placed.clip.bucket.frames) for fit in fits)
    return f"{counts} frame{'' if counts == '1' else 's'} of {bucket.width}x{bucket.height}"


def cut_words(fits: tuple[Fit, ...]) -> str:
    """`12%`, the share of the picture that is cut away."""
    return f"{fits[-1].cropped:.0%}" if fits else ""


def summary(diagnosis: Diagnosis) -> str:
    """The dataset in one line."""
    totals = diagnosis.totals
    parts = [f"{totals.clips} clips can be used ({totals.train} to train on, {totals.validation} held out)"]
    parts += [f"{totals.stills} of them stills"] if totals.stills else []
    parts.append(f"{format_seconds(totals.seconds)} of video")
    parts.append(f"{totals.left_out} left out")
    return ", ".join(parts)


def limit_lines(diagnosis: Diagnosis) -> Iterator[str]:
    """What of a source is left out, against the share at which `prepare` stops; nothing where all can be used."""
    totals = diagnosis.totals
    for check in diagnosis.examination.checks:
        if check.bad:
            yield _check_words(check)
    if totals.uncounted:
        why = "too short, or with a start after the end, or stills"
        yield f"{totals.uncounted} left out as {why}: these do not count toward the {TOLERANCE:.0%}"


def bucket_line(bucket: BucketTotal, global_batch_size: int) -> str:
    """What is trained at one shape."""
    frames = f"{bucket.frames} frame{'' if bucket.frames == 1 else 's'}"
    held = f", {bucket.held_out} held out" if bucket.held_out else ""
    clips = f"{bucket.clips} clip{'' if bucket.clips == 1 else 's'}"
    line = f"{frames} of {bucket.width}x{bucket.height}: {clips}{held}, {bucket.tokens:,} tokens each"
    return f"{line}; fewer than a step's {global_batch_size}, so they repeat in it" if bucket.repeats else line


def _check_words(check: Check) -> str:
    share = f"{check.bad} of {check.rows} {_STEPS[check.step]} ({check.bad / check.rows:.0%})"
    verdict = "more than" if check.stops else "within"
    return f"{check.source}: {share}, {verdict} the {TOLERANCE:.0%} at which prepare stops"
