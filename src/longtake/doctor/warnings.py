"""What about a clip that is trained on a person should look at; none of it keeps `prepare` from anything."""

from collections.abc import Callable, Mapping, Sequence

from longtake.doctor.clips import Examination, Finding, Row
from longtake.models.spec import ModelSpec

MUCH_CROPPED = 0.3
"""Share of a picture that may be cut away before it is warned of."""
MUCH_ENLARGED = 1.25
FEW_FPS = 0.9
"""Share of the model's frames a second from which on frames do not repeat to speak of."""
MOST_NAMED = 3


def warnings_of(examination: Examination, spec: ModelSpec, too_long: Callable[[str], str]) -> dict[Row, list[str]]:
    """The warnings of each row that is used, by its source and place; `too_long` says it of a caption, or nothing."""
    doubles, shared = same_content(examination.used), same_caption(examination.used)
    found: dict[Row, list[str]] = {}
    for finding in examination.used:
        assert finding.record is not None
        long = too_long(finding.record.prompt)
        lines = [note.what for note in finding.notes] + _of_picture(finding, spec) + ([long] if long else [])
        lines += _of_doubles(finding, doubles.get(finding.clip, ()))
        if len(alike := shared.get(finding.record.prompt, ())) > 1:
            lines.append(f"{len(alike)} clips have this caption")
        found[finding.source, finding.where] = lines
    return found


def same_content(findings: Sequence[Finding]) -> Mapping[str, list[Finding]]:
    """Clips by the key of their content and part, where several have the same."""
    groups: dict[str, list[Finding]] = {}
    for finding in findings:
        groups.setdefault(finding.clip, []).append(finding)
    return {key: group for key, group in groups.items() if len(group) > 1}


def same_caption(findings: Sequence[Finding]) -> Mapping[str, list[Finding]]:
    """Clips by caption, where several have the same."""
    groups: dict[str, list[Finding]] = {}
    for finding in findings:
        assert finding.record is not None
        groups.setdefault(finding.record.prompt, []).append(finding)
    return {caption: group for caption, group in groups.items() if len(group) > 1}


def _of_picture(finding: Finding, spec: ModelSpec) -> list[str]:
    fit, info = finding.fits[-1], finding.info
    assert info is not None
    lines = []
    if fit.cropped > MUCH_CROPPED:
        lines.append(f"{fit.cropped:.0%} of the picture is cut away")
    if fit.scale > MUCH_ENLARGED:
        lines.append(f"it is enlarged {fit.scale:.1f} times")
    if not info.is_image and info.fps < FEW_FPS * spec.fps:
        lines.append(f"it has {info.fps:.3g} fps: frames repeat at the model's {spec.fps}")
    return lines


def _of_doubles(finding: Finding, group: Sequence[Finding]) -> list[str]:
    others = [other for other in group if other is not finding]
    if not others:
        return []
    named = ", ".join(other.where for other in others[:MOST_NAMED])
    named += f" and {len(others) - MOST_NAMED} more" if len(others) > MOST_NAMED else ""
    lines = [f"the same content as {named}"]
    if any(other.split != finding.split for other in others):
        lines.append("it is both trained on and in the validation")
    return lines
