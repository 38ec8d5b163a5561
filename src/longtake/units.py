"""Bytes and seconds, in and out: `24GiB` to an int, an int to `24.0 GiB`."""

import re
from fractions import Fraction

from longtake.errors import ConfigError, Problem

_FACTORS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
_PATTERN = re.compile(r"\s*([0-9]{1,24}(?:\.[0-9]{1,24})?)\s*([KMGT]I?B|B)\s*", re.IGNORECASE | re.ASCII)


def parse_bytes(text: str, where: str = "") -> int:
    """The bytes that `24GiB`, `80 GB` or `512MiB` mean; raises ConfigError where no unit or number can be read."""
    match = _PATTERN.fullmatch(text)
    if match is None:
        raise ConfigError(
            Problem(
                f"cannot read {text!r} as a size",
                where,
                "write a number with a unit, for example 24GiB",
                code="bytes-unreadable",
            )
        )
    return int(Fraction(match[1]) * _FACTORS[match[2].upper()])


def format_bytes(count: float) -> str:
    """`count` bytes in the largest binary unit that leaves at least 1, one decimal."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        shown = f"{count:.0f}" if unit == "B" else f"{count:.1f}"
        if abs(float(shown)) < 1024:
            return f"{shown} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def format_seconds(seconds: float) -> str:
    """`3725` as `1:02:05`, `65` as `1:05`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
