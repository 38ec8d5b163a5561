"""What pydantic found wrong with a config, in the user's words: where, what, and what was meant."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from longtake.config.meant import Key, key_remedy, keys_at, meant_key, meant_section, spelled, value_remedy
from longtake.config.shown import toml_value
from longtake.errors import Problem

NO_SUCH_KEY = "there is no such key"
_WHAT = {
    "missing": "this key is required",
    "extra_forbidden": NO_SUCH_KEY,
    "tuple_type": "must be an array",
    "model_type": "must be a section or a table",
    "string_too_short": "must not be empty",
}
CODES = {
    "missing": "config-key-missing",
    "extra_forbidden": "config-unknown-key",
    "literal_error": "config-unknown-choice",
    "string_too_short": "config-value-empty",
    "too_long": "config-array-length",
    "too_short": "config-array-length",
    "value_error": "model-not-given",
    "greater_than": "config-out-of-range",
    "greater_than_equal": "config-out-of-range",
    "less_than": "config-out-of-range",
    "less_than_equal": "config-out-of-range",
    "finite_number": "config-out-of-range",
}
"""Of pydantic's kinds; all others are a "config-wrong-type"."""
_SHOWN_CHARACTERS = 80


@dataclass(frozen=True)
class Source:
    """Where keys were set: the content of a file, and on the command line (key -> how the user spelled that)."""

    file: str
    text: str
    flags: Mapping[str, str]

    def where(self, key: Key) -> str:
        """The flag that set `key`, or its line in the file."""
        return self.flag(key) or self.line(key)

    def flag(self, key: Key) -> str:
        """The flag that set `key`, a part of it, or what it is a part of; empty where none did."""
        name = spelled(key)
        for flagged, flag in self.flags.items():
            if name == flagged or name.startswith((f"{flagged}.", f"{flagged}[")) or flagged.startswith(f"{name}."):
                return flag
        return ""

    def line(self, key: Key) -> str:
        """`run.toml:3: section.key`."""
        line = _line_of(self.text, key)
        return f"{self.file}{f':{line}' if line else ''}: {spelled(key)}"


def describe(details: Iterable[Mapping[str, Any]], source: Source) -> list[Problem]:
    """The problems of each wrong key among `details`, which are `ValidationError.errors()`."""
    found: dict[Key, Mapping[str, Any]] = {}
    for detail in details:
        key = _without_union_arms(detail["loc"])
        # of a union the arm whose type fits says more than the others
        if key not in found or str(found[key]["type"]).endswith("_type"):
            found[key] = detail
    return [problem for key, detail in found.items() for problem in _problems(key, detail, source)]


def _problems(key: Key, detail: Mapping[str, Any], source: Source) -> Iterator[Problem]:
    kind = detail["type"]
    if kind == "extra_forbidden" and len(key) == 1 and _is_section(str(key[0]), detail["input"]):
        yield from _unknown_section(str(key[0]), detail["input"], source)
        return
    code = "config-array-length" if kind == "missing" and isinstance(key[-1], int) else CODES.get(kind)
    yield Problem(_what(detail, key), source.where(key), _remedy(detail, key), code=code or "config-wrong-type")


def _unknown_section(name: str, table: Any, source: Source) -> Iterator[Problem]:
    """The section where the file has it, and each key in it that was set by a flag or is of another section."""
    meant = meant_section(name)
    place = (meant,) if meant else ()
    keys = table if isinstance(table, dict) else {key: value for each in table for key, value in each.items()}
    flags = {key: source.flag((name, key)) for key in keys}
    if not all(flags.values()) or not keys:
        remedy = f"did you mean {meant}?" if meant else key_remedy(name, ())
        yield Problem(NO_SUCH_KEY, source.line((name,)), remedy, code="config-unknown-key")
    for key, value in keys.items():
        misplaced = key not in keys_at(place) if meant else bool(meant_key(key, (), name))
        if flags[key] or misplaced:
            remedy = key_remedy(key, place, value, name)
            yield Problem(NO_SUCH_KEY, flags[key] or source.line((name, key)), remedy, code="config-unknown-key")


def _is_section(name: str, value: Any) -> bool:
    """Whether it is a table, or an array of them as `[[name]]` makes them, and not the value of a key of ours."""
    tables = value if isinstance(value, list) and value else [value]
    return all(isinstance(each, dict) for each in tables) and bool(meant_section(name) or not meant_key(name, ()))


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
    if kind == "literal_error":
        message = message.replace("'", '"')
    return f"{_WHAT.get(kind) or message.replace('Input should', 'must')}, not {_shown(detail['input'])}"


def _shown(value: Any) -> str:
    text = toml_value(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def _remedy(detail: Mapping[str, Any], key: Key) -> str:
    kind, value = detail["type"], detail["input"]
    if kind == "missing" and isinstance(key[-1], str):
        return f"add {key[-1]} = ... under [{spelled(key[:-1])}]" if len(key) > 1 else f"add a section [{key[0]}]"
    if kind == "extra_forbidden":
        return key_remedy(str(key[-1]), key[:-1], value)
    if kind == "literal_error":
        return value_remedy(value, key)
    if kind == "model_type" and len(key) == 1:
        return f"write [{key[0]}] and, under it, its keys: {', '.join(keys_at(key))}"
    if kind in ("int_type", "float_type", "bool_type") and isinstance(value, str):
        return _unquoted(kind, value)
    return ""


def _unquoted(kind: str, text: str) -> str:
    """What to do about a number or a truth value that was written as a text."""
    patterns = {"int_type": r"\d+", "float_type": r"-?\d+(\.\d+)?([eE][+-]?\d+)?", "bool_type": r"true|false"}
    return f"write {text}, without quotes" if re.fullmatch(patterns[kind], text) else ""


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
