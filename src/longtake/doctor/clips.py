"""What `prepare` will make of each clip of a dataset, heard from the code that prepares."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from longtake.config.schema import DataConfig
from longtake.data.cache import Entry
from longtake.data.claims import Claims
from longtake.data.dataset import Placed, Split, check_trainable, in_buckets, read_rows
from longtake.data.hashes import clip_key, content_hashes
from longtake.data.metadata import ClipRecord, usable
from longtake.data.split import split as split_entries
from longtake.data.video import ClipInfo, covering
from longtake.errors import DataError, Problem
from longtake.models.spec import ModelSpec
from longtake.progress import Advance, Reporter
from longtake.units import format_bytes

SLOW_BYTES = 2 * 2**30
"""From so many bytes on it is said that the files are being read for their hashes."""

MANY = 200
"""Clips from which on a bar shows how many have been looked at."""

Row = tuple[Split, str]
"""The source that a row is of, and its place there."""


@dataclass(frozen=True)
class Fit:
    """A clip in a bucket: the share of its picture that is cut away, and what its sides are multiplied with before."""

    placed: Placed
    tokens: int
    cropped: float
    scale: float


@dataclass(frozen=True)
class Finding:
    """A row: what its file shows, where it will be trained or why not, and what else there is to say.

    `split` is as the run will split it; `source` is the source that it is of. `clip` is the key of its content, the
    same for clips that are the same; empty where the row is left out.
    """

    where: str
    source: Split
    split: Split
    record: ClipRecord | None
    info: ClipInfo | None
    fits: tuple[Fit, ...]
    left_out: tuple[Problem, ...]
    notes: tuple[Problem, ...]
    clip: str

    @property
    def used(self) -> bool:
        """Whether anything is trained on it."""
        return bool(self.fits)


@dataclass(frozen=True)
class Check:
    """One comparison of `prepare` with the limit: `bad` of `rows` rows of a source were left out by a step."""

    source: Split
    step: str
    bad: int
    rows: int
    stops: bool


@dataclass(frozen=True)
class Examination:
    """All of a dataset. `refusals` are what would end `prepare`, in its order; `remarks` are of no single clip."""

    findings: tuple[Finding, ...]
    checks: tuple[Check, ...]
    refusals: tuple[DataError, ...]
    remarks: tuple[str, ...]

    @property
    def used(self) -> list[Finding]:
        """The rows that something is trained on."""
        return [finding for finding in self.findings if finding.used]


def examine(data: DataConfig, spec: ModelSpec, seed: int, reporter: Reporter) -> Examination:
    """Reads and places the clips as `prepare` does, and goes on where that would stop.

    Hashes are remembered in the cache's folder, where `prepare` finds them. Raises DataError where shape or sources
    cannot be used at all.
    """
    heard = Heard()
    sources = read_rows(data, spec, heard)
    total = sum(map(len, sources.values()))
    with (reporter if total >= MANY else Reporter(quiet=True)).bar("looked at", total, "clips") as advance:
        heard.advance = advance
        placed = in_buckets(sources, data, spec, seed, heard)
        advance(total, "")
    remarks: list[str] = []
    try:
        check_trainable(placed, data, spec, remarks.append)
    except DataError as error:
        heard.refusals.append(error)
    keys = _keys(placed, Path(data.cache), reporter.line)
    entries = _entries(placed, keys)
    held: set[Row] = {(entry.split, entry.where) for entry in split_entries(entries, data.validation, seed)[1]}
    by_row = _by_row(placed)
    findings = tuple(_finding(row, heard, by_row.get(row, []), keys, held, spec) for row in heard.rows())
    remarks += [str(problem) for problem in heard.general()]
    return Examination(findings, tuple(heard.checks), tuple(heard.refusals), tuple(remarks))


@dataclass
class Heard:
    """The listener that keeps everything and lets every clip pass that can be used."""

    records: dict[Row, ClipRecord] = field(default_factory=dict)
    infos: dict[Row, ClipInfo] = field(default_factory=dict)
    problems: dict[Row, list[Problem]] = field(default_factory=dict)
    notes: dict[Row, list[Problem]] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    refusals: list[DataError] = field(default_factory=list)
    advance: Advance | None = None

    def usable(self, records: list[ClipRecord], problems: list[Problem], split: Split) -> list[ClipRecord]:
        """All `records`; a refusal is kept."""
        step = "files" if any(check.source == split for check in self.checks) else "rows"
        self.records |= {(split, record.where): record for record in records}
        _add(self.problems, problems, split)
        if not records and not problems:
            return records
        refused: list[DataError] = []
        try:
            usable(records, problems)
        except DataError as error:
            refused.append(error)
        self.refusals += refused
        bad = len({problem.where for problem in problems})
        self.checks.append(Check(split, step, bad, bad + len(records), bool(refused)))
        return records

    def probed(self, record: ClipRecord, info: ClipInfo, split: Split) -> None:
        """Keeps it."""
        self.infos[split, record.where] = info
        if self.advance is not None:
            self.advance(len(self.infos), "")

    def note(self, problems: list[Problem], split: Split) -> None:
        """Keeps them."""
        _add(self.notes, problems, split)

    def rows(self) -> Iterable[Row]:
        """Every row: those that could be read, then the others."""
        return dict.fromkeys([*self.records, *self.problems])

    def general(self) -> Iterator[Problem]:
        """What was noted of no single clip."""
        for row, problems in self.notes.items():
            if row not in self.records:
                yield from problems


def _add(known: dict[Row, list[Problem]], problems: Sequence[Problem], split: Split) -> None:
    for problem in dict.fromkeys(problems):
        found = known.setdefault((split, problem.where), [])
        if problem not in found:
            found.append(problem)


def _by_row(placed: Sequence[Placed]) -> dict[Row, list[Placed]]:
    found: dict[Row, list[Placed]] = {}
    for item in placed:
        found.setdefault((item.split, item.clip.record.where), []).append(item)
    return found


def _keys(placed: Sequence[Placed], cache: Path, say: Callable[[str], None]) -> dict[Row, str]:
    """What identifies the content of each row's clip."""
    paths = {item.clip.record.path for item in placed}
    nbytes = sum(path.stat().st_size for path in paths)
    if nbytes > SLOW_BYTES:
        say(f"reads {format_bytes(nbytes)} of clips to tell which are the same; prepare will not read them again")
    hashes = content_hashes(paths, Claims(cache, 0, 1, say)) if paths else {}
    records = {(item.split, item.clip.record.where): item.clip.record for item in placed}
    return {row: clip_key(hashes[record.path], record) for row, record in records.items()}


