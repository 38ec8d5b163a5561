"""`longtake doctor`: what it prints in wide, narrow and piped terminals, its JSON, and its exit status."""

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from command_line import run, succeed, wrong
from longtake.config.schema import RunConfig
from longtake.doctor.command import diagnose
from longtake.doctor.terminal import MOST_ROWS, print_diagnosis
from runs import Recorder, draw_clip

CLIP_KEYS = {"where", "source", "split", "file", "caption", "shows", "buckets", "left_out", "warnings"}
SHOWS_KEYS = {"width", "height", "seconds", "fps", "frames", "rotation", "is_image", "codec", "pixel_format"}
BUCKET_KEYS = {"frames", "height", "width", "stages", "tokens", "start_seconds", "cropped", "scale"}
TOTALS = {"clips", "train", "validation", "stills", "seconds", "left_out", "uncounted", "reasons", "buckets"}
TOTALS |= {"same_content", "same_caption", "limit"}
ESCAPE = "\x1b"


def printed(config: RunConfig, width: int, **options: object) -> str:
    console = Console(file=io.StringIO(), width=width, **options)  # type: ignore[arg-type]
    print_diagnosis(diagnose(config, Recorder()), console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def with_damage(folder: Path, sound: int, damaged: int) -> Path:
    folder.mkdir()
    for index in range(sound):
        draw_clip(folder / f"{index}.mp4", index)
    for index in range(damaged):
        (folder / f"bad{index}.mp4").write_bytes(b"no video")
        (folder / f"bad{index}.txt").write_text("bad")
    return folder


def test_clips_totals_and_the_plan_are_said_in_this_order(config_file: Callable[..., Path], mixed: Path) -> None:
    outcome = succeed("doctor", config_file(mixed))
    parts = ("damaged.mp4 is not a video", "turned 90°", "17 clips can be used", "5 frames of 64x32: ", "fits: ")
    places = [" ".join(outcome.out.split()).find(part) for part in parts]
    assert -1 not in places
    assert places == sorted(places)
    assert "(40 tokens) on 1 x cpu: fits: " in outcome.out, "the largest bucket"
    assert ESCAPE not in outcome.out + outcome.err
    assert outcome.errors == []


def test_json_on_the_terminal_is_all_of_it_and_nothing_else(config_file: Callable[..., Path], mixed: Path) -> None:
    found = json.loads(succeed("doctor", config_file(mixed), "--json", "-", "--no-plan").out)
    assert found.keys() == {"model", "task", "fps", "sources", "stops", "remarks", "totals", "plan", "clips"}
    assert found["totals"].keys() == TOTALS
    assert len(found["clips"]) == 19
    for clip in found["clips"]:
        assert clip.keys() == CLIP_KEYS
        assert bool(clip["buckets"]) != bool(clip["left_out"])
        assert clip["shows"] is None or clip["shows"].keys() == SHOWS_KEYS
        assert all(bucket.keys() == BUCKET_KEYS for bucket in clip["buckets"])
    assert found["plan"] == {"line": "no plan: it was not asked for", "report": None}
    assert (found["stops"], found["totals"]["limit"]["share"]) == ([], 0.1)


def test_what_the_plan_says_is_in_the_json_of_a_file(
    config_file: Callable[..., Path], mixed: Path, tmp_path: Path
) -> None:
    succeed("doctor", config_file(mixed), "--json", tmp_path / "found.json", "--gpu", "rtx-4090")
    plan = json.loads((tmp_path / "found.json").read_text())["plan"]
    assert plan["report"]["bucket"] == [17, 32, 64]
    assert plan["report"]["gpu"] == "rtx-4090"
    assert plan["line"].startswith("17 frames of 64x32 (40 tokens) on 1 x rtx-4090: fits: ")


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (("--gpu", "abacus"), "no plan: "),
        pytest.param(("--set", 'memory.budget="1MiB"'), "nothing fits", marks=pytest.mark.slow),
    ],
)
def test_without_a_plan_a_line_says_why_and_the_clips_are_as_good(
    config_file: Callable[..., Path], mixed: Path, flags: tuple[str, ...], why: str
) -> None:
    outcome = succeed("doctor", config_file(mixed), *flags)
    assert why in outcome.out.splitlines()[-2] + outcome.out.splitlines()[-1]
    assert outcome.errors == []


def test_where_prepare_would_stop_the_report_is_given_and_the_error_is_the_same(
    config_file: Callable[..., Path], tmp_path: Path
) -> None:
    config = config_file(with_damage(tmp_path / "clips", 4, 2))
    outcome, prepared = run("doctor", config, "--html", tmp_path / "sheet.html"), run("prepare", config)
    assert (outcome.status, outcome.errors) == (2, prepared.errors)
    assert "2 of 6 clips cannot be used, more than 10%" in outcome.errors[-1]
    assert "4 clips can be used" in outcome.out
    assert "no plan: prepare would stop" in outcome.out
    assert "prepare would stop: " in (tmp_path / "sheet.html").read_text()


