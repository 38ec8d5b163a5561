"""Ranks that share a clip: the exchange of tokens for heads is exact, loss and gradients are those of one process."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launched import launched
from tiny_steps import MODELS

SCRIPT = Path(__file__).with_name("sequence_ranks.py")
Said = list[dict[str, Any]]


@pytest.fixture(scope="module")
def said(tiny_root: Callable[[str], Path]) -> Said:
    """What ranks found, in one launch for all tests."""
    ended = launched(3, SCRIPT, *map(tiny_root, MODELS), seconds=600)
    assert ended.returncode == 0, ended.stderr[-8000:]
    return [json.loads(line) for line in ended.stdout.splitlines()]


@pytest.mark.long
@pytest.mark.timeout(700)
def test_the_exchange_is_exact_and_its_own_inverse_where_tokens_and_heads_do_not_come_out_even(said: Said) -> None:
    found = [each for each in said if each["tried"].endswith("tokens")]
    assert [(each["ranks"], each["tried"]) for each in found] == [
        (ranks, tried)
        for ranks in (2, 3)
        for tried in ("5 heads, 45 tokens", "5 heads, 46 tokens", "3 heads, 4 tokens", "4 heads, 35 tokens")
    ]
    for each in found:
        assert each["same"] == [1, 1, 1], each


@pytest.mark.long
@pytest.mark.timeout(700)
def test_loss_and_summed_gradients_are_those_of_one_process_for_every_model_under_every_strategy(said: Said) -> None:
    found = [each for each in said if "gradient" in each]
    assert [each["ranks"] for each in found] == [2] * len(MODELS) * 2 * 5 + [3] * 2 * 5
    assert [each for each in found if not (each["loss"] <= 2e-6 and each["gradient"] <= 1e-5)] == []


@pytest.mark.long
@pytest.mark.timeout(700)
def test_a_model_is_left_as_it_was_to_the_bit(said: Said) -> None:
    found = [each for each in said if each["tried"].endswith("left again")]
    assert [each["same"] for each in found] == [True] * (len(MODELS) + 1) * 2
