"""The report page: what it shows of a run, and that nothing in a run can break it or get out of its text."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from longtake.errors import InputError, RunError
from longtake.web.chart import MOST_POINTS, Series, line_chart
from longtake.web.report import render_report, write_report
from longtake.web.run_folder import points, read_run
from pages import Page

HOSTILE = "<script>alert('x')</script> & \"quotes\" </style>"
SETTINGS = """[model]
name = "tiny-i2v"
[data]
source = "clips"
num_frames = 17
size = [112, 64]
[training]
steps = 20
"""


def step_line(step: int, **changes: object) -> dict[str, object]:
    return {
        "step": step,
        "loss": 1.0 / step,
        "learning_rate": 1e-4,
        "grad_norm": 0.5,
        "step_seconds": 2.0,
        "tokens_per_second": 1000.0,
        "device_peak_bytes": 3 * 2**30,
        "host_peak_bytes": 2**30,
        "planned_peak_bytes": None,
    } | changes


def write_lines(run: Path, lines: list[dict[str, object]], end: str = "") -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + end, encoding="utf-8")


def add_sample(run: Path, step: int, index: int, prompt: str, content: bytes = b"video") -> None:
    stem = run / "samples" / f"step-{step:08}-{index}"
    stem.with_suffix(".mp4").write_bytes(content)
    about = {"step": step, "prompt": prompt, "seed": index}
    stem.with_suffix(".json").write_text(json.dumps(about), encoding="utf-8")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of 20 steps with two validations, planned memory, an adapter and no samples."""
    folder = tmp_path / "my-lora"
    (folder / "samples").mkdir(parents=True)
    steps = [step_line(step, planned_peak_bytes=4 * 2**30) for step in range(1, 21)]
    write_lines(folder, [*steps, {"step": 1, "validation_loss": 0.8}, {"step": 20, "validation_loss": 0.6}])
    (folder / "config.toml").write_text(SETTINGS, encoding="utf-8")
    (folder / "adapter.safetensors").write_bytes(b"")
    return folder


def test_the_summary_says_what_the_run_did(run: Path) -> None:
    target = write_report(run)
    assert target == run / "report.html"
    text = Page(target.read_text(encoding="utf-8")).text
    for shown in (
        "tiny-i2v",
        "of 20",
        "0.8 → 0.6",
        "−25.0 %",
        "0:40",
        "17 frames",
        "112 × 64",
        "3.0 GiB",
        "planned 4.0 GiB",
    ):
        assert shown in text
    assert str(run.resolve() / "adapter.safetensors") in text


def test_of_two_experts_each_has_its_loss_and_its_adapter(run: Path) -> None:
    noises = ["high" if step % 3 == 0 else "low" for step in range(1, 21)]
    write_lines(run, [step_line(step, expert=noise) for step, noise in enumerate(noises, 1)])
    (run / "adapter.safetensors").unlink()
    names = ("adapter-high-noise.safetensors", "adapter-low-noise.safetensors")
    for name in names:
        (run / name).write_bytes(b"")
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert page.count("svg") == 6  # without a validation, of which the two have had none
    for shown in ("Loss, high noise", "Loss, low noise", *names):
        assert shown in page.text


def test_every_chart_has_its_lines(run: Path) -> None:
    html = write_report(run).read_text(encoding="utf-8")
    page = Page(html)
    assert page.count("svg") == 6
    assert page.count("polyline") == 9  # loss and smoothed; validation; three of memory; time, norm, rate
    for title in (
        "Loss",
        "Validation loss",
        "Memory",
        "Step time",
        "Gradient norm",
        "Learning rate",
        "smoothed",
        "planned",
    ):
        assert title in page.text
    assert "step 20\nplanned 4 GiB\nhost peak 1 GiB\ndevice peak 3 GiB" in html


