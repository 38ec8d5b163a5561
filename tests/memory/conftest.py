"""Tiny transformers and places for bytes, for the tests of memory."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from honest_ring import MakeTier
from longtake.memory.host_buffers import HostTier, disk_tier
from tiny_steps import Load, Loaded, loaded_once, loader


@pytest.fixture(scope="module")
def load(tiny_root: Callable[[str], Path]) -> Load:
    """`load(name, lora)` is a tiny transformer to train: whole, or through a LoRA that is not the identity."""
    return loader(tiny_root)


@pytest.fixture(scope="module")
def loaded(tiny_root: Callable[[str], Path]) -> Loaded:
    """The same by the settings of the LoRA, None for the whole model."""
    return loaded_once(tiny_root)


@pytest.fixture(params=["host", "disk"])
def tier_of(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MakeTier]:
    """Makes a tier for an engine."""
    with disk_tier(tmp_path / "scratch", "test") as disk:
        yield HostTier if request.param == "host" else lambda copies: disk