def test_without_a_clip_left_the_status_is_that_of_prepare(config_file: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    draw_clip(tmp_path / "clips" / "short.mp4", 0, frames=3)
    config = config_file(tmp_path / "clips")
    outcome, prepared = run("doctor", config), run("prepare", config)
    assert (outcome.status, outcome.errors) == (2, prepared.errors)
    assert "no clip can be used" in outcome.errors[0]
    assert "short.mp4 has 3 frames" in outcome.out


@pytest.mark.parametrize(
    ("changes", "flags", "line"),
    [
        ({"num_frames": 18}, (), "18 frames is not 4n+1"),
        ({"source": "nowhere"}, (), "the source does not exist"),
        ({"sizes": [32, 32]}, (), "data.sizes"),
        ({}, ("--clips", "0"), "0 clips are no page"),
    ],
)
def test_a_wrong_config_is_one_line(
    config_file: Callable[..., Path], tmp_path: Path, changes: dict[str, object], flags: tuple[str, ...], line: str
) -> None:
    source = with_damage(tmp_path / "clips", 1, 0)
    config = config_file(source, **({"frames_schedule": []} | changes if "source" not in changes else {}))
    if "source" in changes:
        config.write_text(config.read_text().replace(str(source), str(tmp_path / "nowhere")))
    assert wrong(run("doctor", config, *flags), line) == []


@pytest.mark.parametrize("width", [30, 60, 89, 90, 120, 200])
def test_no_line_is_wider_than_the_terminal_and_no_word_obeyed(config: RunConfig, width: int) -> None:
    text = printed(config, width)
    assert max(map(cell_len, text.splitlines())) <= width
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", text)


def test_colours_are_for_terminals_that_want_them(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"{ESCAPE}[31m" in printed(config, 120, force_terminal=True, color_system="standard")
    monkeypatch.setenv("NO_COLOR", "1")
    assert f"{ESCAPE}[31m" not in printed(config, 120, force_terminal=True, color_system="standard")


def test_of_many_clips_those_with_something_to_see_come_first(
    config_file: Callable[..., Path], tmp_path: Path, mixed: Path
) -> None:
    folder = tmp_path / "clips"
    folder.mkdir()
    for index in range(MOST_ROWS + 9):
        (folder / f"{index:02}.mp4").write_bytes((mixed / "0.mp4").read_bytes())
        (folder / f"{index:02}.txt").write_text(f"clip {index}")
    (folder / "zz.mp4").write_bytes(b"no video")
    (folder / "zz.txt").write_text("bad")
    out = succeed("doctor", config_file(folder, size=[32, 32], validation=0), "--no-plan").out
    assert out.index("clips/zz.mp4") < out.index("clips/00.mp4")
    assert "and 10 more (--json has all)" in out
    assert len(re.findall(r"^clips/", out.split("and 10 more")[0], re.MULTILINE)) == MOST_ROWS


def test_rows_of_a_table_name_their_file_and_what_is_wrong_with_each(
    config_file: Callable[..., Path], tmp_path: Path, mixed: Path
) -> None:
    (tmp_path / "0.mp4").write_bytes((mixed / "0.mp4").read_bytes())
    rows = ["video,caption", *(f"0.mp4,caption {index}" for index in range(12)), "1.mp4,gone"]
    (tmp_path / "clips.csv").write_text("\n".join(rows))
    out = succeed("doctor", config_file(tmp_path / "clips.csv"), "--no-plan").out
    assert "clips.csv:row 2 (0.mp4)" in out
    assert re.search(r"clips.csv:row 14 +left out +1.mp4 does not exist", out)
    assert "train: 1 of 13 rows cannot be read (8%), within the 10%" in out


def test_a_name_that_no_terminal_can_show_is_left_out_everywhere(
    config_file: Callable[..., Path], tmp_path: Path, mixed: Path
) -> None:
    folder = with_damage(tmp_path / "clips", 10, 0)
    (folder / os.fsdecode(b"\xff\x1b[31m.mp4")).write_bytes((mixed / "0.mp4").read_bytes())
    (folder / os.fsdecode(b"\xff\x1b[31m.txt")).write_text("red")
    written = ("--json", tmp_path / "found.json", "--html", tmp_path / "sheet.html")
    outcome = succeed("doctor", config_file(folder), "--no-plan", *written)
    for text in (outcome.out, *(path.read_text(encoding="utf-8") for path in tmp_path.glob("*.[jh]*"))):
        assert "the path is not UTF-8" in text
        assert ESCAPE not in text


def test_of_many_clips_a_bar_says_how_many_have_been_looked_at(
    config_file: Callable[..., Path], mixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_file(mixed)
    assert "looked at" not in succeed("doctor", config, "--no-plan").err
    monkeypatch.setattr("longtake.doctor.clips.MANY", 19)
    assert "looked at  19/19" in succeed("doctor", config, "--no-plan").err


def test_no_encoder_and_no_model_library_is_loaded_before_the_plan(
    config_file: Callable[..., Path], mixed: Path, tmp_path: Path
) -> None:
    table = config_file(mixed).read_text()
    path = re.search(r'^path = "(.+)"$', table, re.MULTILINE)
    assert path is not None
    (tmp_path / "run.toml").write_text(table.replace(path[0], 'name = "tiny-t2v"'))
    program = (
        "import sys; from longtake.cli import main\n"
        "try: main()\n"
        "finally: print(sorted({'diffusers', 'transformers', 'peft'} & set(sys.modules)))"
    )
    arguments = [sys.executable, "-c", program, "doctor", str(tmp_path / "run.toml"), "--no-plan"]
    arguments += ["--html", str(tmp_path / "sheet.html")]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
