"""What a run folder holds, read leniently: a run that was killed, or is still writing, can be read too."""

import json
import math
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longtake.errors import InputError, Problem

Record = Mapping[str, float]

NOISES = ("high", "low")
_SAMPLE = re.compile(r"step-(\d+)-(\d+)\.mp4")


@dataclass(frozen=True)
class SampleVideo:
    """One sampled video and what it was sampled from; prompt and seed are missing where its JSON is."""

    step: int
    video: Path
    prompt: str = ""
    seed: int | None = None


@dataclass(frozen=True)
class RunEvent:
    """A line of events.jsonl: a fault, or what else befell the run; `time` as written, `step` as updates done."""

    time: str
    step: int | None
    kind: str
    what: str


@dataclass(frozen=True)
class RunFolder:
    """A run: `steps` and `validations` are the lines of metrics.jsonl in the order of their steps, finite numbers only.

    `settings` is config.toml as written, `config` the same parsed (empty where it cannot be). `adapters` are there from
    the run's end on, one for each expert. `noise` says of which expert a step was, "high" or "low", where there are
    two. `events` are in the order of events.jsonl. `notes` are sentences about what could not be read.
    """

    path: Path
    steps: tuple[Record, ...]
    validations: tuple[Record, ...]
    samples: tuple[SampleVideo, ...]
    settings: str
    config: Mapping[str, Any]
    adapters: tuple[Path, ...]
    noise: Mapping[float, str]
    events: tuple[RunEvent, ...]
    notes: tuple[str, ...]


def read_run(path: Path) -> RunFolder:
    """The run in the folder `path`; raises InputError where it holds neither config.toml nor metrics.jsonl.

    A step that was run again after a resume counts once, as it was last. A line of metrics.jsonl that its writer did
    not finish is left out and noted.
    """
    if not any((path / name).is_file() for name in ("config.toml", "metrics.jsonl")):
        remedy = "give the folder that `longtake train` wrote, which has config.toml and metrics.jsonl"
        raise InputError(Problem("is not a run folder", str(path), remedy, code="run-missing"))
    lines, damaged = _read_lines(path / "metrics.jsonl")
    steps, validations = _latest(lines, "loss"), _latest(lines, "validation_loss")
    settings, config, notes = _read_settings(path / "config.toml")
    if damaged:
        notes.append(f"metrics.jsonl: {_listed(damaged, 'line')} could not be read and {_is(damaged)} left out.")
    infinite = [int(record["step"]) for record in steps if "loss" not in record]
    if infinite:
        notes.append(f"{_listed(infinite, 'step').capitalize()} had no finite loss.")
    names = ("adapter.safetensors", "adapter-high-noise.safetensors", "adapter-low-noise.safetensors")
    adapters = tuple(path / name for name in names if (path / name).is_file())
    noise = {line["step"]: line["expert"] for line in lines if line.get("expert") in NOISES}
    samples = tuple(_read_samples(path / "samples"))
    events = tuple(_read_events(path / "events.jsonl"))
    return RunFolder(path, steps, validations, samples, settings, config, adapters, noise, events, tuple(notes))


def points(records: Iterable[Record], key: str, scale: float = 1.0) -> list[tuple[float, float]]:
    """(step, value / scale) of every record that has `key`."""
    return [(record["step"], record[key] / scale) for record in records if key in record]


def _read_events(path: Path) -> Iterable[RunEvent]:
    """Its lines, without those that were cut off by a kill or a full disk."""
    for text in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            value = json.loads(text)
        except ValueError:
            continue
        if isinstance(value, dict) and isinstance(value.get("what"), str):
            step = value.get("step")
            time, kind = (str(value.get(key, "")) for key in ("time", "kind"))
            yield RunEvent(time, step if isinstance(step, int) else None, kind, value["what"])


def _read_lines(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The objects of a JSON lines file, and the numbers (from 1) of the lines that are none."""
    lines: list[dict[str, Any]] = []
    damaged: list[int] = []
    raw = path.read_bytes().splitlines() if path.is_file() else []
    for number, text in enumerate(raw, 1):
        if not text.strip():
            continue
        try:
            value = json.loads(text)
        except ValueError:
            value = None
        if isinstance(value, dict) and _finite(value.get("step")):
            lines.append(value)
        else:
            damaged.append(number)
    return lines, damaged


def _latest(lines: Iterable[dict[str, Any]], key: str) -> tuple[Record, ...]:
    """The lines that have `key`, one a step (the last), by step, without what is no finite number."""
    found = {line["step"]: line for line in lines if key in line}
    return tuple({name: float(v) for name, v in found[step].items() if _finite(v)} for step in sorted(found))


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _read_settings(path: Path) -> tuple[str, dict[str, Any], list[str]]:
    if not path.is_file():
        return "", {}, ["config.toml is missing."]
    text = path.read_bytes().decode(errors="replace")
    try:
        return text, tomllib.loads(text), []
    except tomllib.TOMLDecodeError as error:
        return text, {}, [f"config.toml could not be read as TOML: {error}."]


def _read_samples(folder: Path) -> Iterable[SampleVideo]:
    """The videos in `folder`, newest step first."""
    matches = (
        _SAMPLE.fullmatch(entry.name) for entry in folder.glob("*.mp4") if entry.is_file() and not entry.is_symlink()
    )
    for match in sorted(filter(None, matches), key=lambda match: (-int(match[1]), int(match[2]))):
        video = folder / match[0]
        about = _read_about(video.with_suffix(".json"))
        prompt, seed = about.get("prompt"), about.get("seed")
        yield SampleVideo(
            int(match[1]), video, prompt if isinstance(prompt, str) else "", seed if isinstance(seed, int) else None
        )


def _read_about(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _listed(numbers: list[int], noun: str) -> str:
    shown = ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
    return f"{noun}{'s' if len(numbers) > 1 else ''} {shown}"


def _is(numbers: list[int]) -> str:
    return "are" if len(numbers) > 1 else "is"
