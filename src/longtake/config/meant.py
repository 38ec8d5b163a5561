"""Which section, key or value a user meant by one that does not exist."""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from longtake.config.likeness import nearest, only_with_words, squeezed
from longtake.config.other_trainers import key_for, note_on, section_for, value_for
from longtake.config.schema import RunConfig

Key = tuple[str | int, ...]
"""Names of section and keys, with the index of an array's item as a number."""

ELSEWHERE = 0.75
"""How alike a key of another section has to be: there are many more of them."""


def keys_at(place: Key) -> list[str]:
    """The keys of the section or table at `place`, in order; the sections' names at ()."""
    return list(_model_at(place).model_fields)


def meant_section(name: str) -> str:
    """The section that is meant by a table called `name`; empty where none is."""
    sections = keys_at(())
    same = [section for section in sections if squeezed(section) == squeezed(name)]
    return next(iter((*same, *filter(None, [section_for(name)]), *nearest(name, sections))), "")


def meant_key(name: str, place: Key, under: str = "") -> str:
    """What is meant by `name` at `place`: a key there by its name, one elsewhere as `section.key`; empty where none is.

    A key there that has the same letters comes first, then another trainer's word, a key of that name elsewhere, a
    like one there, and a like one elsewhere. `under` is what the user called the section.
    """
    here = keys_at(place) if place else []
    found = next(filter(None, _guesses(name, place, here, under)), "")
    inside = found.removeprefix(f"{spelled(place)}.")
    return inside if inside in here else found


def key_remedy(name: str, place: Key, value: Any = None, under: str = "") -> str:
    """What to do about a key `name` at `place`, with `value`, that does not exist.

    Where the user called the section otherwise, `under`, the key is given with its section.
    """
    found = meant_key(name, place, under)
    if place and name in keys_at(()) and (isinstance(value, dict) or not found.endswith(f".{name}")):
        return f"[{name}] is a section of its own"
    if found:
        full = found if "." in found else f"{spelled(place)}.{found}"
        note = note_on(full) if key_for(name) else ""
        return f"did you mean {full if under else found}?{f' ({note})' if note else ''}"
    whose = "sections" if not place else "keys here" if len(place) > 1 else f"keys of [{place[0]}]"
    return f"the {whose} are {', '.join(keys_at(place))}"


def value_remedy(value: Any, key: Key) -> str:
    """What to do about a value of `key`, or of an item of it, that is none of its choices."""
    while isinstance(key[-1], int):
        key = key[:-1]
    choices = _choices_in(_model_at(key[:-1]).model_fields[key[-1]].annotation)
    text = str(value)
    found = value_for(text, choices) or next(iter(nearest(text, choices)), "")
    return f'did you mean "{found}"?' if found else ""


def spelled(key: Key) -> str:
    """`data.size[1]` for ("data", "size", 1)."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key).removeprefix(".")


def _guesses(name: str, place: Key, here: Sequence[str], under: str) -> Iterator[str]:
    section, homes = spelled(place), _homes()
    yield next((key for key in here if squeezed(key) == squeezed(name)), "")
    yield key_for(f"{under or section}.{name}") or key_for(f"{section}.{name}") or key_for(name)
    yield next((full for full in homes if squeezed(full.partition(".")[2]) == squeezed(name)), "")
    yield next((full for full in homes if squeezed(full) == squeezed(name)), "")
    yield next(iter(_like(name, section, here)), "")
    yield next(iter(_like_elsewhere(name, homes)), "")


def _like(name: str, section: str, keys: Sequence[str]) -> Sequence[str]:
    """Of the keys of a section: `warmup` is `warmup_steps`, and `lora_rnk` in [lora] is `rank`."""
    full = [each.partition(".")[2] for each in nearest(name, [f"{section}.{key}" for key in keys])]
    return nearest(name, keys) or full or only_with_words(name, keys)


def _like_elsewhere(name: str, homes: Sequence[str]) -> Sequence[str]:
    by_key: dict[str, str] = {full.partition(".")[2]: full for full in reversed(homes)}
    near = [by_key[key] for key in nearest(name, by_key, ELSEWHERE)]
    return near or nearest(name, homes, ELSEWHERE)


@cache
def _homes() -> tuple[str, ...]:
    """`section.key` of every key."""
    return tuple(f"{section}.{key}" for section in keys_at(()) for key in keys_at((section,)))


def _choices_in(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [str(choice) for choice in get_args(annotation)]
    return [choice for argument in get_args(annotation) for choice in _choices_in(argument)]


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
