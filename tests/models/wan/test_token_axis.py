"""Where tokens enter a Wan transformer, a rank's own are cut out of what every token has."""

from typing import Any

import pytest
import torch
from torch import Tensor

from longtake.models.wan import token_axis
from longtake.models.wan.first_and_rest import FirstAndRest

OWN = slice(2, 5)


def own(tokens: int) -> slice:
    """Those of a clip of 12."""
    assert tokens == 12
    return OWN


def test_patches_and_rotary_tables_are_cut_to_ones_own_tokens() -> None:
    entries = token_axis.entries()
    patches, table = torch.randn(2, 4, 3, 2, 2), torch.randn(1, 12, 1, 8)
    cut = entries["patch_embedding"](patches, own)
    assert torch.equal(cut.flatten(2), patches.flatten(2)[:, :, OWN])
    assert all(torch.equal(each, table[:, OWN]) for each in entries["rope"]((table, table), own))


@pytest.mark.parametrize(
    ("embedded", "expected"),
    [
        (torch.arange(24.0).view(2, 12, 1), torch.arange(24.0).view(2, 12, 1)[:, OWN]),
        (torch.ones(2, 4), torch.ones(2, 4)),
    ],
    ids=["a row for each token", "one for all"],
)
def test_rows_of_tokens_are_cut_out_of_an_embedding_and_a_row_for_all_is_left(
    embedded: Tensor, expected: Tensor
) -> None:
    text = torch.randn(2, 12, 4)
    *cut, same, image = token_axis.entries()["condition_embedder"]((embedded, embedded, text, None), own)
    assert all(torch.equal(each, expected) for each in cut)
    assert (same is text, image) == (True, None)


@pytest.mark.parametrize(("first", "of_own"), [(1, 0), (2, 0), (4, 2), (5, 3), (12, 3)])
def test_of_two_timesteps_both_stay_with_the_number_of_ones_own_tokens_that_the_first_is_for(
    first: int, of_own: int
) -> None:
    rows = torch.randn(2, 2, 4)
    given: tuple[Any, ...] = (FirstAndRest(rows, first, 12), FirstAndRest(rows, first, 12), None, None)
    for cut in token_axis.entries()["condition_embedder"](given, own)[:2]:
        assert cut == FirstAndRest(rows, of_own, 3)
