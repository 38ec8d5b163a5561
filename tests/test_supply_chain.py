"""The lock files: every pin with hashes, every distribution that is installed, and what builds need beforehand."""

import importlib
import re
from collections.abc import Iterator
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

ROOT = Path(__file__).parents[1]
LOCKS = sorted(ROOT.glob("requirements*.lock"))


class Stated:
    """A distribution of which only the metadata and the files are known."""

    def __init__(self, fields: dict[str, str], files: list[str] | None = None) -> None:
        self.metadata = Message()
        for name, value in fields.items():
            self.metadata[name] = value
        self.files = [Path(file) for file in files or []]


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    """Imports a script by name, as where it runs: beside its neighbours."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts")
        yield importlib.import_module


@pytest.fixture(scope="module")
def locked(script: Any) -> dict[str, Any]:
    """The pins of requirements.lock by name."""
    make_lock = script("make_lock")
    pins: dict[str, Any] = make_lock.parsed(make_lock.LOCK.read_text(encoding="utf-8"))
    return pins


def test_every_pin_is_locked_in_its_version_with_hashes(script: Any, locked: dict[str, Any]) -> None:
    pins = script("make_lock").constraints((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    assert len(pins) > 80
    assert {name: locked[name].version for name in pins if name in locked} == pins
    assert all(locked[name].hashes for name in pins)


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.name)
def test_no_line_of_a_lock_is_without_a_hash(path: Path, script: Any) -> None:
    text = path.read_text(encoding="utf-8").replace(" \\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    pinned = re.compile(r"[\w.-]+==[\w.+]+( ; [^#\\]+?)?( +--hash=sha256:[0-9a-f]{64})+")
    assert lines
    assert [line[:60] for line in lines if not pinned.fullmatch(line)] == []
    assert len(script("make_lock").parsed(path.read_text(encoding="utf-8"))) == len(lines)


def test_every_distribution_that_the_tests_use_is_locked(script: Any, locked: dict[str, Any]) -> None:
    make_lock, distributions = script("make_lock"), script("distributions")
    cuda = make_lock.parsed(make_lock.CUDA_LOCK.read_text(encoding="utf-8"))
    used = distributions.closure(distributions.required(make_lock.EXTRAS))
    assert {"torch", "numpy", "pytest", "certifi"} < set(used)
    assert set(used) - set(locked) - set(cuda) == set()


def test_what_is_locked_is_what_is_installed(script: Any, locked: dict[str, Any]) -> None:
    make_lock, distributions = script("make_lock"), script("distributions")
    used = distributions.closure(distributions.required(make_lock.EXTRAS))
    different = {name: found.version for name, found in used.items() if name in locked}
    different = {
        name: version for name, version in different.items() if Version(version).public != locked[name].version
    }
    # a build requirement is not pinned by constraints.txt, and may be newer where the lock was not installed
    assert set(different) <= {"setuptools"}, different


def test_what_builds_need_and_the_torch_for_cpus_are_parts_of_the_lock(script: Any, locked: dict[str, Any]) -> None:
    make_lock = script("make_lock")
    build, cpu = (
        make_lock.parsed(path.read_text(encoding="utf-8")) for path in (make_lock.BUILD_LOCK, make_lock.CPU_LOCK)
    )
    assert set(make_lock.BUILD) < set(build)
    assert {name: locked[name] for name in build} == build
    assert Version(cpu["torch"].version).public == locked["torch"].version
    assert cpu["torch"].hashes < locked["torch"].hashes


def test_the_lock_says_the_version_of_every_distribution_alike(script: Any) -> None:
    make_lock = script("make_lock")
    versions: dict[str, set[str]] = {}
    for path in LOCKS:
        for name, pin in make_lock.parsed(path.read_text(encoding="utf-8")).items():
            versions.setdefault(name, set()).add(Version(pin.version).public)
    assert {name: found for name, found in versions.items() if len(found) > 1} == {}


@pytest.mark.parametrize(
    ("fields", "licence"),
    [
        ({"License-Expression": "Apache-2.0 OR BSD-2-Clause", "License": "other"}, "Apache-2.0 OR BSD-2-Clause"),
        ({"Classifier": "License :: OSI Approved :: Mozilla Public License 2.0 (MPL 2.0)"}, "MPL-2.0"),
        ({"Classifier": "License :: OSI Approved :: Apache Software License", "License": "x" * 999}, "Apache-2.0"),
        ({"Classifier": "Programming Language :: Python", "License": "3-Clause BSD License"}, "BSD-3-Clause"),
        ({"License": "MIT License"}, "MIT"),
        ({"License": "Ours, all rights reserved"}, "Ours, all rights reserved"),
        ({}, ""),
    ],
)
def test_a_licence_is_read_from_the_most_precise_field(script: Any, fields: dict[str, str], licence: str) -> None:
    assert script("check_licences").stated(Stated(fields)) == licence


@pytest.mark.parametrize(
    ("expression", "permissive"),
    [
        ("MIT", True),
        ("MIT OR GPL-3.0-only", True),
        ("BSD-3-Clause AND (MIT OR GPL-2.0-only)", True),
        ("MIT AND GPL-3.0-only", False),
        ("MPL-2.0", False),
        ("LGPL-2.1-or-later", False),
        ("", False),
    ],
)
def test_a_choice_needs_one_permissive_licence_and_a_sum_needs_all(
    script: Any, expression: str, permissive: bool
) -> None:
    assert script("check_licences").is_permissive(expression) is permissive


@pytest.mark.parametrize(
    ("name", "fields", "files", "runs", "complaint"),
    [
        ("numpy", {"License": "BSD"}, [], True, ""),
        ("newcomer", {"License-Expression": "AGPL-3.0-only"}, [], True, "newcomer: AGPL-3.0-only is not among"),
        ("newcomer", {}, [], True, "newcomer: no licence stated"),
        ("certifi", {"License": "MPL-2.0"}, [], True, ""),
        ("certifi", {"License": "GPL"}, [], True, "certifi: GPL is not among"),
        ("hypothesis", {"License-Expression": "MPL-2.0"}, [], False, ""),
        ("hypothesis", {"License-Expression": "MPL-2.0"}, [], True, "hypothesis: MPL-2.0 is accepted of a tool only"),
        ("av", {"License": "BSD"}, ["av.libs/libx264-d6533a8d.so.165", "av.libs/libavcodec.62.dylib"], True, ""),
        (
            "pillow",
            {"License": "MIT"},
            ["pillow.libs/libx265-f5385bb8.so.216"],
            True,
            "pillow: its wheel carries libx265",
        ),
        ("nvidia-cublas", {"License": "NVIDIA Proprietary Software"}, [], True, ""),
        ("nvidia-ml-py", {"License": "NVIDIA Proprietary Software"}, [], True, "nvidia-ml-py: NVIDIA Proprietary"),
    ],
)
def test_what_is_refused_is_named(
    script: Any, name: str, fields: dict[str, str], files: list[str], runs: bool, complaint: str
) -> None:
    found = script("check_licences").complaints(name, Stated(fields, files), runs)
    assert len(found) == bool(complaint)
    assert "".join(found).startswith(complaint)


def test_every_exception_says_why(script: Any) -> None:
    licences = script("check_licences")
    reasons = [each.reason for each in licences.ACCEPTED.values()] + [why for _, why in licences.CARRIED.values()]
    assert reasons
    assert min(map(len, reasons)) > 40


def test_no_installed_distribution_is_refused(script: Any) -> None:
    distributions, licences = script("distributions"), script("check_licences")
    extras = distributions.installed_extras()
    everything = distributions.closure(distributions.required(extras))
    runtime = set(distributions.closure(distributions.required([name for name in extras if name != "dev"])))
    found = [line for name in everything for line in licences.complaints(name, everything[name], name in runtime)]
    assert {"torch", "av"} <= runtime
    assert "pytest" not in runtime
    assert found == []
