"""Malformed input through the command line: status 2 and one `error:` line a problem, whatever it is and wherever."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import clips
from command_line import Outcome, run, small_run, write_config, wrong

Change = dict[str, Any]
VERDICT = r"dataset: 1 of 1 clips cannot be used, more than 10%; correct these rows or take them out"


@dataclass(frozen=True)
class Place:
    """A folder with a sound clip, `data/a.mp4` and its caption, and a config of tiny-i2v that trains on it."""

    folder: Path
    root: Callable[[str], Path]

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def config(self, variant: str = "tiny-i2v", **changes: Any) -> Path:
        table = small_run(self.root(variant), self.data, self.folder)
        return write_config(self.folder / "run.toml", table, changes)

    def prepare(self, variant: str = "tiny-i2v", **changes: Any) -> Outcome:
        return run("prepare", self.config(variant, **changes))

    def only(self, name: str, content: bytes | np.ndarray | None = None) -> Path:
        """The one clip is now `name`, with `content`, and has a caption."""
        shutil.rmtree(self.data)
        self.data.mkdir()
        path = self.data / name
        if isinstance(content, np.ndarray):
            clips.write(path, content, fps=16)
        elif content is not None:
            path.write_bytes(content)
        path.with_suffix(".txt").write_text("a caption")
        return path

    def table(self, text: str | bytes, name: str = "clips.csv") -> Outcome:
        """Prepares from a table beside the clip."""
        path = self.data / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return self.prepare(data={"source": str(path)})


@pytest.fixture
def place(tmp_path: Path, tiny_root: Callable[[str], Path]) -> Place:
    found = Place(tmp_path, tiny_root)
    found.data.mkdir()
    clips.write(found.data / "a.mp4", clips.levels(8), fps=16)
    (found.data / "a.txt").write_text("grey")
    return found


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (None, ["there is no such file; make one with `longtake init`"]),
        (b"", ["model: this key is required", "data: this key is required", "output: this key is required"]),
        (b"\xff\xfe[\0m\0", ["run.toml: the file is not UTF-8; save it as UTF-8"]),
        (b"[model\n", ["run.toml: this is no valid TOML: Expected ']' at the end of a table declaration (at line 1, "]),
        (
            b'[model]\nnam = "tiny-t2v"\nname = 3\n[data]\nsource = "x"\nrank = 4\n[output]\nrun = "r"\n[trainin]\n',
            [
                "run.toml:3: model.name: must be a valid string, not 3",
                "run.toml:2: model.nam: there is no such key; did you mean name?",
                "run.toml:6: data.rank: there is no such key; did you mean lora.rank?",
                "run.toml:9: trainin: there is no such key; did you mean training?",
            ],
        ),
    ],
)
@pytest.mark.parametrize("command", ["prepare", "train"])
def test_a_config_that_is_none(tmp_path: Path, command: str, content: bytes | None, lines: list[str]) -> None:
    path = tmp_path / "run.toml"
    if content is not None:
        path.write_bytes(content)
    assert not wrong(run(command, path), *lines)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--set", "steps=3"], "--set: cannot read 'steps=3'; write section.key=value"),
        (["--set", "training.stps=3"], "--set training.stps: there is no such key; did you mean steps?"),
        (["--set", "training.global_batch_size=3", "--set", "training.micro_batch_size=2"], "that work: 2 or 4"),
        (["--budget", "lots"], "memory.budget: cannot read 'lots' as a size; write a number with a unit, for example"),
        (["--gpus", "0"], "--gpus: 0 GPUs were asked for; use 1 or more"),
        (["--gpus", "many"], "longtake train: Invalid value for '--gpus'"),
        (["--num-frames"], "Option '--num-frames' requires an argument"),
        (["--lora_rnk", "4"], "longtake train: No such option: --lora_rnk"),
        (["--height", "-8"], "--height: must be greater than 0, not -8"),
        (["--use-gradient-checkpointing-offload", "--set", "memory.block_swap=2"], "2 buffers save nothing; use 0, or"),
        (
            ["--gpus", "2", "--training-strategy", "ddp"],
            "no multiple of 2 ranks x micro-batch 1; the nearest that work: 2",
        ),
        (
            ["--set", "training.warmup_steps=2"],
            "the warm-up of 2 steps is as long as the run; at most 1",
        ),
    ],
)
def test_a_command_line_that_cannot_work(place: Place, arguments: list[str], line: str) -> None:
    assert not wrong(run("train", place.config(), *arguments), line)


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({"data": {"size": [50, 32]}}, ["data.size: width 50 does not divide by 16, as tiny-i2v needs; take 48 or 64"]),
        ({"data": {"num_frames": 8}}, ["data.num_frames: 8 frames is not 4n+1; take 5 or 9"]),
        ({"data": {"num_frames": 1}}, ["data.num_frames: tiny-i2v cannot learn from single frames; take 5 or more"]),
        (
            {"data": {"num_frames": 6, "size": [33, 8]}},
            ["6 frames is not 4n+1", "width 33 does not divide by 16", "height 8 does not divide by 16"],
        ),
        ({"data": {"source": "gone.csv"}}, ["gone.csv: the source does not exist; correct data.source"]),
        ({"data": {"source": "https://host/clips.csv"}}, ["/host/clips.csv: the source is a URL; download it"]),
        ({"data": {"source": "run.toml"}}, ["run.toml: a source may not be a .toml; give a folder of clips, or a "]),
        ({"data": {"source": "."}}, ["the folder has no clips; put clip.mp4 beside clip.txt"]),
        ({"data": {"validation": "held/"}}, ["held: the source does not exist"]),
        ({"model": {"path": "", "name": "wan3"}}, ["wan3"]),
        ({"model": {"path": "", "name": "nobody/nothing"}}, ["nobody/nothing: cannot be fetched"]),
        ({"model": {"path": "gone"}}, ["model.path: there is no "]),
        ({"model": {"path": "data"}}, ["data"]),
        ({"model": {"name": "tiny-t2v"}}, ["tiny-t2v"]),
        ({"model": {"components": "data"}}, ["model.components: "]),
    ],
)
@pytest.mark.parametrize("command", ["prepare", "train"])
def test_settings_that_the_model_or_the_disk_does_not_have(
    place: Place, command: str, changes: Change, lines: list[str]
) -> None:
    assert not wrong(run(command, place.config(**changes)), *lines)


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("b.mp4", b"", "b.mp4 is empty (0 bytes); copy it again or leave it out"),
        ("b.mp4", b"this is just text\n" * 99, "b.mp4 is not a video"),
    ],
)
def test_a_clip_that_cannot_be_used(place: Place, name: str, content: bytes | np.ndarray, line: str) -> None:
    place.only(name, content)
    outcome = place.prepare()
    assert not wrong(outcome, f"data/{name}: {line}", VERDICT)
    assert not (place.folder / "cache" / "manifests").exists()


def test_a_still_image_for_a_model_that_learns_from_clips(place: Place) -> None:
    place.only("b.png", b"")
    assert not wrong(place.prepare(), "still images; give clips: this model learns how a video goes on from the image")
    clips.write(place.data / "a.mp4", clips.levels(8), fps=16)
    (place.data / "a.txt").write_text("grey")
    line = "data/b.png: b.png is a still image; leave it out: this model learns from clips"
    assert not wrong(place.prepare(), line, VERDICT.replace("1 of 1", "1 of 2"))


@pytest.mark.parametrize("frames", [1, 4])
def test_a_clip_that_is_too_short_for_every_bucket(place: Place, frames: int) -> None:
    place.only("b.mp4", clips.levels(frames))
    outcome = place.prepare()
    assert not wrong(outcome, "data: no clip can be used; mend the clips named above")
    named = f"left out or changed: data/b.mp4: b.mp4 has {frames} frames at 16 fps; give a clip of 5 or more, or leave"
    assert outcome.err.count(named) == 1


def test_sound_without_pictures(place: Place) -> None:
    clips.write_sound_only(place.only("b.mp4"))
    assert not wrong(place.prepare(), "data/b.mp4: b.mp4 has no pictures, only sound or data; leave it out", VERDICT)


def test_a_clip_that_breaks_off(place: Place) -> None:
    whole = clips.write(place.folder / "whole.mp4", clips.levels(40), fps=16)
    clips.write_truncated(place.only("b.mp4"), whole)
    assert not wrong(place.prepare(), "data/b.mp4: b.mp4 ", VERDICT)


def test_an_image_of_30_000_by_30_000_is_refused_before_it_is_decoded(place: Place) -> None:
    clips.write_huge_png(place.only("b.png"))
    assert not wrong(place.prepare("tiny-t2v"), "data/b.png: b.png has more than", VERDICT)


def test_odd_sizes_and_a_tall_clip_are_cropped(place: Place) -> None:
    frames = clips.levels(8, width=36, height=70)
    place.only("b.mkv")
    clips.write(place.data / "b.mkv", np.ascontiguousarray(frames[:, :69, :35]), fps=16, codec="ffv1")
    outcome = place.prepare()
    assert outcome.status == 0, outcome.err
    assert "1 clips ready" in outcome.out


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("", ["clips.csv: clips.csv is empty (0 bytes); copy it again or leave it out"]),
        ("video,prompt\n", ["clips.csv: has no rows; add rows with video and prompt"]),
        (
            "video,prompt\na.mp4,d\xe9j\xe0 vu\n".encode("latin-1"),
            ["clips.csv: the text is not valid UTF-8 or GBK; save it"],
        ),
        ("video\na.mp4\n", ["clips.csv: has no column prompt or caption"]),
        ("vidoe,caption\na.mp4,x\n", ["clips.csv: has no column video; rename 'vidoe' to 'video'"]),
        ("video;prompt\na.mp4;x\n", ["clips.csv:row 1: the columns are not separated by commas"]),
        ('video,prompt\na.mp4,"x\n', ["clips.csv:line 2: broken CSV"]),
        ("video,prompt\na.mp4,one, two\n", ["clips.csv:row 2: has 3 fields, the header has 2", VERDICT]),
        ("video,prompt\na.mp4,  \n", ["clips.csv:row 2: the caption is empty; describe the clip", VERDICT]),
        ("video,prompt\ngone.mp4,x\n", ["clips.csv:row 2: gone.mp4 does not exist", VERDICT]),
        ("video,prompt\n../run.toml,x\n", ["clips.csv:row 2: ../run.toml is outside the dataset's folder", VERDICT]),
        ("video,prompt\n/etc/passwd,x\n", ["clips.csv:row 2: /etc/passwd is outside the dataset's folder", VERDICT]),
        ("video,prompt\nhttp://h/a.mp4,x\n", ["clips.csv:row 2: video is a URL: http://h/a.mp4; download it", VERDICT]),
        ("video,prompt,start\na.mp4,x,99\n", ["clips.csv: no clip can be used; mend the clips named above"]),
        ("video,prompt,fps\na.mp4,x,fast\n", ["clips.csv:row 2: fps is 'fast'; write a number", VERDICT]),
        ("video,prompt\n,x\n../b,\n", ["row 2: video is missing", "row 3: ../b is", "row 3: the caption is", "2 of 2"]),
    ],
)
def test_a_table_that_cannot_be_used(place: Place, text: str | bytes, lines: list[str]) -> None:
    assert not wrong(place.table(text), *lines)


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("clips.json", "{}", "clips.json: is not a list"),
        ("clips.jsonl", '{"video": "a.mp4"', "clips.jsonl:line 1: broken JSON"),
        ("clips.txt", "a.mp4", "clips.txt: a source may not be a .txt"),
    ],
)
def test_a_table_of_another_kind(place: Place, name: str, text: str, line: str) -> None:
    outcome = place.table(text, name)
    assert outcome.status == 2
    assert line in outcome.errors[0]


def test_a_clip_without_a_caption(place: Place) -> None:
    (place.data / "a.txt").unlink()
    assert not wrong(place.prepare(), "data/a.mp4: has no caption; write one into a.txt", VERDICT)


def test_a_bad_clip_among_many_is_left_out_and_said_once(place: Place) -> None:
    for index in range(9):
        shutil.copy(place.data / "a.mp4", place.data / f"b{index}.mp4")
        (place.data / f"b{index}.txt").write_text("grey")
    (place.data / "b4.mp4").write_bytes(b"")
    outcome = place.prepare("tiny-t2v")
    assert outcome.status == 0, outcome.err
    assert outcome.errors == []
    assert outcome.err.count("data/b4.mp4: b4.mp4 is empty (0 bytes)") == 1
    assert "9 clips ready" in outcome.out


def test_files_that_are_no_model(place: Place) -> None:
    weights = place.root("tiny-t2v") / "transformer" / "diffusion_pytorch_model.safetensors"
    cut = place.folder / "cut.safetensors"
    clips.write_truncated(cut, weights)
    other = place.folder / "other.safetensors"
    save_file({"layer.weight": torch.zeros(2, 2)}, other)
    text = place.folder / "text.safetensors"
    text.write_text("not a safetensors file")
    picture = place.folder / "picture.png"
    Image.new("RGB", (8, 8)).save(picture)
    for path in (cut, other, text, picture, place.folder / "gone.safetensors", place.data):
        for outcome in (run("inspect", path), run("prepare", place.config(model={"path": str(path)}))):
            assert outcome.status == 2
            (line,) = outcome.errors
            assert path.name in line


def test_a_transformer_alone_needs_components(place: Place) -> None:
    weights = place.root("tiny-t2v") / "transformer" / "diffusion_pytorch_model.safetensors"
    outcome = run("prepare", place.config(model={"path": str(weights), "name": "tiny-t2v"}))
    assert not wrong(
        outcome, "model.components: only a transformer was given; VAE and encoders are needed; set model.components"
    )
