"""From a TOML file, `--set` and flags to a frozen RunConfig, with every problem of the file named at once."""

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from longtake.config.meant import meant_key
from longtake.config.problems import Source, describe
from longtake.config.schema import RunConfig
from longtake.errors import ConfigError, Problem

Table = dict[str, Any]


@dataclass(frozen=True)
class Override:
    """One `section.key` set from the command line; `flag` is how the user spelled it."""

    key: str
    value: Any
    flag: str


def load_config(path: Path, overrides: Sequence[Override] = ()) -> RunConfig:
    """The config in `path` with `overrides` on top; paths in it become absolute, relative to the file's folder.

    Raises ConfigError with one problem for each wrong key or value.
    """
    text = _read(path)
    return absolute(_validated(_parsed(text, path), text, str(path), overrides), path.resolve().parent)


def config_of(table: Table, overrides: Sequence[Override]) -> RunConfig:
    """The config of flags alone on top of `table`, paths relative to the working directory; raises ConfigError."""
    return absolute(_validated(table, "", "", overrides), Path.cwd())


def parse_set(assignments: Sequence[str]) -> list[Override]:
    """`section.key=value` strings as overrides; the value is read as TOML where it can be, else as a string."""
    overrides, problems = [], []
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals or "." not in key:
            meant = meant_key(key.strip(), ()) if equals else ""
            remedy = f"write section.key=value{f'; did you mean {meant}?' if meant else ''}"
            problems.append(Problem(f"cannot read {text!r}", "--set", remedy, code="config-set-unreadable"))
            continue
        overrides.append(Override(key.strip(), _toml_value(value.strip()), f"--set {key.strip()}"))
    if problems:
        raise ConfigError(problems)
    return overrides


def absolute(config: RunConfig, folder: Path) -> RunConfig:
    """`config` with its paths made absolute, those that are relative taken from `folder`.

    Raises ConfigError with one problem for each text that cannot be a path.
    """
    problems: list[Problem] = []

    def full(text: str, key: str) -> str:
        try:
            return _full(text, folder)
        except (RuntimeError, ValueError) as error:
            problems.append(
                Problem(f"{text!r} cannot be a path ({error})", key, "write another one", code="config-path-unusable")
            )
            return text

    model, data, validation = config.model, config.data, config.data.validation
    components = full(model.components, "model.components")
    samples = tuple(
        sample.model_copy(
            update={
                "image": full(sample.image, f"validation.samples[{index}].image"),
                "last_image": full(sample.last_image, f"validation.samples[{index}].last_image"),
            }
        )
        for index, sample in enumerate(config.validation.samples)
    )
    changes: dict[str, dict[str, Any]] = {
        "model": {
            "path": full(model.path, "model.path"),
            "low_noise_path": full(model.low_noise_path, "model.low_noise_path"),
            "components": components if Path(components).exists() else model.components,
        },
        "data": {
            "source": full(data.source, "data.source"),
            "cache": full(data.cache, "data.cache"),
            "validation": full(validation, "data.validation") if isinstance(validation, str) else validation,
        },
        "validation": {"samples": samples},
        "output": {"run": full(config.output.run, "output.run")},
    }
    if config.lora is not None:
        starts = enumerate(config.lora.start_from)
        changes["lora"] = {"start_from": tuple(full(path, f"lora.start_from[{index}]") for index, path in starts)}
    if problems:
        raise ConfigError(problems)
    sections = {name: getattr(config, name).model_copy(update=update) for name, update in changes.items()}
    return config.model_copy(update=sections)


def changed_keys(before: RunConfig, after: RunConfig) -> dict[str, tuple[Any, Any]]:
    """`section.key` -> (value before, value after) for each key in which two configs differ."""
    old, new = dict(flatten(before.model_dump())), dict(flatten(after.model_dump()))
    return {key: (old.get(key), new.get(key)) for key in {**old, **new} if old.get(key) != new.get(key)}


def flatten(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf of nested tables."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _validated(table: Table, text: str, where: str, overrides: Sequence[Override]) -> RunConfig:
    for override in overrides:
        _put(table, override)
    try:
        return RunConfig.model_validate(table)
    except ValidationError as error:
        flags = {override.key: override.flag for override in overrides}
        raise ConfigError(describe(error.errors(), Source(where, text, flags))) from None


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        remedy = "make one with `longtake init`"
        raise ConfigError(Problem("there is no such file", str(path), remedy, code="config-not-found")) from None
    except UnicodeDecodeError:
        problem = Problem("the file is not UTF-8", str(path), "save it as UTF-8", code="config-not-utf8")
        raise ConfigError(problem) from None
    except OSError as error:
        what = f"cannot read the file: {error.strerror}"
        raise ConfigError(Problem(what, str(path), "give the path of a TOML file", code="config-unreadable")) from None


def _full(text: str, folder: Path) -> str:
    """`text` from `folder`; a URL stays, to be refused by its name."""
    if "\0" in text:
        raise ValueError("it has a NUL character")
    return str(folder / Path(text).expanduser()) if text and "://" not in text else text


def _parsed(text: str, path: Path) -> Table:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        what = f"this is no valid TOML: {error}"
        raise ConfigError(Problem(what, str(path), "mend that line", code="config-not-toml")) from None
    except RecursionError:
        what = "tables or arrays are nested too deeply"
        raise ConfigError(Problem(what, str(path), "mend the file", code="config-too-deep")) from None


def _put(table: Table, override: Override) -> None:
    *sections, key = override.key.split(".")
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            what, remedy = f"{section} is no section", "write section.key=value"
            raise ConfigError(Problem(what, override.flag, remedy, code="config-not-a-section"))
    table[key] = override.value


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        return text
