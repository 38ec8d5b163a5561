"""From a TOML file, `--set` and flags to a frozen RunConfig, with every problem of the file named at once."""

import difflib
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from longtake.config.schema import RunConfig
from longtake.errors import ConfigError, Problem

Table = dict[str, Any]

_MESSAGES = {
    "missing": "this key is required",
    "extra_forbidden": "there is no such key",
}


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
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(Problem(f"this is no valid TOML: {error}", str(path), "mend that line")) from None
    for override in overrides:
        _put(table, override)
    try:
        config = RunConfig.model_validate(table)
    except ValidationError as error:
        raise ConfigError(_problems(error, path, text, overrides)) from None
    return absolute(config, path.resolve().parent)


def parse_set(assignments: Sequence[str]) -> list[Override]:
    """`section.key=value` strings as overrides; the value is read as TOML where it can be, else as a string."""
    overrides, problems = [], []
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals or "." not in key:
            problems.append(Problem(f"cannot read {text!r}", "--set", "write section.key=value"))
            continue
        overrides.append(Override(key.strip(), _toml_value(value.strip()), f"--set {key.strip()}"))
    if problems:
        raise ConfigError(problems)
    return overrides


def absolute(config: RunConfig, folder: Path) -> RunConfig:
    """`config` with its paths made absolute, those that are relative taken from `folder`."""

    def full(text: str) -> str:
        return str(folder / Path(text).expanduser()) if text else text

    validation = config.data.validation
    components = config.model.components
    local = folder / Path(components).expanduser()
    samples = tuple(
        sample.model_copy(update={"image": full(sample.image), "last_image": full(sample.last_image)})
        for sample in config.validation.samples
    )
    model = {"path": full(config.model.path), "components": str(local) if components and local.exists() else components}
    data = {
        "source": full(config.data.source),
        "cache": full(config.data.cache),
        "validation": full(validation) if isinstance(validation, str) else validation,
    }
    return config.model_copy(
        update={
            "model": config.model.model_copy(update=model),
            "data": config.data.model_copy(update=data),
            "validation": config.validation.model_copy(update={"samples": samples}),
            "output": config.output.model_copy(update={"run": full(config.output.run)}),
        }
    )


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


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        remedy = "make one with `longtake init`"
        raise ConfigError(Problem("there is no such file", str(path), remedy)) from None
    except UnicodeDecodeError:
        raise ConfigError(Problem("the file is not UTF-8", str(path), "save it as UTF-8")) from None
    except OSError as error:
        raise ConfigError(Problem(f"cannot read the file: {error.strerror}", str(path))) from None


def _put(table: Table, override: Override) -> None:
    *sections, key = override.key.split(".")
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise ConfigError(Problem(f"{section} is no section", override.flag, "write section.key=value"))
    table[key] = override.value


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _problems(error: ValidationError, path: Path, text: str, overrides: Sequence[Override]) -> list[Problem]:
    flags = {override.key: override.flag for override in overrides}
    problems = []
    for detail in error.errors():
        location = [str(part) for part in detail["loc"]]
        key = _without_union_arms(location)
        line = _line_of(text, key)
        where = flags.get(".".join(key)) or f"{path}{f':{line}' if line else ''}: {'.'.join(key)}"
        problems.append(Problem(_what(detail), where, _remedy(detail["type"], key)))
    return list(dict.fromkeys(problems))


def _without_union_arms(location: list[str]) -> list[str]:
    """pydantic appends the name of the union's arm (`float`, `str`) to the key's path; no key of ours is called so."""
    return [part for part in location if part not in ("float", "str", "constrained-float") and "[" not in part]


def _what(detail: Mapping[str, Any]) -> str:
    message = _MESSAGES.get(detail["type"]) or str(detail["msg"]).removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    shown = detail["type"] not in ("missing", "extra_forbidden", "value_error")
    return f"{message}, not {detail['input']!r}" if shown else message


def _remedy(kind: str, key: list[str]) -> str:
    if kind == "missing":
        return f"add {key[-1]} = ... under [{'.'.join(key[:-1])}]" if len(key) > 1 else f"add a section [{key[0]}]"
    if kind != "extra_forbidden":
        return ""
    sections = sections_and_keys()
    siblings = sections.get(key[0], []) if len(key) > 1 else list(sections)
    near = difflib.get_close_matches(key[-1].lower(), siblings, n=1)
    if near:
        return f"did you mean {near[0]}?"
    elsewhere = [f"{section}.{name}" for section, names in sections.items() for name in names]
    homes = [name for name in elsewhere if name.split(".")[1] == key[-1]]
    near = homes or [n for n in elsewhere if difflib.SequenceMatcher(None, key[-1], n.split(".")[1]).ratio() > 0.75]
    return f"did you mean {near[0]}?" if near else f"the keys here are {', '.join(siblings)}"


def sections_and_keys() -> dict[str, list[str]]:
    """Each section's name and its keys, in order."""
    found = {}
    for name, field in RunConfig.model_fields.items():
        arms = [arm for arm in (field.annotation, *get_args(field.annotation)) if isinstance(arm, type)]
        section = next(arm for arm in arms if issubclass(arm, BaseModel))
        found[name] = list(section.model_fields)
    return found


def _line_of(text: str, key: list[str]) -> int | None:
    """Line of `key` in the file's text: the first `name =` after the `[section]` header, else the header itself."""
    section = None
    header = None
    for number, line in enumerate(text.splitlines(), 1):
        if match := re.match(r"\s*\[+\s*([^\]\s]+)\s*\]", line):
            section = match[1]
            header = number if section == key[0] else header
        elif section == key[0] and len(key) > 1 and re.match(rf"\s*{re.escape(key[1])}\s*=", line):
            return number
    return header
