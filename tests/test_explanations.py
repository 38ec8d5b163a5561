"""Every problem has a code, every code an explanation, and `longtake explain` says it."""

import ast
import runpy
from collections.abc import Iterator
from pathlib import Path

from command_line import run, succeed, wrong
from longtake.explanations import Explanation, explanations

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "src" / "longtake"
MAKERS = {"Problem": 4, "refusal": 4}
"""What makes a problem of texts, and the position that a code would have: it is always given by its name."""


def made() -> Iterator[tuple[str, ast.Call, ast.expr | None]]:
    """(place, call, the code given) of every call of a maker; one that copies another problem's parts has its code."""
    for path in sorted({*SOURCES.rglob("*.py")} - {SOURCES / "errors.py"}):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in MAKERS:
                code = next((each.value for each in node.keywords if each.arg == "code"), None)
                yield f"{path.relative_to(SOURCES)}:{node.lineno}", node, code


def literal_codes(value: ast.expr) -> set[str]:
    """The texts that the expression can be: itself, or both of a choice."""
    return {each.value for each in ast.walk(value) if isinstance(each, ast.Constant) and isinstance(each.value, str)}


def is_told(code: str, found: Explanation) -> bool:
    """Whether all its texts are sentences, and the code is lower-case words with hyphens."""
    texts = (found.means, found.cause, found.remedy)
    said = all(text.endswith((".", ".)")) and 12 <= len(text) <= 500 for text in texts)
    return said and code == code.lower() and code.replace("-", "").isalnum()


def test_every_problem_has_a_code() -> None:
    assert [place for place, _, code in made() if code is None] == []


def test_every_code_is_explained_and_every_explanation_is_of_a_code() -> None:
    texts = "\n".join(path.read_text() for path in SOURCES.rglob("*.py"))
    used = {code for _, _, value in made() if value is not None for code in literal_codes(value)}
    assert used - set(explanations()) == set()
    assert [code for code in explanations() if f'"{code}"' not in texts] == []


def test_an_explanation_says_what_it_means_why_and_what_to_do() -> None:
    assert [code for code, found in explanations().items() if not is_told(code, found)] == []


def test_a_code_is_explained_as_it_stands_in_a_message() -> None:
    said = succeed("explain", "[explain-unknown-code]").out
    assert said.startswith("explain-unknown-code\n\n`longtake explain` was given a code")
    assert "\nUsual cause: " in said
    assert "\nWhat to do: " in said


def test_without_a_code_all_are_listed() -> None:
    said = succeed("explain").out
    assert [code for code in explanations() if f"  {code}: " not in said] == []


def test_a_code_that_is_none_has_the_nearest_named() -> None:
    line = "longtake explain: there is no code 'explain-unknwn-code'; did you mean explain-unknown-code?"
    assert not wrong(run("explain", "explain-unknwn-code"), line)


def test_the_page_of_errors_has_them_all() -> None:
    page = runpy.run_path(str(ROOT / "scripts" / "make_errors_page.py"))["page"]()
    said = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    assert said == page, "run: python scripts/make_errors_page.py"
