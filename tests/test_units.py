"""Bytes and seconds in and out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longtake.errors import ConfigError
from longtake.units import format_bytes, format_seconds, parse_bytes


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("24GiB", 24 * 2**30),
        (" 24 gib ", 24 * 2**30),
        ("80GB", 80 * 10**9),
        ("1.5TiB", 3 * 2**39),
        ("512MiB", 512 * 2**20),
        ("3 KB", 3000),
        ("7kib", 7168),
        ("10B", 10),
        ("0B", 0),
        ("0.1GB", 10**8),
        ("999999999999999999TiB", 999999999999999999 * 2**40),
    ],
)
def test_a_number_with_a_unit_is_exact_bytes(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    "text", ["", "24", "GiB", "-1GiB", "1e3MB", "24 G", "a lot", "1,5GiB", "inf", "9" * 400 + "GiB"]
)
def test_anything_else_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_bytes(text, "memory.budget")
    (problem,) = caught.value.problems
    assert problem.where == "memory.budget"
    assert problem.remedy == "write a number with a unit, for example 24GiB"


@pytest.mark.parametrize("text", ["1\u212aB", "\u0661GiB", "1\u00a0\u212aiB"])
def test_letters_and_digits_of_other_scripts_are_no_units(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_bytes(text)


@given(count=st.integers(0, 2**60))
def test_plain_bytes_come_back(count: int) -> None:
    assert parse_bytes(f"{count}B") == count


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (2**20 - 1, "1.0 MiB"),
        (24 * 2**30, "24.0 GiB"),
        (3 * 2**39, "1.5 TiB"),
        (5000 * 2**40, "5000.0 TiB"),
        (-1536, "-1.5 KiB"),
    ],
)
def test_bytes_are_shown_in_the_largest_unit_that_leaves_one(count: int, text: str) -> None:
    assert format_bytes(count) == text


@given(count=st.integers(1, 2**49))
def test_what_is_shown_is_within_the_rounding_of_its_last_digit(count: int) -> None:
    shown = format_bytes(count)
    unit = parse_bytes(f"1{shown.split()[1]}")
    assert abs(parse_bytes(shown) - count) <= 0.05 * unit + 1


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (65, "1:05"), (3725, "1:02:05"), (90000, "25:00:00")]
)
def test_seconds_are_shown_as_a_clock(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
