"""Writes requirements.lock and its neighbours: each pin with the sha256 of every file that PyPI has of it.

pip install uv==0.13.9 && python scripts/make_lock.py      # seconds; nothing but metadata is downloaded

The versions are those of constraints.txt, and where it has none those that are installed. uv resolves them for all
platforms at once, which pip cannot, and so finds what only a machine with CUDA needs.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from distributions import ROOT, closure, normal, required
from packaging.version import Version

LOCK, BUILD_LOCK, CPU_LOCK, CUDA_LOCK = (ROOT / f"requirements{end}.lock" for end in ("", "-build", "-cpu", "-cuda"))
EXTRAS = ("dev", "deepspeed", "quantization")
"""Extras that the lock covers: wandb and modelscope are not, since no test runs them."""
BUILD = ("hatchling", "editables", "setuptools")
"""What `pip install --no-build-isolation` needs beforehand: for this project, an editable one, and for DeepSpeed."""
CPU_WHEELS = {
    "torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl": (
        "6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b"
    ),
}
"""Torch for CPUs, which PyPI does not have for Linux: the wheel that the tests were run with."""

_PLATFORMS = [f"sys_platform == '{name}' and python_version < '3.15'" for name in ("linux", "darwin")]
_SETTINGS = f"[tool.uv]\nenvironments = {_PLATFORMS}\n"
_REQUIREMENT = re.compile(r"^([\w.-]+)==(\S+)(.*?)((?: *\\\n +--hash=sha256:[0-9a-f]{64})+)$", re.MULTILINE)
_HASH = re.compile(r"sha256:([0-9a-f]{64})")

_HEAD = """\
# {title}
# Written by scripts/make_lock.py: do not edit. The hashes are those of all files that PyPI has of a version.
{text}
"""
_TEXT = """\
# What the tests are run with: the extras dev, deepspeed and quantization, and what builds the project.
#     pip install --require-hashes -r requirements-cpu.lock -r requirements.lock     # Linux, as the tests are run
#     pip install --require-hashes -r requirements-cuda.lock -r requirements.lock    # Linux, torch with CUDA
#     pip install --require-hashes -r requirements.lock                              # macOS
#     pip install --no-deps --no-build-isolation -e .
# DeepSpeed has no wheel: its source is hashed, and what builds it is too in requirements-build.lock (`make locked`)."""
_BUILD_TEXT = """\
# The part of requirements.lock that has to be installed first where builds are not isolated (`make locked`): what pip
# downloads for an isolated build is not hashed."""
_CPU_TEXT = """\
# Before requirements.lock: the torch without CUDA, from wherever pip finds it (`--find-links`, or PyTorch's own index).
# Listed is the wheel that the tests were run with. Other Pythons' and machines' wheels are refused: their hashes are
# not known here. A file of its own, since pip prefers the torch of an index that states its hash.
# {names}"""
_CUDA_TEXT = """\
# With requirements.lock: what torch from PyPI needs on Linux, CUDA's libraries and Triton. Resolved from metadata;
# the tests are not run with them."""


@dataclass
class Pin:
    """A distribution's version, on which platforms it is needed (`; marker`, empty for all), its files' hashes."""

    version: str
    marker: str
    hashes: set[str]

    def text(self, name: str) -> str:
        """As pip reads it."""
        head = f"{name}=={self.version}{f' {self.marker}' if self.marker else ''}"
        return " \\\n".join([head, *(f"    --hash=sha256:{digest}" for digest in sorted(self.hashes))]) + "\n"


