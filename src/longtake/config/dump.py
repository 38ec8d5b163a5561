"""A RunConfig as TOML, with or without each key's manual as a comment."""

import textwrap

from pydantic import BaseModel

from longtake.config.schema import MemoryStrategy, ParallelConfig, RunConfig
from longtake.config.shown import toml_value


def to_toml(config: RunConfig, comments: bool = False) -> str:
    """`config` as TOML text that loads to the same config.

    With `comments` the keys of [memory] and [parallel] that have their defaults are comments too: they are left to the
    planner.
    """
    sections = []
    for name in RunConfig.model_fields:
        section = getattr(config, name)
        if section is not None:
            keys = _keys(section, comments)
            planned = comments and isinstance(section, MemoryStrategy | ParallelConfig)
            sections.append("\n".join([f"[{name}]", *(_left_open(keys, type(section)()) if planned else keys)]))
    return "\n\n".join(sections) + "\n"


def _left_open(lines: list[str], defaults: BaseModel) -> list[str]:
    usual = _keys(defaults, comments=False)
    return [f"# {line}" if line in usual and not line.startswith("budget") else line for line in lines]


def _keys(section: BaseModel, comments: bool) -> list[str]:
    lines = []
    for key, field in type(section).model_fields.items():
        if comments and field.description:
            lines += textwrap.wrap(
                " ".join(field.description.split()), 110, initial_indent="# ", subsequent_indent="# "
            )
        lines.append(f"{key} = {toml_value(getattr(section, key))}")
    return lines
