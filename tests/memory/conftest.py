"""Tiny transformers for the tests of memory."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tiny_steps import Load, loader


@pytest.fixture(scope="module")
def load(tiny_root: Callable[[str], Path]) -> Load:
    """`load(name, lora)` is a tiny transformer to train: whole, or through a LoRA that is not the identity."""
    return loader(tiny_root)
