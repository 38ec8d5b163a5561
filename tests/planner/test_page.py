"""The plan's page: what it shows, that nothing in a report gets out of its text, and that a browser opens it alone."""

import base64
import hashlib
import importlib.util
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from longtake.errors import RunError
from longtake.planner.events import Span, Timeline
from longtake.planner.page import render_html, write_html
from longtake.planner.page_drawing import MEMORY_HEIGHT, NARROW, TOP, WIDTH, breakdown_bar, step_picture
from longtake.planner.plans import Report
from pages import Page
from planner.reports import GIB, HOSTILE, Drawn, hostile_report, nothing_fits_report, realistic_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
MOST_BYTES = 1_500_000


@pytest.mark.parametrize("report", [realistic_report(), nothing_fits_report()], ids=("fits", "nothing fits"))
def test_the_page_loads_nothing_and_allows_only_its_own_style_and_script(report: Report) -> None:
    html = render_html(report)
    page = Page(html)
    assert not re.search(r"https?:|//\w|@import|url\((?!#)", html)
    links = [value for _, attrs in page.tags for key, value in attrs.items() if key in ("src", "href", "xlink:href")]
    assert [link for link in links if not re.fullmatch(r"#plan-\d", link or "")] == []
    policy = next(attrs["content"] or "" for tag, attrs in page.tags if tag == "meta" and "http-equiv" in attrs)
    digests = {
        name: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for name, text in page.raw.items()
    }
    assert policy.startswith("default-src 'none'; ")
    for name, digest in digests.items():
        assert f"{name}-src 'sha256-{digest}'" in policy
    assert not [attrs for _, attrs in page.tags if any(key == "style" or key.startswith("on") for key in attrs)]


def test_hostile_texts_change_no_tag() -> None:
    hostile, harmless = Page(render_html(hostile_report())), Page(render_html(hostile_report("harmless")))
    assert [tag for tag, _ in hostile.tags] == [tag for tag, _ in harmless.tags]
    assert hostile.raw == harmless.raw
    assert hostile.text.count(HOSTILE.split("\x1b")[0]) >= harmless.text.count("harmless") - 1


def test_the_chosen_plan_is_in_sight_and_the_others_are_folded() -> None:
    report = realistic_report()
    page = Page(render_html(report))
    text = " ".join(page.text.split())
    assert "Fits: 22.2 of 24.0 GiB, 30.3 s a step" in text
    assert (page.count("details"), page.count("figure")) == (4, 5)
    assert text.index(f"The plan: {report.plans[0].name}") < text.index("Where the bytes are")
    for part in (
        "longtake train planned.toml",
        "plain checkpointing, encoders resident for comparison",
        "UMT5 text encoder, 512 tokens 11.3 GiB 1.2 GiB",
        "81 frames of 832x480 14.9 GiB 16.0 s",
        "Does not fit: 46.2 GiB more than the device's budget",
        "--set memory.gradient_checkpointing=block",
        report.notes[0],
    ):
        assert part in text


def test_where_nothing_fits_the_page_says_so_first_and_what_would() -> None:
    text = " ".join(Page(render_html(nothing_fits_report())).text.split())
    assert text.index("Nothing fits 8.0 GiB") < text.index("What would make it fit")
    assert text.index("num_frames = 81 7.7 GiB 18.9 s") < text.index("The nearest plan: all blocks streamed")


def test_a_report_without_plans_or_timelines_is_a_page_without_pictures() -> None:
    report = nothing_fits_report()
    assert "Nothing fits 8.0 GiB" in Page(render_html(replace(report, plans=(), references=()))).text
    bare = replace(report.plans[0], timeline=None, stages=(), buckets=())
    assert Page(render_html(replace(report, plans=(bare,)))).count("figure") == 0


def test_five_plans_of_many_thousand_spans_stay_below_the_most_bytes(tmp_path: Path) -> None:
    report = realistic_report()
    many = Drawn(11.2, 0.3, 3.6, 3.5, parts=60, weights_in=0.01).timeline("compute")
    small = [
        Span(stream, 0.004 * i, 0.004 * i + 0.003, f"piece {i}")
        for i in range(9000)
        for stream in ("network", "outward")
    ]
    many = replace(many, spans=(*many.spans, *small))  # type: ignore[arg-type]
    assert len(many.spans) > 22_000
    plans = tuple(replace(plan, timeline=many) for plan in report.plans)
    write_html(replace(report, plans=plans), tmp_path / "plan.html")
    assert (tmp_path / "plan.html").stat().st_size < MOST_BYTES


def picture(*spans: Span, memory: tuple[tuple[float, int], ...] = ((0.0, 8),), budget: int = 10 * GIB) -> str:
    """A step of 100 s in which weights hold so many GiB."""
    counts = tuple((start, (gib * GIB, *[0] * 7)) for start, gib in memory)
    plan = realistic_report().plans[0]
    return step_picture(
        replace(plan, timeline=Timeline(100.0, 0.0, "compute", spans, counts), breakdown_bytes={}), budget
    )


def drawn(svg: str, lane: str) -> list[tuple[float, float]]:
    """(left, width) of what is drawn on a lane, in pixels."""
    group = re.search(rf'<g class="lane {lane}"[^>]*>(.*?)</g>', svg, re.DOTALL)
    return [(float(x), float(width)) for x, width in re.findall(r'd="M([\d.]+) 0h([\d.]+)', group[1] if group else "")]


