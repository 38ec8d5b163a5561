"""Peaks of a whole run, and of one stage of it."""

import torch

from longtake.memory_gauge import MemoryGauge

CPU = torch.device("cpu")
LARGE, SMALL = 200 * 2**20, 50 * 2**20


def test_a_stage_has_its_own_peak_and_the_runs_goes_on() -> None:
    gauge = MemoryGauge(CPU)
    torch.ones(LARGE, dtype=torch.uint8)
    before = gauge.read()
    assert before.host_peak_bytes - before.host_bytes > LARGE // 2
    gauge.begin_stage()
    torch.ones(SMALL, dtype=torch.uint8)
    device, host = gauge.stage_peak()
    after = gauge.read()
    assert SMALL // 2 < host - before.host_bytes < LARGE // 2
    assert device == host - gauge.before
    assert (after.host_peak_bytes, after.device_peak_bytes) == (before.host_peak_bytes, before.device_peak_bytes)
    torch.ones(2 * LARGE, dtype=torch.uint8)
    assert gauge.read().host_peak_bytes > before.host_peak_bytes
    gauge.close()
