"""A dataset with something of everything, and what the doctor says of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import clips
from command_line import small_run, write_config
from longtake.config.load import load_config
from longtake.config.schema import RunConfig
from runs import draw_clip

HOSTILE_NAME = "<img src=x onerror=alert(1)>\n\x1b[31m&.mp4"
HOSTILE_CAPTION = "</p><script>alert('🎈')</script>\n\x1b]0;title\x07 & \"quoted\""
STAGES = {"num_frames": 17, "size": [64, 32], "frames_schedule": [[0, 5], [1, 17]], "validation": 0.2}


@pytest.fixture(scope="session")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve sound clips; one turned, one wide and slow, one too short, one damaged, a copy, a still, hostile words."""
    folder = tmp_path_factory.mktemp("mixed") / "clips"
    folder.mkdir()
    for index in range(12):
        draw_clip(folder / f"{index}.mp4", index)
    clips.write(folder / "turned.mp4", clips.quadrants(24), fps=16, degrees=90)
    clips.write(folder / "wide.mp4", clips.quadrants(24, 200, 48), fps=8)
    draw_clip(folder / "short.mp4", 3, frames=3)
    (folder / "copy.mp4").write_bytes((folder / "1.mp4").read_bytes())
    (folder / "damaged.mp4").write_bytes(b"no video" * 50)
    Image.new("RGB", (80, 60), (200, 30, 30)).save(folder / "still.png")
    clips.write(folder / HOSTILE_NAME, clips.quadrants(24), fps=16)
    captions = {"turned": "turned", "wide": "long " * 200, "copy": "clip 1", "damaged": "x", "still": "red"}
    captions[Path(HOSTILE_NAME).stem] = HOSTILE_CAPTION
    for stem, caption in captions.items():
        (folder / f"{stem}.txt").write_text(caption)
    return folder


@pytest.fixture
def config_file(tmp_path: Path, tiny_root: Callable[[str], Path]) -> Callable[..., Path]:
    """`config_file(source, **data)` is a config of the tiny text-to-video model over a source, with two stages."""

    def write(source: Path, **data: Any) -> Path:
        table = small_run(tiny_root("tiny-t2v"), source, tmp_path)
        changes = {"data": STAGES | data, "training": {"global_batch_size": 4, "steps": 2}}
        return write_config(tmp_path / "run.toml", table, changes)

    return write


@pytest.fixture
def config(config_file: Callable[..., Path], mixed: Path) -> RunConfig:
    """Over `mixed`."""
    return load_config(config_file(mixed), [])
