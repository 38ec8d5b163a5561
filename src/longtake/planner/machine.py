"""What there is to plan for: a device, how many, and what of each kind of memory may be used."""

from __future__ import annotations

from dataclasses import dataclass

from longtake.planner.allocator import overhead_bytes
from longtake.planner.hardware import Device

HOST_PROCESS_BYTES = 3 * 2**30
"""Host memory of a run beside what strategies move there: Python, torch and CUDA's libraries, the loader's batches.

An estimate that has not been measured on a GPU; on the CPU the libraries take 0.6 GiB.
"""
CPU_PROCESS_BYTES = 64 * 2**20
"""What a CPU run takes beside the tensors of a step: code and buffers of libraries, the loader's batches, the log.

Measured on runs of tiny models with a budget: 33 to 38 MiB in fp32, 60 to 63 in bf16.
"""
CPU_MARGIN = 0.03
"""And relative to the tensors' bytes, for what malloc keeps and for kernels' scratch: 1 % or less was measured."""


@dataclass(frozen=True)
class Machine:
    """`gpus` devices, `budget_bytes` of each; `host_bytes` and `disk_bytes` are for all of them together.

    `expandable` says that PyTorch's allocator uses expandable segments, as runs on Linux do.
    """

    device: Device
    gpus: int
    budget_bytes: int
    host_bytes: int
    disk_bytes: int
    expandable: bool = True

    @property
    def is_cpu(self) -> bool:
        """Whether device and host are one memory."""
        return self.device.generation == "cpu"

    def context_bytes(self, peak_bytes: int, ranks: int, all_to_all: bool = False) -> int:
        """On the device outside of the allocator, in a process whose tensors hold `peak_bytes`."""
        if self.is_cpu:
            return CPU_PROCESS_BYTES + int(CPU_MARGIN * peak_bytes)
        return overhead_bytes(self.device.generation, ranks, all_to_all)