def main() -> None:
    """Writes the four files; ends with a message where pins and what is installed differ."""
    pins = chosen(constraints((ROOT / "constraints.txt").read_text(encoding="utf-8")))
    wanted = [str(requirement) for requirement in required(EXTRAS)]
    locked = resolved([*wanted, *pins, *BUILD], pins)
    if unmatched := [file for file in CPU_WHEELS if not file.startswith(f"torch-{locked['torch'].version}+cpu-")]:
        sys.exit(f"CPU_WHEELS has {unmatched[0]}, but torch is pinned to {locked['torch'].version}")
    locked["torch"].hashes |= set(CPU_WHEELS.values())
    build = resolved(BUILD, {name: pin.version for name, pin in locked.items()})
    cpu = {"torch": Pin(f"{locked['torch'].version}+cpu", "", set(CPU_WHEELS.values()))}
    cuda = {name: pin for name, pin in locked.items() if is_cuda(name)}
    write(LOCK, "All distributions, hashed", _TEXT, without(locked, cuda))
    write(BUILD_LOCK, "What builds are made with, hashed", _BUILD_TEXT, build)
    write(CPU_LOCK, "Torch for CPUs, hashed", _CPU_TEXT.format(names="\n# ".join(CPU_WHEELS)), cpu)
    write(CUDA_LOCK, "CUDA for torch, hashed", _CUDA_TEXT, cuda)


def constraints(text: str) -> dict[str, str]:
    """Name and version of each pin in the text of constraints.txt."""
    lines = (line.strip() for line in text.splitlines())
    split = (line.partition("==") for line in lines if line and not line.startswith("#"))
    return {normal(name): version for name, _, version in split}


def chosen(pins: Mapping[str, str]) -> dict[str, str]:
    """`pins`, and what is installed where they have nothing; ends the script where they say otherwise."""
    here = {name: Version(found.version).public for name, found in closure(required(EXTRAS)).items()}
    if different := [name for name, version in here.items() if pins.get(name, version) != version]:
        sys.exit(f"installed are other versions than constraints.txt has: {', '.join(different)}")
    return {**{name: version for name, version in here.items() if not is_cuda(name)}, **pins}


def is_cuda(name: str) -> bool:
    """Whether only torch's build with CUDA needs the distribution; NVML's module is everyone's."""
    return name == "triton" or (name.startswith(("nvidia-", "cuda-")) and name != "nvidia-ml-py")


def resolved(wanted: Iterable[str], pins: Mapping[str, str]) -> dict[str, Pin]:
    """What uv finds that `wanted` needs on any platform under `pins`, with hashes."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "wanted.in").write_text("\n".join(wanted) + "\n", encoding="utf-8")
        (folder / "pins.txt").write_text("".join(f"{name}=={pins[name]}\n" for name in pins), encoding="utf-8")
        (folder / "pyproject.toml").write_text(_SETTINGS, encoding="utf-8")
        command = [
            *("uv", "pip", "compile", "wanted.in", "--constraints", "pins.txt", "--output-file", "out", "--quiet"),
            *("--universal", "--python-version", "3.11", "--generate-hashes", "--no-annotate", "--no-header"),
        ]
        # DeepSpeed's metadata is found out by its own script, which would look for compilers
        subprocess.run(command, check=True, cwd=folder, env={**os.environ, "DS_BUILD_OPS": "0"})
        found = parsed((folder / "out").read_text(encoding="utf-8"))
    everywhere = found["setuptools"].marker  # _PLATFORMS in uv's words: without it pip would install nothing elsewhere
    for pin in found.values():
        pin.marker = pin.marker if pin.marker != everywhere else ""
    if missed := [name for name, pin in found.items() if pins.get(name, pin.version) != pin.version]:
        sys.exit(f"uv did not keep the pins of {', '.join(missed)}")
    return found


def parsed(text: str) -> dict[str, Pin]:
    """The pins of a lock's text by name."""
    return {
        normal(name): Pin(version, marker.strip(), set(_HASH.findall(hashes)))
        for name, version, marker, hashes in _REQUIREMENT.findall(text)
    }


def without(locked: Mapping[str, Pin], others: Mapping[str, Pin]) -> dict[str, Pin]:
    """Those of `locked` that are not among `others`."""
    return {name: pin for name, pin in locked.items() if name not in others}


def write(path: Path, title: str, text: str, locked: Mapping[str, Pin]) -> None:
    """One lock file, in the order of names."""
    body = "".join(locked[name].text(name) for name in sorted(locked))
    path.write_text(_HEAD.format(title=title, text=text) + body, encoding="utf-8")
    print(f"{path.name}: {len(locked)} distributions, {sum(len(pin.hashes) for pin in locked.values())} files")


if __name__ == "__main__":
    main()