def test_a_moment_too_short_to_see_is_drawn_as_high_as_it_was() -> None:
    svg = picture(memory=((0.0, 4), (50.0, 9), (50.001, 4)))
    heights = {float(y) for y in re.findall(r"V([\d.]+)", re.search(r'<path class="weights" d="([^"]+)"', svg)[1])}  # type: ignore[index]
    most = 1.1 * 10 * GIB
    assert min(heights) == pytest.approx(TOP + MEMORY_HEIGHT * (1 - 9 * GIB / most), abs=0.1)
    assert "9.0 GiB, of which tensors hold 9.0 GiB" in svg


def test_neighbours_narrower_than_a_few_pixels_are_one_and_wide_ones_stay() -> None:
    narrow = [Span("inward", 0.01 * i, 0.01 * i + 0.005, f"copy {i}") for i in range(1000)]
    wide = [Span("compute", 0.0, 40.0, "forward"), Span("compute", 40.0, 100.0, "backward")]
    svg = picture(*narrow, *wide)
    assert len(drawn(svg, "compute")) == 2
    assert 10 < len(drawn(svg, "inward")) < 0.1 * WIDTH / NARROW * 1.5
    assert 'fill-opacity="0.5"' in svg
    assert "forward\n0.000 to 40.000 s" in svg
    assert re.search(r"\d+: copy 0 to copy \d+", svg)


def test_a_wait_is_drawn_over_the_computation_in_its_own_colour() -> None:
    svg = picture(Span("compute", 0.0, 50.0, "forward"), Span("stall", 50.0, 75.0, "waits for a copy"))
    (left, width), (start, _) = drawn(svg, "stall")[0], drawn(svg, "compute")[0]
    assert width / (left - start) == pytest.approx(0.5, abs=0.01)


def test_only_streams_that_are_used_have_a_lane() -> None:
    assert re.findall(r'<g class="lane (\w+)"', picture(Span("network", 0.0, 1.0, "gradients"))) == [
        "compute",
        "stall",
        "network",
    ]


def test_a_budget_far_above_the_memory_is_named_and_not_drawn() -> None:
    assert "budget 10.0 GiB</text>" in picture()
    far = picture(budget=80 * GIB)
    assert "budget 80.0 GiB, far above</text>" in far
    assert 'class="budget"' not in far


def test_the_breakdown_bar_is_as_wide_as_its_bytes_and_marks_an_exceeded_budget() -> None:
    svg = breakdown_bar({"weights": 30, "block": 50, "context": 20}, 200, 150, (400, 10))
    assert re.findall(r'class="(\w+)" x="([\d.]+)" width="([\d.]+)"', svg) == [
        ("weights", "0.0", "60.0"),
        ("block", "60.0", "100.0"),
        ("context", "160.0", "40.0"),
    ]
    assert 'd="M300.0 0v10"' in svg
    assert 'class="budget"' not in breakdown_bar({"weights": 30}, 200, 200, (400, 10))


def test_a_page_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="is no folder"):
        write_html(realistic_report(), tmp_path / "file" / "plan.html")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium."""
    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is on the PATH")
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("playwright is not installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path)
        yield started
        started.close()


class Opened:
    """A page of a report in a browser without network, with all that it asked for and complained of."""

    def __init__(self, browser: Any, report: Report, folder: Path, **options: Any) -> None:
        path = folder / "plan.html"
        write_html(report, path)
        self.uri = path.as_uri()
        self.requests: list[str] = []
        self.complaints: list[str] = []
        context = browser.new_context(offline=True, **options)
        context.route(re.compile("^(?!file:)"), lambda route: route.abort())
        self.page = context.new_page()
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(self.uri)

    def assert_alone_and_content(self) -> None:
        assert (self.requests, self.complaints) == ([self.uri], [])


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(
    "report",
    [realistic_report(), nothing_fits_report(), hostile_report()],
    ids=("fits", "nothing fits", "hostile"),
)
def test_a_browser_opens_the_page_without_network_or_errors(
    report: Report, scheme: str, browser: Any, tmp_path: Path
) -> None:
    opened = Opened(browser, report, tmp_path, color_scheme=scheme, viewport={"width": 1200, "height": 900})
    opened.page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true })")
    paper = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(19, 21, 23)"}[scheme]
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= 1200
    assert opened.page.locator("figure svg path.weights").count() == len(report.plans)
    opened.assert_alone_and_content()


def test_the_button_copies_and_a_plans_name_leads_to_it(browser: Any, tmp_path: Path) -> None:
    opened = Opened(browser, realistic_report(), tmp_path)
    button = opened.page.locator("button.copy").first
    button.click()
    opened.page.wait_for_function("document.querySelector('button.copy').textContent === 'copied'")
    assert not opened.page.locator("#plan-2").is_visible()
    opened.page.locator("a[href='#plan-2']").click()
    assert opened.page.locator("#plan-2").is_visible()
    assert [url.split("#")[0] for url in opened.requests] == [opened.uri] * len(opened.requests)
    assert opened.complaints == []


def test_without_scripts_the_page_reads_and_has_no_button(browser: Any, tmp_path: Path) -> None:
    opened = Opened(browser, realistic_report(), tmp_path, java_script_enabled=False)
    assert opened.page.locator("#plan-0 figure svg").first.is_visible()
    assert not opened.page.locator("button.copy").first.is_visible()
    opened.assert_alone_and_content()


def test_the_policy_stops_any_other_script(browser: Any, tmp_path: Path) -> None:
    opened = Opened(browser, realistic_report(), tmp_path)
    opened.page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {text: 'window.ran = 1'}))"
    )
    assert opened.page.evaluate("window.ran") is None
    assert "Content Security Policy" in " ".join(opened.complaints)
