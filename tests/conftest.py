"""What every test runs under: one thread, no hub, a fixed seed, checked types, and tiny random models made once."""

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from checked_types import CheckedFinder

# Before the first import of torch, and for every process that a test starts: sums in one order, no network.
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
os.environ |= {
    "DS_ACCELERATOR": "cpu",
    "GLOO_SOCKET_IFNAME": "lo",
    "TOKENIZERS_PARALLELISM": "false",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}

if os.environ.get("LONGTAKE_TYPECHECK", "1") == "1":
    sys.meta_path.insert(0, CheckedFinder())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with long tests first, so that no process waits for another's last file; no `gpu` tests without CUDA."""
    long = Counter(item.path for item in items if item.get_closest_marker("long"))
    items.sort(key=lambda item: -long[item.path])
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Each test starts from the same random state, whichever tests ran before it."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True)
def _leaves_no_process_group() -> Iterator[None]:
    """A group that a test leaves would be met by another test of the same worker."""
    yield
    if "torch" in sys.modules:
        group = sys.modules["torch"].distributed
        if group.is_available() and group.is_initialized():
            group.destroy_process_group()
            pytest.fail("the test left a process group behind")


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny_root("tiny-i2v")` is the diffusers folder of that tiny model with random weights, to be read only."""
    built: dict[str, Path] = {}

    def root(name: str) -> Path:
        from longtake.models.wan.tiny import build_tiny

        if name not in built:
            folder = tmp_path_factory.mktemp("models") / name
            build_tiny(name, folder, 0)
            built[name] = folder
        return built[name]

    return root
