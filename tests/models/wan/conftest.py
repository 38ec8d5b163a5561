"""An original release and a ComfyUI folder of the tiny I2V model, to be read only."""

from collections.abc import Callable
from pathlib import Path

import pytest

from releases import write_comfyui, write_release


@pytest.fixture(scope="session")
def release(tiny_root: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the release."""
    return write_release(tmp_path_factory.mktemp("release"), tiny_root("tiny-i2v"))


@pytest.fixture(scope="session")
def comfyui(tiny_root: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ComfyUI's folder `models`."""
    folder = tmp_path_factory.mktemp("ComfyUI") / "models"
    write_comfyui(folder, tiny_root("tiny-i2v"))
    return folder
