"""Clips and captions as a dataset lists them: a folder, CSV, JSON or JSONL read into `ClipRecord`s."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from longtake.data.regular_files import open_regular, refusal
from longtake.data.tables import Row, read_text, rows_of
from longtake.errors import DataError, Problem

VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".3gp", ".mj2"})
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})
PROMPT_COLUMNS = ("prompt", "caption")
MAX_CAPTION = 50_000
"""Characters; text encoders read some 2000."""
TOLERANCE = 0.1
"""Share of a source's clips that may be unusable."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/|(data|concat|subfile|pipe|fd):")
_HALF = re.compile("[\ud800-\udfff]")
"""Half of a UTF-16 pair, as which Python also has a byte of a file's name that is not UTF-8."""
_MOST_BYTES = 4
"""Of a character, in the encodings that are read."""
_STILL = "clip-still"
_NO_STILLS = "leave it out: this model learns from clips, whose first frame it is given"


@dataclass(frozen=True)
class ClipRecord:
    """One row: a file inside the dataset's root, its caption, and the part of it to use.

    `start` is in seconds; `frames` / `fps` is the length of that part. `where` names the row in messages.
    """

    path: Path
    prompt: str
    start: float | None
    frames: int | None
    fps: float | None
    where: str


@dataclass(frozen=True)
class Root:
    """The folder that a source's files are in; links and `..` may lead out of it only where they are allowed."""

    folder: Path
    allow_links: bool


def read_source(source: Path, image_allowed: bool, allow_links: bool = False) -> tuple[list[ClipRecord], list[Problem]]:
    """The good rows of `source` and what is wrong with every bad one.

    `source` is a folder of `clip.mp4` + `clip.txt` (stills too where `image_allowed`; a still beside a clip of the same
    name is its poster and is passed over), or a CSV, JSON or JSONL file with columns `video` and `prompt` (or
    `caption`), and optionally `start`, `frames`, `fps`; further columns are ignored. Paths are relative to the file's
    folder and stay in it, their links followed, unless `allow_links`. Row 1 of a CSV file is its header. Raises
    DataError where there is nothing to read, and, in one line, where all of it are stills of no use.
    """
    if _URL.match(str(source)):
        remedy = "download it first and give its path"
        raise refusal("the source is a URL", str(source), remedy, code="source-url")
    try:
        is_folder, exists = source.is_dir(), source.exists()
    except (OSError, ValueError) as error:
        what = f"the source cannot be read ({error})"
        raise refusal(what, str(source), "correct data.source", code="source-unreadable") from None
    if not exists:
        raise refusal("the source does not exist", str(source), "correct data.source", code="source-missing")
    root = Root(source.resolve() if is_folder else source.resolve().parent, allow_links)
    results = _read_folder(source, root, image_allowed) if is_folder else _read_table(source, root, image_allowed)
    records = [result for result in results if isinstance(result, ClipRecord)]
    problems = [problem for result in results if isinstance(result, list) for problem in result]
    stills = sum(problem.code == _STILL for problem in problems)
    if stills and not records and len({problem.where for problem in problems}) == stills:
        remedy = "give clips: this model learns how a video goes on from the image that it is given, and stills do not"
        raise refusal(f"all {stills} of its clips are still images", str(source), remedy, code="source-stills-only")
    return records, problems


def usable(records: list[ClipRecord], problems: list[Problem], tolerance: float = TOLERANCE) -> list[ClipRecord]:
    """`records` if few enough rows are bad; raises DataError with all `problems` where more than `tolerance` are.

    The caller reports the problems of the rows that are left out.
    """
    bad = len({problem.where for problem in problems})
    if records and bad <= tolerance * (bad + len(records)):
        return records
    count = f"{bad} of {bad + len(records)} clips cannot be used"
    remedy = "correct these rows or take them out"
    verdict = Problem(f"{count}, more than {tolerance:.0%}", "dataset", remedy, code="data-too-many-bad")
    raise DataError([*problems, verdict])