def test_planned_seconds_stand_beside_the_measured_ones(run: Path) -> None:
    write_lines(run, [step_line(step, planned_step_seconds=1.5, eta_seconds=2.0) for step in range(1, 4)])
    html = write_report(run).read_text(encoding="utf-8")
    assert "2 s a step, planned 1.5 s" in Page(html).text
    assert "step 3\nplanned 1.5 s\nstep 2 s" in html


def test_samples_are_embedded_by_step_newest_first(run: Path) -> None:
    add_sample(run, 10, 0, "a rabbit")
    add_sample(run, 20, 0, "a bird", b"later")
    add_sample(run, 20, 1, "a butterfly")
    (run / "samples" / "notes.txt").write_text("no video")
    page = Page(write_report(run).read_text(encoding="utf-8"))
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "video"]
    assert sources[0] == "data:video/mp4;base64,bGF0ZXI="
    assert len(sources) == 3
    places = [page.text.index(shown) for shown in ("Step 20", "a bird", "a butterfly", "Step 10", "a rabbit")]
    assert places == sorted(places)


def test_samples_past_the_limit_are_links(run: Path) -> None:
    add_sample(run, 10, 0, "old", b"0" * 60)
    add_sample(run, 20, 0, "new", b"0" * 60)
    page = Page(render_report(read_run(run), embedded_bytes=100))
    sources = [attributes["src"] or "" for tag, attributes in page.tags if tag == "video"]
    assert sources[0].startswith("data:")
    assert sources[1] == "samples/step-00000010-0.mp4"


def test_the_page_asks_for_nothing_outside_itself(run: Path) -> None:
    add_sample(run, 20, 0, "a bird")
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert not {"script", "link", "iframe", "object", "img"} & {tag for tag, _ in page.tags}
    links = [
        value or "" for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")
    ]
    assert all(link.startswith("data:") for link in links)


def test_hostile_text_stays_text(run: Path) -> None:
    add_sample(run, 20, 0, HOSTILE)
    (run / "config.toml").write_text(f"[model]\nname = '''{HOSTILE}'''\n", encoding="utf-8")
    run = run.rename(run.parent / "<b>run&")
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert page.count("script") == 0
    assert page.text.count(HOSTILE) == 3  # the model's name, the prompt, the settings
    assert "<b>run&" in page.text


def test_what_befell_the_run_is_shown_and_a_line_that_was_cut_off_is_not(run: Path) -> None:
    assert "Events" not in Page(write_report(run).read_text(encoding="utf-8")).text
    lines = [
        {"time": "2026-11-28T22:40:18+00:00", "step": step, "kind": "worker-died", "what": f"number {step}: {HOSTILE}"}
        for step in range(102)
    ]
    text = "".join(json.dumps(line) + "\n" for line in [*lines, {"what": "no step"}, {"what": 3}])
    (run / "events.jsonl").write_text(text + '{"time": "20', encoding="utf-8")
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert page.count("tr") == 1 + 100
    assert "the last 100 of 103" in page.text
    assert "number 2:" not in page.text
    assert "number 3:" in page.text
    assert page.text.count("worker-died") == 99
    assert page.count("script") == 0


def test_a_line_cut_off_by_a_kill_is_left_out_and_named(run: Path) -> None:
    write_lines(run, [step_line(1), step_line(2)], end='{"step": 3, "los')
    found = read_run(run)
    assert [record["step"] for record in found.steps] == [1, 2]
    assert found.notes == ("metrics.jsonl: line 3 could not be read and is left out.",)
    assert found.notes[0] in Page(write_report(run).read_text(encoding="utf-8")).text


def test_a_step_run_again_after_a_resume_counts_once(run: Path) -> None:
    write_lines(run, [step_line(1), step_line(2, loss=9.0), step_line(3), step_line(2, loss=0.25), step_line(3)])
    assert points(read_run(run).steps, "loss") == [(1, 1.0), (2, 0.25), (3, pytest.approx(1 / 3))]


