"""What is encoded again when one thing changes: exactly the entries that it concerns, and for most things none."""

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import UMT5EncoderModel

import clips
from longtake.data.claims import Claims
from longtake.data.dataset import place, read_sources
from longtake.data.encode import _Keys, encoder_fingerprints
from longtake.data.hashes import content_hashes
from longtake.models.spec import ModelSpec
from longtake.models.wan.variants import variant
from runs import Scene

ROWS = {
    "a": {"video": "a.mp4", "prompt": "clip a", "start": 0.25},
    "b": {"video": "b.mp4", "prompt": "clip b"},
    "c": {"video": "c.mp4", "prompt": "clip c", "start": 0, "frames": 9, "fps": 16},
}
"""Where `a` begins is fixed, where `b` does is drawn, and of `c` there are just nine frames. `b` stands upright."""
DATA: dict[str, Any] = {"source": "clips.csv", "num_frames": 9, "size": (48, 32)}
KINDS = ("latents", "images", "texts")
Concerned = dict[str, str]
"""By kind the last letters of the captions of the clips whose entries are new; `-` is the empty caption."""


@dataclass(frozen=True)
class World:
    """All that a cache is made from; `folder` has the clips, and their files and those in `root` may be changed."""

    folder: Path
    root: Path
    spec: ModelSpec
    rows: dict[str, dict[str, Any]] = field(default_factory=lambda: dict(ROWS))
    held: dict[str, dict[str, Any]] = field(default_factory=dict)
    sections: dict[str, Any] = field(default_factory=dict)

    def row(self, name: str, /, **values: Any) -> "World":
        return replace(self, rows=self.rows | {name: self.rows.get(name, {}) | values})

    def data(self, **values: Any) -> "World":
        return self.section("data", **values)

    def section(self, name: str, /, **values: Any) -> "World":
        return replace(self, sections=self.sections | {name: self.sections.get(name, {}) | values})

    def scene(self) -> tuple[Scene, Any]:
        """With its tables written, and the config."""
        for table, rows in (("clips.csv", self.rows), ("held.csv", self.held)):
            with (self.folder / table).open("w", newline="") as file:
                writer = csv.DictWriter(file, ["video", "prompt", "start", "frames", "fps"])
                writer.writeheader()
                writer.writerows(rows.values())
        scene = Scene(self.spec.name, self.root, self.folder / "clips.csv", self.folder / "cache")
        data = DATA | {"source": str(scene.source)} | self.sections.get("data", {})
        return scene, scene.config(self.folder / "run", **(self.sections | {"data": data}))

    def entries(self) -> dict[tuple[str, str], str]:
        """Kind and key of every entry that `prepare` makes, with the last letter of its caption."""
        scene, config = self.scene()
        sources = read_sources(config.data, self.spec, print)
        placed = place(sources, config.data, self.spec, config.training.seed, print)
        hashes = content_hashes({item.clip.record.path for item in placed}, Claims(scene.cache, 0, 1, print))
        keys = _Keys(self.spec, encoder_fingerprints(self.root, self.spec), hashes)
        found = {("texts", keys.text("")): "-"}
        for entry in map(keys.entry, placed):
            for kind, key in (("latents", entry.latents), ("images", entry.image), ("texts", entry.text)):
                if key:
                    found[kind, key] = entry.prompt[-1]
        return found


Change = Callable[[World], World]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The clips, three seconds each."""
    folder = tmp_path_factory.mktemp("clips")
    for index, (name, height) in enumerate((("a", 32), ("b", 48), ("c", 32))):
        draw(folder / f"{name}.mp4", index, height)
    return folder


@pytest.fixture
def world(made: Path, tiny_root: Callable[[str], Path], tmp_path: Path) -> World:
    """Of tiny-i2v; what is in its folders is the test's own."""
    folder, root = tmp_path / "data", tmp_path / "model"
    shutil.copytree(made, folder)
    shutil.copytree(tiny_root("tiny-i2v"), root, ignore=shutil.ignore_patterns("transformer"))
    return World(folder, root, variant("tiny-i2v").spec)


