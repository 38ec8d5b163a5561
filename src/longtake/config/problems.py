"""What pydantic found wrong with a config, in the user's words: where, what, and the nearest key that exists."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel

from longtake.config.schema import RunConfig
from longtake.errors import Problem

Key = tuple[str | int, ...]
"""Names of section and keys, with the index of an array's item as a number."""

_WHAT = {
    "missing": "this key is required",
    "extra_forbidden": "there is no such key",
    "tuple_type": "must be an array",
    "model_type": "must be a section or a table",
    "string_too_short": "must not be empty",
}
_SHOWN_CHARACTERS = 80


def describe(details: Iterable[Mapping[str, Any]], file: str, text: str, flags: Mapping[str, str]) -> list[Problem]:
    """One problem for each wrong key among `details`, which are `ValidationError.errors()`.

    `text` is the content of `file`, where the lines are looked up; `flags` maps the keys that were set on the command
    line to how the user spelled that.
    """
    found: dict[Key, Mapping[str, Any]] = {}
    for detail in details:
        key = _without_union_arms(detail["loc"])
        # of a union the arm whose type fits says more than the others
        if key not in found or str(found[key]["type"]).endswith("_type"):
            found[key] = detail
    return [Problem(_what(d, key), _where(key, file, text, flags), _remedy(d["type"], key)) for key, d in found.items()]


def keys_of(section: type[BaseModel]) -> list[str]:
    """The keys of a section, in order."""
    return list(section.model_fields)


def spelled(key: Key) -> str:
    """`data.size[1]` for ("data", "size", 1)."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key).removeprefix(".")


def _without_union_arms(location: Key) -> Key:
    """pydantic puts the name of the union's arm (`constrained-str`) after the key; no key of ours is called so."""
    return tuple(part for part in location if not str(part).startswith("constrained-"))


def _what(detail: Mapping[str, Any], key: Key) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind in ("too_long", "too_short"):
        bound = f"at most {context['max_length']}" if kind == "too_long" else f"at least {context['min_length']}"
        return f"must have {bound} items, not {context['actual_length']}"
    if kind == "missing" and isinstance(key[-1], int):
        return "the array is too short, this item is missing"
    if kind in ("missing", "extra_forbidden", "string_too_short"):
        return _WHAT[kind]
    message = str(detail["msg"]).removeprefix("Value error, ")
    if kind == "value_error":
        return message
    return f"{_WHAT.get(kind) or message.replace('Input should', 'must')}, not {_shown(detail['input'])}"


def _shown(value: Any) -> str:
    text = {True: "true", False: "false"}.get(value, "") if isinstance(value, bool) else repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def _where(key: Key, file: str, text: str, flags: Mapping[str, str]) -> str:
    name = spelled(key)
    for flagged, flag in flags.items():
        if name == flagged or name.startswith((f"{flagged}.", f"{flagged}[")) or flagged.startswith(f"{name}."):
            return flag
    line = _line_of(text, key)
    return f"{file}{f':{line}' if line else ''}: {name}"


def _line_of(text: str, key: Key) -> int | None:
    """Line of `key` in the file's text: the first `name =` after the section's header, else the header itself."""
    section = header = None
    for number, line in enumerate(text.splitlines(), 1):
        if match := re.fullmatch(r"\s*\[\[?\s*([\w.-]+)\s*\]?\]\s*(#.*)?", line):
            section = match[1].split(".")[0]
            header = header or (number if section == key[0] else None)
        elif _assigned(line) == (key[0] if section is None else key[1] if section == key[0] and len(key) > 1 else ""):
            return number
    return header


def _assigned(line: str) -> str | None:
    match = re.match(r"""\s*["']?([\w-]+)["']?\s*[=.]""", line)
    return match[1] if match else None


def _remedy(kind: str, key: Key) -> str:
    if kind == "missing" and isinstance(key[-1], str):
        return f"add {key[-1]} = ... under [{spelled(key[:-1])}]" if len(key) > 1 else f"add a section [{key[0]}]"
    return _nearest(str(key[-1]), _model_at(key[:-1])) if kind == "extra_forbidden" else ""


def _nearest(name: str, place: type[BaseModel]) -> str:
    """Which key was meant by `name` in `place`: one called so elsewhere, a like one here, a like one elsewhere."""
    siblings = keys_of(place)
    sections = {section: keys_of(_model_at((section,))) for section in keys_of(RunConfig)}
    if place is not RunConfig and name in sections:
        return f"[{name}] is a section of its own"
    near = difflib.get_close_matches(name.lower(), siblings, n=1, cutoff=0.85)
    near = near or [f"{section}.{name}" for section, keys in sections.items() if name in keys]
    near = near or difflib.get_close_matches(name.lower(), siblings, n=1)
    near = near or _like_elsewhere(name.lower(), sections)
    if near:
        return f"did you mean {'.'.join(near[:1])}?"
    return f"the {'sections' if place is RunConfig else 'keys here'} are {', '.join(siblings)}"


def _like_elsewhere(name: str, sections: Mapping[str, Sequence[str]]) -> list[str]:
    homes = {key: section for section, keys in reversed([*sections.items()]) for key in keys}
    return [f"{homes[key]}.{key}" for key in difflib.get_close_matches(name, list(homes), n=1, cutoff=0.75)]


def _model_at(key: Key) -> type[BaseModel]:
    """The section, or the table within one, that `key` leads to."""
    model: type[BaseModel] = RunConfig
    for part in key:
        if isinstance(part, str):
            found = _model_in(model.model_fields[part].annotation)
            assert found is not None
            model = found
    return model


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_model_in(argument) for argument in get_args(annotation))
    return next((model for model in found if model is not None), None)