@pytest.mark.parametrize("loss", [math.nan, math.inf, None])
def test_a_loss_that_is_no_number_is_named_and_not_drawn(run: Path, loss: float | None) -> None:
    write_lines(run, [step_line(1), step_line(2, loss=loss), step_line(3)])
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert "Step 2 had no finite loss." in page.text
    assert not any(
        "nan" in (value or "") for tag, attributes in page.tags if tag == "polyline" for value in attributes.values()
    )


@pytest.mark.parametrize("content", [b"", b"[]\n12\n{}\n\xff\xfe\n", b'{"step": "one", "loss": 1}\n'])
def test_a_run_without_usable_metrics_still_has_a_page(run: Path, content: bytes) -> None:
    (run / "metrics.jsonl").write_bytes(content)
    (run / "adapter.safetensors").unlink()
    text = Page(write_report(run).read_text(encoding="utf-8")).text
    assert text.count("nothing recorded") == 6
    assert "not written yet" in text


def test_settings_that_are_no_toml_are_shown_as_they_are(run: Path) -> None:
    (run / "config.toml").write_text("[model\nname", encoding="utf-8")
    text = Page(write_report(run).read_text(encoding="utf-8")).text
    assert "[model\nname" in text
    assert "config.toml could not be read as TOML" in text


def test_a_sample_without_its_json_is_shown(run: Path) -> None:
    add_sample(run, 20, 0, "a bird")
    (run / "samples" / "step-00000020-0.json").write_text("{", encoding="utf-8")
    assert "no prompt recorded" in Page(write_report(run).read_text(encoding="utf-8")).text


def test_a_folder_that_is_no_run_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        write_report(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}: is not a run folder; ")
    assert "\n" not in str(caught.value)


def test_a_page_that_cannot_be_written_is_an_error_that_names_it(run: Path) -> None:
    (run / "report.html").mkdir()
    (run / "report.html" / "file").touch()
    with pytest.raises(RunError, match=r"report\.html"):
        write_report(run)
    assert [path.name for path in run.iterdir() if path.name.startswith((".", "report.html."))] == []


def test_the_report_needs_no_torch(run: Path) -> None:
    code = "import sys, pathlib, longtake.web.report as report; report.write_report(pathlib.Path(sys.argv[1]))"
    code += "; sys.exit(bool({'torch', 'numpy', 'pydantic'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code, str(run)], check=False, timeout=60).returncode == 0


def test_a_chart_of_many_points_keeps_its_spikes_and_stays_small() -> None:
    values = [(float(step), 100.0 if step == 43_217 else 1.0) for step in range(100_000)]
    chart = line_chart("Loss", [Series("loss", values)])
    drawn = next(attributes["points"] or "" for tag, attributes in Page(chart).tags if tag == "polyline").split()
    heights = [float(place.split(",")[1]) for place in drawn]
    assert len(drawn) <= MOST_POINTS + 2
    assert min(heights) < 25 < 150 < max(heights)
    assert len(chart) < 100_000


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("values", [[0.5], [0.5, 0.5], [1e-12, 1e12], [0.0, 0.0], [-1.0, 0.0, 1.0], [1e-300, 2e-300]])
def test_a_chart_can_be_drawn_of_any_finite_values(values: list[float], log: bool) -> None:
    chart = line_chart("Values", [Series("value", [*enumerate(values, 1)])], log=log)
    assert "nan" not in chart
    assert Page(chart).count("svg") == (0 if log and max(values) <= 0 else 1)


def test_ticks_are_round_numbers() -> None:
    linear = Page(line_chart("a", [Series("a", [(0, 0.0), (100, 0.97)])], from_zero=True)).text
    assert all(tick in linear for tick in ("0", "0.2", "0.4", "0.6", "0.8", "20", "40", "100"))
    logarithmic = Page(line_chart("a", [Series("a", [(0, 0.01), (1, 10.0)])], log=True)).text
    assert all(tick in logarithmic for tick in ("0.01", "0.1", "1", "10"))
