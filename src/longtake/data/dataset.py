"""What a config's sources hold: clips in their buckets, and the settings that identify a prepared cache."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from longtake.config.schema import DataConfig
from longtake.data.buckets import BucketedClip, assign, check_shape, stage_frames
from longtake.data.cache import FORMAT, digest
from longtake.data.metadata import ClipRecord, read_source, usable
from longtake.data.video import ClipInfo, probe
from longtake.errors import DataError, Problem
from longtake.models.spec import ModelSpec

Split = Literal["train", "validation"]


@dataclass(frozen=True)
class Placed:
    """A clip in one bucket, the frame counts of the curriculum that it serves there, and the source it is of."""

    clip: BucketedClip
    stages: tuple[int, ...]
    split: Split


def cache_settings(
    data: DataConfig,
    spec: ModelSpec,
    seed: int,
    encoders: Mapping[str, str],
    sources: Mapping[Split, Sequence[ClipRecord]],
) -> dict[str, Any]:
    """Everything that decides what a prepared cache holds; no training flag is among it.

    `encoders` are the fingerprints of the components.
    """
    records = [record for rows in sources.values() for record in rows]
    rows = {split: sorted((_row(record) for record in found), key=repr) for split, found in sources.items()}
    return {
        "format": FORMAT,
        "clips": digest(rows),
        "size": list(data.size),
        "frames": sorted({frames for _, frames in stage_frames(data.num_frames, data.frames_schedule)}),
        "fps": spec.fps,
        "task": spec.task,
        "text_tokens": spec.text_tokens,
        "windows_seed": seed if any(record.start is None for record in records) else 0,
        **encoders,
    }


@runtime_checkable
class Listener(Protocol):
    """Who hears what is wrong with clips while they are read and placed, and decides whether that is too much."""

    def usable(self, records: list[ClipRecord], problems: list[Problem], split: Split) -> list[ClipRecord]:
        """`records`, beside which those of `problems` are left out; or raises DataError."""

    def probed(self, record: ClipRecord, info: ClipInfo, split: Split) -> None:
        """What a clip's file shows."""

    def note(self, problems: list[Problem], split: Split) -> None:
        """What there is to say of the clips' buckets: why one has none, or another than was wanted."""


@dataclass(frozen=True)
class Speaker:
    """The listener of those who encode and train: says every problem, refuses where too many clips have one."""

    say: Callable[[str], None]

    def usable(self, records: list[ClipRecord], problems: list[Problem], _split: Split) -> list[ClipRecord]:
        """As `metadata.usable` has it."""
        kept = usable(records, problems)
        self.note(problems, _split)
        return kept

    def probed(self, _record: ClipRecord, _info: ClipInfo, _split: Split) -> None:
        """Not said."""

    def note(self, problems: list[Problem], _split: Split) -> None:
        """Says each once."""
        for problem in dict.fromkeys(problems):
            self.say(f"left out or changed: {problem}")


def read_sources(data: DataConfig, spec: ModelSpec, say: Callable[[str], None]) -> dict[Split, list[ClipRecord]]:
    """The usable rows of `data.source` and of a `data.validation` that is a source; bad rows are said, too many raise.

    Raises DataError where shape or sources cannot be used at all.
    """
    return read_rows(data, spec, Speaker(say))


def read_rows(data: DataConfig, spec: ModelSpec, listener: Listener) -> dict[Split, list[ClipRecord]]:
    """`read_sources` for a listener."""
    shapes = [frames for _, frames in stage_frames(data.num_frames, data.frames_schedule)]
    if problems := [problem for frames in dict.fromkeys(shapes) for problem in check_shape(spec, frames, data.size)]:
        raise DataError(list(dict.fromkeys(problems)))
    sources: dict[Split, str] = {"train": data.source}
    if isinstance(data.validation, str):
        sources["validation"] = data.validation
    found: dict[Split, list[ClipRecord]] = {}
    for split, source in sources.items():
        records, problems = read_source(Path(source), spec.task in ("t2v", "ti2v"), data.allow_links)
        found[split] = listener.usable(records, problems, split)
    return found


def place(
    sources: dict[Split, list[ClipRecord]], data: DataConfig, spec: ModelSpec, seed: int, say: Callable[[str], None]
) -> list[Placed]:
    """Every clip in the bucket of each stage of the curriculum; a clip that cannot be used is said and left out.

    Raises DataError where too many are, or none is left to train on.
    """
    placed = in_buckets(sources, data, spec, seed, Speaker(say))
    check_trainable(placed, data, spec, say)
    return placed


def in_buckets(
    sources: dict[Split, list[ClipRecord]], data: DataConfig, spec: ModelSpec, seed: int, listener: Listener
) -> list[Placed]:
    """`place` for a listener; there may be no clip among what is returned."""
    placed: dict[Any, Placed] = {}
    looked: dict[Path, ClipInfo] = {}
    frames = dict.fromkeys(count for _, count in stage_frames(data.num_frames, data.frames_schedule))
    for split, records in sources.items():
        kept, infos = _probe_all(records, split, listener, looked)
        notes: list[Problem] = []
        for count in frames:
            clips, problems = assign(kept, infos, spec, [count], data.size, seed)
            notes += problems
            for clip in clips:
                key = (split, clip.record.where, clip.bucket, clip.window)
                before = placed.get(key)
                stages = (*before.stages, count) if before else (count,)
                placed[key] = replace(before, stages=stages) if before else Placed(clip, stages, split)
        listener.note(notes, split)
    return list(placed.values())


def check_trainable(placed: Sequence[Placed], data: DataConfig, spec: ModelSpec, say: Callable[[str], None]) -> None:
    """Raises DataError where there is nothing to train on; says so where there are only stills."""
    if not any(item.split == "train" for item in placed):
        remedy = "mend the clips named above"
        raise DataError(Problem("no clip can be used", data.source, remedy, code="data-no-clip"))
    if all(item.clip.info.is_image for item in placed if item.split == "train"):
        say(f"{data.source}: all clips are still images: {spec.name} will learn how things look, and no motion")


def _row(record: ClipRecord) -> list[Any]:
    return [
        record.path.name,
        record.path.stat().st_size,
        record.prompt,
        record.start,
        record.frames,
        record.fps,
    ]


def _probe_all(
    records: list[ClipRecord], split: Split, listener: Listener, looked: dict[Path, ClipInfo]
) -> tuple[list[ClipRecord], list[ClipInfo]]:
    """The clips that can be used and what they show; `looked` has files that other rows have named already."""
    kept: list[ClipRecord] = []
    infos: list[ClipInfo] = []
    problems: list[Problem] = []
    for record in records:
        try:
            if record.path not in looked:
                looked[record.path] = probe(record.path, record.where)
        except DataError as error:
            problems += error.problems
            continue
        kept.append(record)
        infos.append(looked[record.path])
        listener.probed(record, infos[-1], split)
    return listener.usable(kept, problems, split), infos
