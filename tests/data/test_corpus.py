"""Malformed inputs are told apart and cost little, alone and all in one data set; odd clips show what they have."""

import json
import subprocess
import time
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

import pngs
from command_line import run, small_run, write_config
from corpus_images import IMAGES, several_of_one
from corpus_listings import CAPTIONS, CLIP, HUGE_TABLE, LINES, TABLES, Caption, Line, Table, row
from corpus_odd import ODD, Odd
from corpus_videos import VIDEOS, Malformed, sound, write_large
from longtake.data.buckets import assign
from longtake.data.decoder import shared_decoder
from longtake.data.decoding import SLACK_SECONDS
from longtake.data.metadata import read_source
from longtake.data.video import ClipInfo, Window, probe, read_clip, read_image
from longtake.errors import DataError, Problem
from longtake.explanations import explanations
from longtake.models.wan.variants import variant

SIZE = (64, 48)
MOST_SECONDS, MOST_BYTES = 20.0, 1_500_000_000
SAME_DECIBELS = 40.0
NOTES = ("clip-shorter", "clips-turned")
"""What is said of clips that are used."""


@dataclass
class Cost:
    """Seconds since it was made, and the most bytes that this process took on and that the decoding one had."""

    def __post_init__(self) -> None:
        self.began = time.monotonic()
        for process in ("self", self._decoding()):
            with suppress(OSError):
                Path(f"/proc/{process}/clear_refs").write_text("5")  # its peak is now what it has
        self.before = self._peak("self")

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    @property
    def nbytes(self) -> int:
        # of one that has ended no peak is told but with that of who started it; its limit holds, as its own test has it
        return max(self._peak("self") - self.before, self._peak(self._decoding()))

    def _decoding(self) -> str:
        running = shared_decoder().running
        return "0" if running is None else str(running.process.pid)

    def _peak(self, process: str) -> int:
        with suppress(OSError):
            lines = Path(f"/proc/{process}/status").read_text().splitlines()
            return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)
        return 0


def found(source: Path, decode: bool = True) -> list[Problem]:
    """What is wrong with a source, in the order of `prepare`: rows, files, buckets, then all pictures."""
    try:
        records, problems = read_source(source, image_allowed=True)
        for record in records:
            info = probe(record.path, record.where)
            _, left_out = assign([record], [info], variant("tiny-t2v").spec, [5], SIZE, 0)
            problems += [problem for problem in left_out if problem.code not in NOTES]
            if decode and not problems:
                pictures(record.path, info)
    except DataError as error:
        return list(error.problems)
    return problems


def pictures(path: Path, info: ClipInfo) -> None:
    """All of a clip or still is decoded."""
    if info.is_image:
        read_image(path, SIZE)
    else:
        read_clip(path, Window(0.0, info.frames, info.fps), SIZE)


def unclear(problems: list[Problem], code: str, names: str, where: str) -> list[str]:
    """What is not as it should be with the one kind of problem, which names a file or row and is explained."""
    lines = [str(problem) for problem in problems]
    wrong = [line for problem, line in zip(problems, lines, strict=True) if problem.code != code or not problem.remedy]
    wrong += [line for line in lines if "\n" in line or len(line) > 600 or names not in line or "Traceback" in line]
    wrong += [problem.where for problem in problems if not problem.where.endswith(where)]
    return wrong + ([] if problems and code in explanations() else [f"{code} is not said"])


def with_clip(folder: Path) -> Path:
    """The folder, with a clip in it that is well and a link to one outside."""
    folder.mkdir(parents=True)
    (folder / CLIP).write_bytes(sound())
    (folder.parent / "elsewhere.mp4").write_bytes(sound())
    (folder / "link.mp4").symlink_to("../elsewhere.mp4")
    return folder


def write_caption(case: Caption, folder: Path) -> None:
    """The caption and its clip, and for the text of one that has none another clip."""
    case.make(folder / f"{case.name}.txt")
    if not case.orphan:
        (folder / f"{case.name}.mp4").write_bytes(sound())


