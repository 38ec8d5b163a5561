"""Real clips for the demo: Big Buck Bunny, which the source distribution of moviepy carries, or drawn ones without it.

Big Buck Bunny (c) 2008 Blender Foundation, www.bigbuckbunny.org, CC-BY 3.0.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from longtake import files
from longtake.data.video import write_clip

PACKAGE = "moviepy==2.2.1"
SHA256 = "c80cb56815ece94e5e3e2d361aa40070eeb30a09d23a24c4e684d03e16deacb1"
"""Of its source archive: pip checks it before it runs the build script in it, which it does to learn its name."""
ARCHIVE = "moviepy_10_minutes.zip"
FILM = "bbb.mp4"
CREDIT = "Big Buck Bunny (c) 2008 Blender Foundation, www.bigbuckbunny.org, CC-BY 3.0"
SECONDS = 180


def shots() -> list[dict[str, Any]]:
    """The captioned windows of the film: video, start (seconds), frames, fps, caption."""
    text = (Path(__file__).parent / "shots.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def film(say: Callable[[str], None]) -> Path | None:
    """The film as a file of the user's cache, downloaded at the first call; None where that is not possible."""
    path = cache_folder() / FILM
    if path.is_file():
        return path
    say(f"downloading {PACKAGE} (58 MB) from the package index: it carries the film. {CREDIT}")
    with tempfile.TemporaryDirectory() as scratch:
        archive = _download(Path(scratch), say)
        if archive is None:
            return None
        files.write_file(path, lambda staged: _extract(archive, staged))
    return path


def draw_clips(folder: Path) -> list[dict[str, Any]]:
    """Writes clips of a coloured disc that crosses a gradient, and returns their rows, as `shots` has them."""
    rows = []
    for name, colour in {"red": (220, 40, 40), "blue": (40, 60, 220)}.items():
        for direction in (1, -1):
            path = folder / f"drawn-{name}-{'right' if direction > 0 else 'left'}.mp4"
            files.write_file(path, lambda staged, c=colour, d=direction: write_clip(_disc(c, d), staged, 16))  # type: ignore[misc]
            caption = f"A {name} disc moves to the {'right' if direction > 0 else 'left'}."
            rows.append({"video": path.name, "start": 0.0, "frames": 81, "fps": 16, "caption": caption})
    return rows


def cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "longtake" / "films"


def _disc(colour: tuple[int, int, int], direction: int) -> torch.Tensor:
    """uint8 [81, 3, 128, 224]."""
    rows, columns = torch.meshgrid(torch.arange(128), torch.arange(224), indexing="ij")
    background = torch.stack([rows, columns // 2, 160 - rows]).float()
    frames = []
    for index in range(81):
        centre = 112 + direction * (index - 40) * 2.2
        inside = (rows - 64) ** 2 + (columns - centre) ** 2 < 28**2
        frames.append(torch.where(inside, torch.tensor(colour).view(3, 1, 1).float(), background))
    return torch.stack(frames).clamp(0, 255).to(torch.uint8)


def _download(folder: Path, say: Callable[[str], None]) -> Path | None:
    wanted = folder / "wanted.txt"
    wanted.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--require-hashes", "--no-deps"]
    command = [*pip, "--no-binary", "moviepy", "-d", str(folder), "-r", str(wanted)]
    try:
        finished = subprocess.run(
            command, capture_output=True, text=True, timeout=SECONDS, check=False, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        say(f"the package index did not answer within {SECONDS} s")
        return None
    found = sorted(folder.glob("moviepy-*.tar.gz"))
    if finished.returncode or not found:
        reason = (finished.stderr.strip().splitlines() or ["no reason given"])[-1]
        say(f"the film cannot be downloaded ({reason})")
        return None
    return found[0]


def _extract(archive: Path, out: Path) -> None:
    """The film out of the zip inside the tar, without unpacking either as a whole."""
    with tarfile.open(archive) as tar, tempfile.TemporaryFile() as inner:
        member = next(item for item in tar.getmembers() if item.name.endswith(ARCHIVE))
        packed = tar.extractfile(member)
        assert packed is not None
        shutil.copyfileobj(packed, inner)
        with zipfile.ZipFile(inner) as zipped:
            name = next(item for item in zipped.namelist() if item.endswith(FILM))
            with zipped.open(name) as source, out.open("wb") as target:
                shutil.copyfileobj(source, target)
