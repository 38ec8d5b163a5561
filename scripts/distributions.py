"""Which installed distributions `longtake` needs, by their metadata: for the lock and for the check of licences."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def normal(name: str) -> str:
    """The one spelling of a distribution's name (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed() -> dict[str, Distribution]:
    """Every installed distribution by its name; of two with one name the first that Python would import."""
    found: dict[str, Distribution] = {}
    for distribution in distributions():
        found.setdefault(normal(distribution.metadata["Name"]), distribution)
    return found


def required(extras: Iterable[str] = ()) -> list[Requirement]:
    """What pyproject.toml asks for, with those extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    texts = [*project["dependencies"], *(text for name in extras for text in project["optional-dependencies"][name])]
    return [Requirement(text) for text in texts]


def installed_extras() -> list[str]:
    """The extras all of whose requirements are here."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    here = installed()
    return [
        name
        for name, texts in project["optional-dependencies"].items()
        if all(normal(Requirement(text).name) in here for text in texts)
    ]


def closure(wanted: Iterable[Requirement]) -> dict[str, Distribution]:
    """The installed distributions that `wanted` names, and all that they need in turn, by name."""
    here, found, seen = installed(), {}, set()
    open_ends = list(wanted)
    while open_ends:
        requirement = open_ends.pop()
        name = normal(requirement.name)
        new_extras = {extra for extra in ("", *requirement.extras) if (name, extra) not in seen}
        if name not in here or not new_extras:
            continue
        seen |= {(name, extra) for extra in new_extras}
        found[name] = here[name]
        open_ends += _needs(here[name], new_extras)
    return dict(sorted(found.items()))


def _needs(distribution: Distribution, extras: set[str]) -> Iterator[Requirement]:
    for text in distribution.requires or ():
        requirement = Requirement(text)
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
            yield requirement