def test_the_corpus_has_enough_of_each() -> None:
    names = [case.name for case in (*VIDEOS, *IMAGES, *CAPTIONS, *LINES, *TABLES, *ODD)]
    assert len(set(names)) == len(names)
    assert (len(VIDEOS) >= 30, len(IMAGES) >= 14, len(CAPTIONS + LINES + TABLES) >= 28, len(ODD) >= 24) == (True,) * 4


@pytest.mark.parametrize("case", [*VIDEOS, *IMAGES], ids=lambda case: case.name)
def test_a_malformed_file_is_refused_for_what_it_is(tmp_path: Path, case: Malformed) -> None:
    case.make(tmp_path / case.name)
    (tmp_path / "clips.jsonl").write_text(row(video=case.name))
    cost = Cost()
    problems = found(tmp_path / "clips.jsonl", decode=False)
    if case.late:
        assert problems == []
        problems = found(tmp_path / "clips.jsonl")
    assert len(problems) == 1
    assert unclear(problems, case.code, case.name, case.name if case.late else "clips.jsonl:line 1") == []
    assert cost.seconds < MOST_SECONDS
    assert cost.nbytes < MOST_BYTES


@pytest.mark.parametrize("case", CAPTIONS, ids=lambda case: case.name)
def test_a_malformed_caption_is_refused_for_what_it_is(tmp_path: Path, case: Caption) -> None:
    (tmp_path / "clips").mkdir()
    write_caption(case, tmp_path / "clips")
    (tmp_path / "elsewhere.txt").write_text("a hill")
    if case.orphan:
        write_caption(Caption("sound", "", lambda path: path.write_text("a hill")), tmp_path / "clips")
    cost = Cost()
    problems = found(tmp_path / "clips", decode=False)
    assert len(problems) == 1
    assert unclear(problems, case.code, case.name, f"clips/{case.name}{'.txt' if case.orphan else '.mp4'}") == []
    assert (cost.seconds < MOST_SECONDS, cost.nbytes < MOST_BYTES) == (True, True)


@pytest.mark.parametrize("case", LINES, ids=lambda case: case.name)
def test_a_malformed_row_costs_itself_alone(tmp_path: Path, case: Line) -> None:
    source = with_clip(tmp_path / "clips") / "clips.jsonl"
    source.write_text(f"{row()}\n{case.text}\n")
    problems = found(source, decode=False)
    assert len(problems) == 1
    assert unclear(problems, case.code, "clips.jsonl:line 2", "clips.jsonl:line 2") == []


@pytest.mark.parametrize("case", [*TABLES, HUGE_TABLE], ids=lambda case: case.name)
def test_a_malformed_table_is_refused_for_what_it_is(tmp_path: Path, case: Table) -> None:
    source = with_clip(tmp_path / "clips") / case.name
    case.make(source)
    cost = Cost()
    problems = found(source, decode=False)
    assert unclear(problems, case.code, case.name, f"{case.name}:{case.place}" if case.place else case.name) == []
    assert (cost.seconds < MOST_SECONDS, cost.nbytes < MOST_BYTES) == (True, True)


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
def test_a_second_picture_that_is_of_the_first_is_passed_over(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind.lower()}"
    path.write_bytes(several_of_one(kind))
    with Image.open(path) as image:
        assert image.n_frames == 2
    assert probe(path, "row 2").is_image
    assert read_image(path, SIZE).float().std() > 30


def test_pictures_just_within_the_limit_are_read_one_by_one(tmp_path: Path) -> None:
    write_large(tmp_path / "large.mov", 8, pngs.GREY)
    cost = Cost()
    info = probe(tmp_path / "large.mov", "row 2")
    assert (info.width, info.height, info.frames) == (8192, 8192, 17)
    assert read_clip(tmp_path / "large.mov", Window(0.0, 1, 24.0), SIZE).unique().tolist() == [0]
    assert cost.nbytes < MOST_BYTES


