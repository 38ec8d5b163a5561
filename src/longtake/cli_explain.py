"""`longtake explain`: more about a problem than its line says."""

from itertools import groupby
from textwrap import fill
from typing import Annotated

import typer

WIDTH = 100


def register(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    app.command()(explain)


def explain(
    code: Annotated[str, typer.Argument(help="What stands in brackets at the end of an error; all without one.")] = "",
) -> None:
    """Say what an error's code means, what usually causes it, and what to do."""
    from longtake.explanations import explanation, explanations

    if not code:
        for area, found in groupby(explanations().values(), lambda each: each.area):
            print(f"{area.replace('_', ' ')}")
            for each in found:
                print(fill(each.means, WIDTH, initial_indent=f"  {each.code}: ", subsequent_indent="    "))
        return
    found_one = explanation(code)
    print(f"{found_one.code}\n\n{fill(found_one.means, WIDTH)}\n")
    print(fill(found_one.cause, WIDTH, initial_indent="Usual cause: ", subsequent_indent="  "))
    print(fill(found_one.remedy, WIDTH, initial_indent="What to do: ", subsequent_indent="  "))
