"""Writes docs/errors.md: what each code of an error means, its usual cause and what to do.

python scripts/make_errors_page.py
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from longtake.explanations import Explanation, explanations

PAGE = Path(__file__).parents[1] / "docs" / "errors.md"
HEAD = """# Errors

An error is one line: where it is, what is wrong, what to do, and in brackets its code, which never changes its meaning.
`longtake explain CODE` prints what this page says of a code, `longtake explain` all of it in short.

This page is written by `python scripts/make_errors_page.py`.
"""


def page() -> str:
    """The whole page: the areas, and in each its codes."""
    areas = groupby(explanations().values(), lambda each: each.area)
    sections = (f"## {title(area)}\n\n{''.join(map(entry, found)).rstrip()}\n" for area, found in areas)
    return "\n".join([HEAD, *sections])


def title(area: str) -> str:
    """`Command line` for `command_line`."""
    return area.replace("_", " ").capitalize()


def entry(found: Explanation) -> str:
    """A code with what is to be said of it."""
    cause, remedy = f"* Usual cause: {plain(found.cause)}", f"* What to do: {plain(found.remedy)}"
    return f"### {found.code}\n\n{plain(found.means)}\n\n{cause}\n{remedy}\n\n"


def plain(text: str) -> str:
    """`text`, in which only `code` is markup."""
    return "".join(_parts(text))


def _parts(text: str) -> Iterator[str]:
    for part in re.split(r"(`[^`]*`)", text):
        yield part if part.startswith("`") else re.sub(r"([\\*<]|\b_\B|\B_\b)", r"\\\1", part)


def main() -> None:
    """Writes the page."""
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