def _read_table(source: Path, root: Root, image_allowed: bool) -> list[ClipRecord | list[Problem]]:
    rows = rows_of(source)
    if not rows:
        raise refusal("has no rows", source.name, "add rows with video and prompt", code="table-no-rows")
    _require_columns(source.name, rows)
    return [row.problems or _record(row, root, image_allowed) for row in rows]


def _require_columns(name: str, rows: list[Row]) -> None:
    """Raises DataError where no row at all has a column: then it is the file that is wrong, and once."""
    columns = sorted({column for row in rows for column in row.values})
    if not columns:
        return
    problems = []
    for wanted in (("video",), PROMPT_COLUMNS):
        if not set(wanted) & set(columns):
            near = get_close_matches(wanted[0], columns, 1, 0.5)
            present = ", ".join(columns)[:200]
            remedy = f"rename {near[0]!r} to {wanted[0]!r}" if near else f"add it to the columns {present}"
            problems.append(Problem(f"has no column {' or '.join(wanted)}", name, remedy, code="table-no-column"))
    if problems:
        raise DataError(problems)


def _record(row: Row, root: Root, image_allowed: bool) -> ClipRecord | list[Problem]:
    problems: list[Problem] = []
    path = _inside(root, row.values.get("video"), row.where, problems)
    prompt = _prompt(row.values, row.where, problems)
    start = _number(row, "start", (0.0, math.inf), "row-start", problems)
    frames = _number(row, "frames", (1.0, 1e7), "row-frames", problems)
    fps = _number(row, "fps", (1e-3, 1e4), "row-fps", problems)
    if frames is not None and frames != int(frames):
        problems.append(Problem(f"frames is {frames:g}", row.where, "write a whole number", code="row-frames"))
    if path is not None and not image_allowed and path.suffix.lower() in IMAGE_SUFFIXES:
        problems.append(Problem(f"{path.name} is a still image", row.where, _NO_STILLS, code=_STILL))
    if problems or path is None or prompt is None:
        return problems
    return ClipRecord(path, prompt, start, None if frames is None else int(frames), fps, row.where)


def _prompt(values: Mapping[str, object], where: str, problems: list[Problem]) -> str | None:
    column = next((name for name in PROMPT_COLUMNS if name in values), PROMPT_COLUMNS[0])
    value = values.get(column)
    if not isinstance(value, str):
        kind = "missing" if value is None else f"{str(value)[:80]!r}, not a text"
        code = "caption-missing" if value is None else "caption-no-text"
        problems.append(Problem(f"{column} is {kind}", where, "write one caption as text", code=code))
        return None
    return _caption(value, where, problems)


def _caption(text: str, where: str, problems: list[Problem]) -> str | None:
    caption = text.strip()
    if not caption:
        problems.append(
            Problem("the caption is empty", where, "describe the clip, or leave it out", code="caption-empty")
        )
    elif "\0" in caption:
        problems.append(Problem("the caption has a NUL character", where, "remove it", code="caption-nul"))
    elif _HALF.search(caption):
        remedy = "write the character itself"
        problems.append(Problem("the caption has half of a UTF-16 pair", where, remedy, code="caption-half-pair"))
    elif len(caption) > MAX_CAPTION:
        problems.append(_too_long(where))
    else:
        return caption
    return None


def _too_long(where: str) -> Problem:
    remedy = "take out what is no description"
    return Problem(f"the caption has more than {MAX_CAPTION} characters", where, remedy, code="caption-too-long")


def _number(row: Row, column: str, bounds: tuple[float, float], code: str, problems: list[Problem]) -> float | None:
    value = row.values.get(column)
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]  # refused below
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    least, most = bounds
    if math.isfinite(number) and least <= number <= most:
        return number
    remedy = f"write a number of at least {least:g}" + (f" and at most {most:g}" if math.isfinite(most) else "")
    problems.append(Problem(f"{column} is {str(value)[:80]!r}", row.where, remedy, code=code))
    return None


def _inside(root: Root, value: object, where: str, problems: list[Problem]) -> Path | None:
    """The regular file that `value` names below `root`, links followed; None where a problem was added."""
    found = _meant(root, value, where)
    if isinstance(found, Problem):
        problems.append(found)
        return None
    return found