def test_the_doctor_names_each_of_a_whole_data_set_once(tmp_path: Path) -> None:
    folder, captions = with_clip(tmp_path / "clips"), tmp_path / "captions"
    captions.mkdir()
    (tmp_path / "elsewhere.txt").write_text("a hill")
    for case in (*VIDEOS, *IMAGES):
        case.make(folder / case.name)
    for case in CAPTIONS:
        write_caption(case, captions)
    files = [row(video=case.name) for case in (*VIDEOS, *IMAGES)]
    source = folder / "clips.jsonl"
    source.write_text("\n".join([*files, *(case.text for case in LINES), row()]))
    changes = {"model": {"path": "", "name": "tiny-t2v"}, "data": {"validation": str(captions)}}
    config = write_config(tmp_path / "run.toml", small_run(Path(), source, tmp_path), changes)
    outcome = run("doctor", config, "--no-plan", "--json", "-")
    said = {
        clip["where"]: [text.split("[")[-1] for text in clip["left_out"]] for clip in json.loads(outcome.out)["clips"]
    }
    expected = {f"clips.jsonl:line {number}": case for number, case in enumerate((*VIDEOS, *IMAGES, *LINES), 1)}
    expected |= {f"captions/{case.name}{'.txt' if case.orphan else '.mp4'}": case for case in CAPTIONS}
    codes = {where: [] if getattr(case, "late", False) else [f"{case.code}]"] for where, case in expected.items()}
    assert said == codes | {f"clips.jsonl:line {len(VIDEOS + IMAGES + LINES) + 1}": []}
    assert outcome.status == 2
    assert "cannot be used, more than 10%" in outcome.errors[-1]


@pytest.fixture(scope="module")
def ffmpeg() -> str:
    """The command, of a version that the tests bring along where it runs."""
    return imageio_ffmpeg.get_ffmpeg_exe()


def by_ffmpeg(command: str, path: Path, case: Odd, folder: Path) -> Iterator[tuple[float, bytes]]:
    """(seconds since the first, pixels) of every frame as the `ffmpeg` command decodes it, upright and square.

    Interlaced pictures are scaled by fields, as their colours were sampled, which `ffmpeg` does where it is asked to.
    """
    square = "scale='round(iw*max(sar,1))':'round(ih/min(sar,1))':interl=-1:flags=bicubic+full_chroma_int+accurate_rnd"
    square += f":in_chroma_loc={case.siting}" + (f":in_color_matrix={case.matrix}" if case.matrix else "")
    every = ["-map", "0:v:0", "-fps_mode", "passthrough"]
    arguments = [command, "-nostdin", "-v", "error", "-i", f"file:{path}", *every, "-vf", square, "-pix_fmt", "rgb24"]
    arguments += ["-f", "rawvideo", str(folder / "raw"), *every, "-enc_time_base", "demux", "-vf", "scale=16:16"]
    subprocess.run([*arguments, "-f", "framecrc", str(folder / "times")], check=True, timeout=60)
    lines = (folder / "times").read_text().splitlines()
    numerator, denominator = next(line for line in lines if line.startswith("#tb")).split()[-1].split("/")
    stamps = [int(line.split(",")[2]) for line in lines if not line.startswith("#")]
    raw = (folder / "raw").read_bytes()
    size = len(raw) // len(stamps)
    assert size * len(stamps) == len(raw)
    for index, stamp in enumerate(stamps):
        yield (stamp - stamps[0]) * int(numerator) / int(denominator), raw[index * size : (index + 1) * size]


def decibels(one: np.ndarray, other: np.ndarray) -> float:
    """The PSNR of two pictures."""
    error = float(np.mean((one.astype(np.float32) - other) ** 2))
    return 10 * float(np.log10(255**2 / max(error, 1e-9)))


@pytest.mark.parametrize("case", ODD, ids=lambda case: case.name)
def test_an_odd_clip_shows_what_ffmpeg_shows(tmp_path: Path, case: Odd, ffmpeg: str) -> None:
    path = tmp_path / case.name
    case.make(path)
    info = probe(path, "row 2")
    shown = read_clip(path, Window(0.0, info.frames, info.fps), (info.width, info.height))
    times, expected = zip(*by_ffmpeg(ffmpeg, path, case, tmp_path), strict=True)
    assert info.frames >= 5
    for index, pixels in enumerate(shown.permute(0, 2, 3, 1).numpy()):
        begun = bisect_right(times, index / info.fps + SLACK_SECONDS)
        wanted = np.frombuffer(expected[begun - 1], np.uint8).reshape(pixels.shape)
        assert decibels(pixels, wanted) >= SAME_DECIBELS, index
