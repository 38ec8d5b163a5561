"""A value as TOML writes it, on one line."""

from collections.abc import Mapping
from typing import Any

import tomlkit
from pydantic import BaseModel

DEPTH = 8
"""Tables and arrays within one another that are shown; no config of ours has more than four."""


def toml_value(value: Any, depth: int = DEPTH) -> str:
    """`[1, 2]`, `"text"`, `{key = 1}`; what lies deeper than `depth` is left out."""
    if isinstance(value, BaseModel):
        value = {key: getattr(value, key) for key in type(value).model_fields}
    if value is None:  # TOML has no word for it
        return "nothing"
    if isinstance(value, Mapping | tuple | list) and not depth:
        return "..."
    if isinstance(value, Mapping):
        pairs = (f"{tomlkit.key(str(key)).as_string()} = {toml_value(each, depth - 1)}" for key, each in value.items())
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, tuple | list):
        return f"[{', '.join(toml_value(item, depth - 1) for item in value)}]"
    return tomlkit.item(value).as_string()
