"""Peaks of a whole run, and of one stage of it; and the settings of the allocators whose bytes they are."""

import json
import os
import subprocess
import sys

import pytest


def said_by(code: str, variables: dict[str, str]) -> str:
    """What `code` prints in a process of its own, in which nothing has been allocated."""
    known = {name: value for name, value in os.environ.items() if "ALLOC" not in name}
    command = [sys.executable, "-c", f"import sys, psutil, torch; import longtake.memory_gauge as gauge\n{code}"]
    done = subprocess.run(command, env=known | variables, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout.strip()


STAGES = """
import json
LARGE, SMALL = 200 * 2**20, 50 * 2**20
of_run = gauge.MemoryGauge(torch.device("cpu"))
torch.ones(LARGE, dtype=torch.uint8)
before = of_run.read()
of_run.begin_stage()
torch.ones(SMALL, dtype=torch.uint8)
device, host = of_run.stage_peak()
after = of_run.read()
torch.ones(2 * LARGE, dtype=torch.uint8)
last = of_run.read()
print(json.dumps({
    "run": before.host_peak_bytes - before.host_bytes,
    "stage": host - before.host_bytes,
    "device": device - (host - of_run.before),
    "unchanged": (after.host_peak_bytes, after.device_peak_bytes) == (before.host_peak_bytes, before.device_peak_bytes),
    "more": last.host_peak_bytes - before.host_peak_bytes,
}))
"""
"""In a process of its own: one that has run other tests gives memory back in the middle."""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a peak does not begin anew")
def test_a_stage_has_its_own_peak_and_the_runs_goes_on() -> None:
    found = json.loads(said_by(STAGES, {}))
    assert found["run"] > 100 * 2**20
    assert 25 * 2**20 < found["stage"] < 100 * 2**20
    assert found["device"] == 0
    assert found["unchanged"]
    assert found["more"] > 0


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the allocators are left as they are")
@pytest.mark.parametrize(
    ("variables", "settings"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:False"}, "expandable_segments:False"),
    ],
)
def test_segments_on_cuda_expand_unless_the_user_says_otherwise(variables: dict[str, str], settings: str) -> None:
    code = "gauge.expand_segments(torch.device('cuda')); print(torch._C._accelerator_getAllocatorSettings())"
    assert said_by(code, variables) == settings


HOLED = """
torch.ones(24 * 2**20, dtype=torch.uint8)  # freed at once: malloc then keeps what is smaller than that
large, small = zip(*[(torch.ones(2**20, dtype=torch.uint8), torch.ones(3000, dtype=torch.uint8)) for _ in range(100)])
before = psutil.Process().memory_info().rss
del large
print((before - psutil.Process().memory_info().rss) // 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(os, "confstr"), reason="a setting of glibc")
def test_what_tensors_held_goes_back_to_the_system() -> None:
    returned = int(said_by("gauge.return_freed_memory()" + HOLED, {}))
    assert 95 <= returned <= 105


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_a_threshold_that_the_user_set_is_kept() -> None:
    said = [said_by("print(gauge.return_freed_memory())", own) for own in ({}, {"MALLOC_MMAP_THRESHOLD_": "65536"})]
    assert said == ["True", "False"]