def _meant(root: Root, value: object, where: str) -> Path | Problem:
    remedy = "write a path relative to the dataset's folder"
    if value is None or (isinstance(value, str) and not value.strip()):
        return Problem("video is missing", where, remedy, code="path-missing")
    if not isinstance(value, str):
        return Problem(f"video is {str(value)[:80]!r}, not a path", where, remedy, code="path-no-text")
    if _URL.match(value):
        remedy = "download it and write its path"
        return Problem(f"video is a URL: {value[:200]}", where, remedy, code="path-url")
    try:
        path = (root.folder / value.strip()).resolve()
        return _unfit(root, path, value[:200], where) or path
    except (OSError, ValueError, RuntimeError) as error:
        what = f"{value[:200]!r} cannot be opened ({str(error)[:150]!r})"
        return Problem(what, where, remedy, code="path-unusable")


def _unfit(root: Root, path: Path, value: str, where: str) -> Problem | None:
    """What speaks against `path`."""
    if _HALF.search(str(path)):
        remedy = "rename the file, or the folder that it is in"
        return Problem("the path is not UTF-8", where, remedy, code="path-encoding")
    if not root.allow_links and not path.is_relative_to(root.folder):
        what = f"{value} is outside the dataset's folder {root.folder}"
        remedy = "move or copy it there, or allow it by data.allow_links = true"
        return Problem(what, where, remedy, code="path-outside")
    if not path.exists():
        remedy = "write / between folders" if "\\" in value else "correct the path, relative to the dataset's folder"
        return Problem(f"{value} does not exist", where, remedy, code="file-missing")
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "a pipe or a device"
        return Problem(f"{value} is {kind}, not a file", where, "name a regular file", code="file-irregular")
    return None


def _read_folder(folder: Path, root: Root, image_allowed: bool) -> list[ClipRecord | list[Problem]]:
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    videos = [name for name in names if Path(name).suffix.lower() in VIDEO_SUFFIXES]
    posters = {Path(name).stem for name in videos}
    stills = [n for n in names if Path(n).suffix.lower() in IMAGE_SUFFIXES and Path(n).stem not in posters]
    if not videos and not stills:
        remedy = "put clip.mp4 beside clip.txt; folders inside it are not read"
        tables = [name for name in names if Path(name).suffix.lower() in (".csv", ".json", ".jsonl")]
        remedy = f"write data.source = {str(folder / tables[0])!r}" if tables else remedy
        raise refusal("the folder has no clips", str(folder), remedy, code="source-no-clips")
    captions = {Path(name).stem for name in names if name.lower().endswith(".txt")}
    orphans = sorted(captions - posters - {Path(name).stem for name in stills})
    return [
        *(_pair(root, name, image_allowed) for name in sorted(videos + stills)),
        *([_orphan(f"{root.folder.name}/{stem}.txt")] for stem in orphans),
    ]


def _pair(root: Root, name: str, image_allowed: bool) -> ClipRecord | list[Problem]:
    where = _printable(f"{root.folder.name}/{name}")
    text_name = f"{Path(name).stem}.txt"
    if not (root.folder / text_name).is_symlink() and not (root.folder / text_name).exists():
        return [Problem("has no caption", where, f"write one into {text_name}", code="clip-without-caption")]
    problems: list[Problem] = []
    text_path = _inside(root, text_name, where, problems)
    if text_path is None:
        return problems
    try:
        nbytes = text_path.stat().st_size
        if nbytes > MAX_CAPTION * _MOST_BYTES:
            return [_too_long(where)]
        text = ""
        if nbytes:
            with open_regular(text_path, where) as file:
                text = read_text(file, where)
    except DataError as error:
        return list(error.problems)
    return _record(Row(where, {"video": name, "prompt": text}), root, image_allowed)


def _orphan(place: str) -> Problem:
    remedy = "add the clip or remove it"
    return Problem("a caption without a clip", _printable(place), remedy, code="caption-without-clip")


def _printable(place: str) -> str:
    """`place` as UTF-8 can have it."""
    return place.encode("utf-8", "backslashreplace").decode("utf-8")
