"""Fails where a distribution that longtake needs has a licence that is not permissive and no reason is given here.

python scripts/check_licences.py          # of what is installed; `make check` runs it

Read is what a distribution says of itself: License-Expression, else its classifiers, else License. Wheels carry
libraries of which that says nothing, so that those with licences of the GPL's kind are looked for by name.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution
from pathlib import PurePath

from distributions import closure, installed_extras, required

PERMISSIVE = {
    *("0BSD", "Apache-2.0", "Apache-2.0 WITH LLVM-exception", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0"),
    *("AFL-2.1", "CNRI-Python", "ISC", "MIT", "MIT-0", "MIT-CMU", "PSF-2.0", "Python-2.0", "Unlicense", "Zlib"),
}
_WORDS = {
    "Apache-2.0": "apache|apache 2.0|apache license 2.0|apache software|apache software license 2.0",
    "BSD-3-Clause": "bsd|bsd 3-clause|3-clause bsd|bsd license",
    "BSD-2-Clause": "bsd 2-clause|2-clause bsd",
    "MIT": "mit",
    "ISC": "isc|isc license iscl",
    "AFL-2.1": "academic free license afl",
    "PSF-2.0": "python software foundation",
    "MPL-2.0": "mozilla public license 2.0 mpl 2.0",
}
_SPDX = {word: name for name, words in _WORDS.items() for word in words.split("|")}


@dataclass(frozen=True)
class Accepted:
    """A licence that is not permissive, or not stated, why it does no harm, and whether only where it is a tool."""

    licence: str
    reason: str
    only_dev: bool = False


_MPL = "the MPL asks for the source of its own files where they are changed or passed on; Longtake does neither"
ACCEPTED = {
    "certifi": Accepted("MPL-2.0", _MPL),
    "tqdm": Accepted("MPL-2.0 AND MIT", _MPL),
    "hypothesis": Accepted("MPL-2.0", _MPL, only_dev=True),
    "pathspec": Accepted("MPL-2.0", _MPL, only_dev=True),
    "torchao": Accepted("", "its metadata states none; the LICENSE file in its wheel is the BSD 3-clause text"),
}
_NVIDIA = re.compile(r"nvidia-.+|cuda-.+")
"""CUDA's libraries: proprietary, asked for by torch's build with CUDA, and not passed on by Longtake."""

_COPYLEFT = {
    "GPL-2.0-or-later": "x264 x265",
    "LGPL-2.1-or-later": "avcodec avdevice avfilter avformat avutil swresample swscale mp3lame asound",
    "LGPL-3.0-or-later": "gmp gnutls nettle hogweed unistring",
    "GPL-3.0-or-later WITH GCC-exception-3.1": "gfortran quadmath gomp",
}
_LIBRARIES = {library: licence for licence, names in _COPYLEFT.items() for library in names.split()}
_GCC = "the exception of GCC's runtime lets programs under any licence use it"
CARRIED = {
    "av": (
        {name for name, licence in _LIBRARIES.items() if "GCC" not in licence},
        "FFmpeg with x264 and x265 is GPL as a whole, and Longtake passes it on to nobody: SECURITY.md",
    ),
    "numpy": ({"gfortran", "quadmath"}, _GCC),
    "torch": ({"gomp"}, _GCC),
    "torchao": ({"gomp"}, _GCC),
}
"""Libraries of the GPL's kind that a wheel may carry, and why that does no harm."""


def main() -> None:
    """Prints a line for each distribution that may not be used as it is, and ends with status 1 where there is one."""
    extras = installed_extras()
    everything = closure(required(extras))
    runtime = set(closure(required(name for name in extras if name != "dev")))
    found = [line for name in everything for line in complaints(name, everything[name], name in runtime)]
    print(
        "\n".join(
            [*found, f"{len(everything)} licences read, {len(runtime)} of what runs use: {len(found)} to look at"]
        )
    )
    sys.exit(bool(found))


def complaints(name: str, distribution: Distribution, runs: bool) -> list[str]:
    """What is wrong with a distribution, which `runs` with longtake or is only a tool, a line each."""
    if _NVIDIA.fullmatch(name) and name != "nvidia-ml-py":
        return []
    licence, accepted = stated(distribution), ACCEPTED.get(name)
    found = []
    if accepted and accepted.licence == licence:
        if accepted.only_dev and runs:
            found.append(f"{name}: {licence} is accepted of a tool only, and runs need it")
    elif not is_permissive(licence):
        found.append(f"{name}: {licence or 'no licence stated'} is not among the permissive and accepted ones")
    carried, _ = CARRIED.get(name, (set(), ""))
    others = sorted(copyleft([path.name for path in distribution.files or ()]) - carried)
    return [*found, *(f"{name}: its wheel carries lib{library}, {_LIBRARIES[library]}" for library in others)]


def stated(distribution: Distribution) -> str:
    """The licence by its own metadata as an SPDX expression, or in its own words; empty where it says nothing."""
    metadata = distribution.metadata
    if expression := metadata.get("License-Expression"):
        return str(expression)
    last = [text.split(" :: ")[-1] for text in metadata.get_all("Classifier") or () if text.startswith("License ::")]
    if named := [text for text in last if text not in ("OSI Approved", "DFSG approved")]:
        return " AND ".join(dict.fromkeys(_spdx(text) for text in named))
    return _spdx(metadata.get("License") or "")


def is_permissive(expression: str) -> bool:
    """Whether all parts of an SPDX expression, or one of each choice, are permissive. Brackets make it stricter."""
    parts = re.sub(r"[()]", "", expression).split(" AND ")
    return all(any(choice.strip() in PERMISSIVE for choice in part.split(" OR ")) for part in parts)


def copyleft(names: Sequence[str]) -> set[str]:
    """The libraries of the GPL's kind among files, by name without `lib` and version."""
    matches = (re.match(r"(?:lib)?([A-Za-z]+\d{0,3})[-.].*?(?:so|dylib|dll)\b", PurePath(name).name) for name in names)
    return {match[1] for match in matches if match and match[1] in _LIBRARIES}


def _spdx(words: str) -> str:
    plain = re.sub(r"[\s(),]+", " ", words.lower()).strip()
    known: Mapping[str, str] = _SPDX
    return known.get(plain) or known.get(plain.removesuffix(" license").strip()) or words.strip()


if __name__ == "__main__":
    main()