def _entries(placed: Sequence[Placed], keys: Mapping[Row, str]) -> list[Entry]:
    """Entries as they would be, without the keys of tensors."""
    entries = []
    for item in placed:
        bucket, record = item.clip.bucket, item.clip.record
        shape = (bucket.frames, bucket.height, bucket.width)
        clip = keys[item.split, record.where]
        entries.append(Entry("", "", "", shape, item.stages, clip, record.prompt, record.where, item.split))
    return entries


def _finding(
    row: Row, heard: Heard, placed: Sequence[Placed], keys: Mapping[Row, str], held: set[Row], spec: ModelSpec
) -> Finding:
    source, where = row
    notes = tuple(heard.notes.get(row, ()))
    problems = (*heard.problems.get(row, ()), *(() if placed else notes))
    return Finding(
        where=where,
        source=source,
        split="validation" if row in held else source,
        record=heard.records.get(row),
        info=heard.infos.get(row),
        fits=tuple(fit_of(item, spec) for item in sorted(placed, key=lambda item: item.clip.bucket.frames)),
        left_out=() if placed else problems,
        notes=notes if placed else (),
        clip=keys.get(row, ""),
    )


def fit_of(item: Placed, spec: ModelSpec) -> Fit:
    """How a clip's picture comes into its bucket, by the geometry that `video.cover_and_crop` goes by."""
    bucket, info = item.clip.bucket, item.clip.info
    columns, rows = covering((info.width, info.height), (bucket.width, bucket.height))
    cropped = 1 - bucket.width * bucket.height / (columns * rows)
    scale = max(bucket.width / info.width, bucket.height / info.height)
    return Fit(item, spec.tokens(bucket.frames, bucket.height, bucket.width), cropped, scale)