def draw(path: Path, index: int, height: int = 32) -> None:
    frames = np.roll(clips.levels(48, 32, height), index, axis=0)
    frames[:, : height // 2, :16] = 40 * index
    clips.write(path, frames, fps=16)


def redrawn(name: str) -> Change:
    def change(world: World) -> World:
        draw(world.folder / f"{name}.mp4", 5, 48 if name == "b" else 32)
        return world

    return change


def other_weights(component: str) -> Change:
    """One value of the first tensor is another."""

    def change(world: World) -> World:
        (path,) = (world.root / component).glob("*.safetensors")
        tensors = load_file(path)
        next(iter(tensors.values())).view(-1)[0] += 1
        save_file(tensors, path, {"format": "pt"})
        return world

    return change


def other_json(file: str, **values: Any) -> Change:
    def change(world: World) -> World:
        path = world.root / file
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
        return world

    return change


def in_bf16(world: World) -> World:
    """The text encoder's files are, and so is what it computes."""
    folder = world.root / "text_encoder"
    UMT5EncoderModel.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    return world


def renamed(name: str) -> Change:
    def change(world: World) -> World:
        (world.folder / "inner").mkdir(exist_ok=True)
        (world.folder / f"{name}.mp4").rename(world.folder / "inner" / f"other-{name}.mp4")
        return world.row(name, video=f"inner/other-{name}.mp4")

    return change


def held_out(name: str) -> Change:
    """The row is in a source of the validation's own."""

    def change(world: World) -> World:
        rest = {key: row for key, row in world.rows.items() if key != name}
        held = replace(world, rows=rest, held={name: world.rows[name]})
        return held.data(validation=str(world.folder / "held.csv"))

    return change


def of_model(name: str, **values: Any) -> Change:
    return lambda world: replace(world, spec=replace(variant(name).spec, **values))


WINDOWS = {"latents": "abc", "images": "abc"}
RELEVANT: dict[str, tuple[Change, Concerned]] = {
    "another caption": (lambda world: world.row("a", prompt="another a"), {"texts": "a"}),
    "another caption where the window is drawn": (lambda world: world.row("b", prompt="another b"), {"texts": "b"}),
    "another clip": (redrawn("a"), {"latents": "a", "images": "a"}),
    "another clip that stands upright": (redrawn("b"), {"latents": "b", "images": "b"}),
    "another start": (lambda world: world.row("a", start=0.5), {"latents": "a", "images": "a"}),
    "a start where it was drawn": (lambda world: world.row("b", start=0), {"latents": "b", "images": "b"}),
    "too few frames for the bucket": (lambda world: world.row("c", frames=6), {"latents": "c", "images": "c"}),
    "frames of a higher rate": (lambda world: world.row("c", fps=24), {"latents": "c", "images": "c"}),
    "data.num_frames": (lambda world: world.data(num_frames=5), WINDOWS),
    "another stage": (lambda world: world.data(frames_schedule=((0, 5), (1, 9))), WINDOWS),
    "data.size": (lambda world: world.data(size=(64, 32)), WINDOWS),
    "data.size upright, as one of the clips is already": (
        lambda world: world.data(size=(32, 48)),
        {"latents": "ac", "images": "ac"},
    ),
    "training.seed, of the window that is drawn": (
        lambda world: world.section("training", seed=1),
        {"latents": "b", "images": "b"},
    ),
    "the VAE's weights": (other_weights("vae"), {"latents": "abc"}),
    "the VAE's config": (other_json("vae/config.json", latents_mean=[0.5] * 16), {"latents": "abc"}),
    "the text encoder's weights": (other_weights("text_encoder"), {"texts": "-abc"}),
    "the text encoder's type": (in_bf16, {"texts": "-abc"}),
    "the tokenizer": (other_json("tokenizer/tokenizer_config.json", model_max_length=256), {"texts": "-abc"}),
    "the image encoder's weights": (other_weights("image_encoder"), {"images": "abc"}),
    "the image processor": (
        other_json("image_processor/preprocessor_config.json", image_mean=[0.5, 0.5, 0.5]),
        {"images": "abc"},
    ),
    "a model without images": (of_model("tiny-t2v"), {"latents": "abc"}),
    "a model that is given the last frame too": (of_model("tiny-flf2v"), WINDOWS),
    "a model's rate": (of_model("tiny-i2v", fps=24), WINDOWS),
    "a row more of a clip whose window is drawn, then by the captions too": (
        lambda world: world.row("d", video="b.mp4", prompt="clip d"),
        {"latents": "bd", "images": "bd", "texts": "d"},
    ),
    "a row more": (lambda world: world.row("d", video="c.mp4", prompt="clip d", start=1), dict.fromkeys(KINDS, "d")),
}
IRRELEVANT: dict[str, Change] = {
    "lora.rank": lambda world: world.section("lora", rank=4),
    "no lora": lambda world: replace(world, sections=world.sections | {"lora": None}),
    "learning rate, batch, precision": lambda world: world.section(
        "training", learning_rate=0.5, global_batch_size=4, precision="bf16", shift=5.0, ema=0.5, steps=9
    ),
    "the run's name": lambda world: world.section("output", run="elsewhere", save_every=7, keep=1),
    "memory strategy": lambda world: world.section("memory", gradient_checkpointing="none", block_swap=1),
    "budget": lambda world: world.section("memory", budget="1GiB"),
    "engine": lambda world: world.section("parallel", strategy="ddp"),
    "model.dtype": lambda world: world.section("model", path=str(world.root), name=world.spec.name, dtype="bf16"),
    "caption dropout": lambda world: world.data(caption_dropout=0.5),
    "share held out": lambda world: world.data(validation=0.5),
    "a clip of a source that is held out": held_out("a"),
    "a clip with a drawn window that is held out": held_out("b"),
    "samples": lambda world: world.section("validation", every=3, sample_steps=5),
    "a clip's name and folder": renamed("a"),
    "name and folder of a clip whose window is drawn": renamed("b"),
    "the order of rows": lambda world: replace(world, rows=dict(reversed(world.rows.items()))),
    "frames and rate that lead to the same bucket": lambda world: world.row("c", frames=20, fps=32),
    "the same row twice": lambda world: world.row("again", **ROWS["a"]),
    "the same row twice where the window is drawn": lambda world: world.row("again", **ROWS["b"]),
    "a row less": lambda world: replace(world, rows={name: ROWS[name] for name in "ab"}),
    "stages of the same frames": lambda world: world.data(frames_schedule=((0, 9), (4, 9))),
}


def encoded_again(before: World, change: Change) -> Concerned:
    """By kind the names of the clips of which there are entries after the change that were not there before."""
    known = before.entries()
    new = [(kind, name) for (kind, key), name in change(before).entries().items() if (kind, key) not in known]
    return {kind: "".join(sorted(name for each, name in new if each == kind)) for kind, _ in new}


@pytest.mark.parametrize("name", RELEVANT)
def test_what_matters_encodes_the_entries_that_it_concerns_and_no_others(world: World, name: str) -> None:
    change, concerned = RELEVANT[name]
    assert encoded_again(world, change) == concerned


@pytest.mark.parametrize("name", IRRELEVANT)
def test_what_does_not_matter_encodes_nothing(world: World, name: str) -> None:
    assert encoded_again(world, IRRELEVANT[name]) == {}


def test_stills_are_known_by_their_content(world: World) -> None:
    def draw_still(still: World, red: int = 90) -> World:
        Image.new("RGB", (48, 32), (red, 0, 0)).save(still.folder / "d.png")
        return still.row("d", video="d.png", prompt="still d")

    without = replace(world, spec=variant("tiny-t2v").spec)
    assert encoded_again(without, draw_still) == {"latents": "d", "texts": "d"}
    assert encoded_again(draw_still(without), lambda still: draw_still(still, 91)) == {"latents": "d"}
    assert encoded_again(draw_still(without), lambda still: still.section("training", seed=1)) == {"latents": "b"}


def test_what_is_encoded_is_what_has_a_new_key(world: World) -> None:
    changes = [RELEVANT[name][0] for name in ("another caption", "another clip", "a row more", "the image processor")]
    changes += [IRRELEVANT[name] for name in ("a clip's name and folder", "the order of rows", "model.dtype")]
    changes += [RELEVANT["another caption where the window is drawn"][0], renamed("b")]
    before: dict[Path, int] = {}
    for change in (lambda same: same, *changes, lambda same: same):
        world = change(world)
        scene, config = world.scene()
        scene.prepare(config)
        found = {path.relative_to(scene.cache): path.stat().st_ino for path in scene.cache.glob("*/*.safetensors")}
        expected = {Path(kind, f"{key}.safetensors") for kind, key in world.entries()}
        assert found.keys() == before.keys() | expected
        assert before.items() <= found.items(), "what was there is not written again"
        before = found
