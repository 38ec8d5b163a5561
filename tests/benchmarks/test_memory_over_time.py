from collections import Counter
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

import pytest

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def drawing(script: Callable[[str], Any]) -> Any:
    return script("memory_over_time")


def step(drawing: Any, timeline: list[tuple[int, int]]) -> Any:
    flops = timeline[-1][0]
    return drawing.Step(Counter(block=max(held for _, held in timeline)), 0, Counter(), flops, flops // 4, timeline, [])


def test_the_picture_has_a_line_and_a_legend_for_each_strategy(drawing: Any) -> None:
    steps = {name: step(drawing, [(10**15, 2**30), (2 * 10**15, 3 * 2**30)]) for name in drawing.LABELS}
    root = ElementTree.fromstring(drawing.picture(steps))
    paths = [path.get("class") for path in root.iter(f"{SVG}path")]
    assert [paths.count(f"line {letter}") for letter in "abc"] == [2, 2, 2]
    texts = [text.text or "" for text in root.iter(f"{SVG}text")]
    assert [label for label in drawing.LABELS.values() if not any(label in text for text in texts)] == []
    assert {"80 GiB", "16 GiB"} <= set(texts)
    assert "prefers-color-scheme: dark" in (root.find(f"{SVG}style").text or "")  # type: ignore[union-attr]


def test_an_interval_shows_its_greatest_bytes_and_a_long_operator_fills_its_own(drawing: Any) -> None:
    end = drawing.INTERVALS
    given = step(drawing, [(0, 5), (1, 9), (1, 3), (end // 2, 4), (end, 2)])
    highest = drawing._highest(given, drawing.Frame(end, 10))
    assert highest[:2] == [9, 9]
    assert set(highest[2 : end // 2]) == {4}
    assert set(highest[end // 2 + 1 :]) == {2}


@pytest.mark.long
def test_the_picture_in_docs_is_what_the_script_makes(drawing: Any, step_of_14b: Callable[[str, int], Any]) -> None:
    steps = {name: step_of_14b(name, drawing.FRAMES) for name in drawing.LABELS}
    assert drawing.PICTURE.read_text(encoding="utf-8") == drawing.picture(steps)
