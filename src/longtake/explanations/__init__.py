"""What each code of a problem means: `longtake explain CODE`, from the TOML files beside this one."""

import difflib
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import resources

from longtake.errors import ConfigError, Problem


@dataclass(frozen=True)
class Explanation:
    """What a code means, what usually causes it, and what to do; `area` is the file that has it."""

    code: str
    area: str
    means: str
    cause: str
    remedy: str


@cache
def explanations() -> dict[str, Explanation]:
    """All of them by code, in order of area and code."""
    found: dict[str, Explanation] = {}
    for file in sorted(resources.files(__package__).iterdir(), key=lambda each: each.name):
        if file.name.endswith(".toml"):
            area = file.name.removesuffix(".toml")
            for code, texts in sorted(tomllib.loads(file.read_text("utf-8")).items()):
                assert code not in found, f"{code} is explained twice"
                found[code] = Explanation(code, area, **texts)
    return found


def explanation(code: str) -> Explanation:
    """That of `code`, in brackets or without; raises ConfigError with the nearest where there is none."""
    known = explanations()
    name = code.strip().strip("[]").lower()
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1)
    remedy = f"did you mean {near[0]}?" if near else "`longtake explain` lists all"
    raise ConfigError(Problem(f"there is no code {code!r}", "longtake explain", remedy, code="explain-unknown-code"))
