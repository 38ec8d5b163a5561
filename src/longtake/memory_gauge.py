"""Bytes in use and their peak, by torch, by the driver, by the process; and allocators that keep little beside."""

import contextlib
import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import psutil
import pynvml
import torch

from longtake.units import format_bytes

ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Where the user says how torch's CUDA allocator is to work: the name since torch 2.9, and the older one."""
MAPPED_BYTES = 2**16
"""Allocations from this size on are mapped one by one where freed memory has to leave the process."""
M_MMAP_THRESHOLD = -3
"""Of glibc's malloc.h."""


@dataclass(frozen=True)
class Memory:
    """Bytes now and at their peak. `driver_bytes` is what nvidia-smi shows for the whole device, None without one."""

    device_bytes: int
    device_peak_bytes: int
    host_bytes: int
    host_peak_bytes: int
    driver_bytes: int | None = None
    driver_peak_bytes: int | None = None

    def most_of(self, gathered: "Callable[[Memory], Sequence[Memory]]") -> "Memory":
        """Of each figure the greatest that a rank has; `gathered` asks them all."""
        found = [astuple(each) for each in gathered(self)]
        most = (
            max((value for value in values if value is not None), default=None) for values in zip(*found, strict=True)
        )
        return Memory(*most)  # type: ignore[arg-type]  # None only where all are


class MemoryGauge:
    """Reads memory during a run; made before the model is built, because a CPU run counts from there."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.process = psutil.Process()
        _forget_peak()
        self.before = self.process.memory_info().rss if device.type == "cpu" else 0
        self.reserved_peak = self.resident_peak = 0  # as they were last read
        self.driver = _Driver(device) if device.type == "cuda" else None
        if self.driver is not None:
            torch.cuda.empty_cache()  # what was done before it is not the run's
            torch.cuda.reset_peak_memory_stats(device)

    def read(self) -> Memory:
        """The bytes now, and their peaks since the gauge was made."""
        resident = self.process.memory_info().rss
        peak = self.resident_peak = max(self.resident_peak, peak_resident())
        if self.driver is None:
            return Memory(max(0, resident - self.before), max(0, peak - self.before), resident, peak)
        self.reserved_peak = max(self.reserved_peak, torch.cuda.max_memory_reserved(self.device))
        return Memory(
            torch.cuda.memory_allocated(self.device),
            self.reserved_peak,
            resident,
            peak,
            self.driver.used_bytes,
            self.driver.peak_bytes,
        )

    def begin_stage(self) -> None:
        """Starts the peaks that `stage_peak` tells anew; those of `read` go on."""
        self.read()
        _forget_peak()
        if self.driver is not None:
            torch.cuda.reset_peak_memory_stats(self.device)

    @contextlib.contextmanager
    def stage(self, title: str, say: Callable[[str], None]) -> Iterator[None]:
        """Says when the context ends what the stage took at its peak."""
        self.begin_stage()
        yield
        device, host = self.stage_peak()
        say(f"{title}: took device {format_bytes(device)}, host {format_bytes(host)} at the peak")

    def stage_peak(self) -> tuple[int, int]:
        """(device, host) bytes at their peak since `begin_stage`.

        On CUDA what tensors held, because the allocator keeps what an earlier stage reserved. The host's is the one
        since the start where the system does not let it begin anew.
        """
        host = peak_resident()
        if self.driver is None:
            return max(0, host - self.before), host
        return torch.cuda.max_memory_allocated(self.device), host

    def device_line(self) -> str:
        """What is on the device before the run: its size, and the bytes of other processes."""
        if self.driver is None:
            return f"device: CPU, {psutil.virtual_memory().available / 2**30:.1f} GiB of host memory available"
        others, total = self.driver.other_bytes / 2**30, self.driver.total_bytes / 2**30
        return (
            f"device: {torch.cuda.get_device_name(self.device)}, {total:.1f} GiB, other processes use {others:.1f} GiB"
        )

    def free_bytes(self) -> int:
        """What a run may use when no budget is given."""
        if self.driver is None:
            return psutil.virtual_memory().available
        return torch.cuda.mem_get_info(self.device)[0]

    def close(self) -> None:
        """Ends the sampling of the driver."""
        if self.driver is not None:
            self.driver.close()


def expand_segments(device: torch.device) -> None:
    """Lets torch's CUDA allocator grow its segments, so that reserved bytes stay near allocated ones.

    Only on Linux, and where the environment says nothing. The setter works at any time; the variable would have to be
    set before the allocator's first use, which the caller of a run may have made (c10/cuda/CUDAAllocatorConfig.h reads
    it there, once). It has no public name: torch/cuda/memory.py gives this one in place of `_set_allocator_settings`.
    """
    said = any(os.environ.get(name) for name in ALLOCATOR_VARIABLES)
    if device.type == "cuda" and sys.platform == "linux" and torch.version.hip is None and not said:
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


def return_freed_memory() -> bool:
    """Has glibc give the memory of freed tensors back to the system, so that the process's peak is what tensors hold.

    By itself malloc raises the size from which on it maps, up to 32 MiB, and keeps what is smaller (mallopt(3)).
    Nothing, and False, where the C library is another, or where MALLOC_MMAP_THRESHOLD_ says how it should be.
    """
    if sys.platform != "linux" or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return False
    with contextlib.suppress(OSError, ValueError):  # musl has no such name, and no use for the setting
        if os.confstr("CS_GNU_LIBC_VERSION"):
            return bool(ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES))
    return False


class _Driver:
    """Samples NVML once a second on a thread: the device's used bytes, as nvidia-smi shows them."""

    def __init__(self, device: torch.device) -> None:
        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(device).uuid
        self.handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        memory = pynvml.nvmlDeviceGetMemoryInfo(self.handle)
        self.total_bytes = int(memory.total)
        self.used_bytes = self.peak_bytes = int(memory.used)
        self.other_bytes = max(0, self.used_bytes - self._own_bytes())
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._sample, name="nvml", daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.stopped.set()
        self.thread.join()
        pynvml.nvmlShutdown()

    def _own_bytes(self) -> int:
        """What this process holds already (its context); 0 where the driver does not tell, as in some containers."""
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(self.handle)
        return sum(int(process.usedGpuMemory or 0) for process in processes if process.pid == os.getpid())

    def _sample(self) -> None:
        while not self.stopped.wait(1.0):
            self.used_bytes = int(pynvml.nvmlDeviceGetMemoryInfo(self.handle).used)
            self.peak_bytes = max(self.peak_bytes, self.used_bytes)


def peak_resident() -> int:
    """Greatest resident size of the process so far (Linux: VmHWM), else its size now."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return psutil.Process().memory_info().rss


def _forget_peak() -> None:
    """Starts VmHWM anew from the size now (Linux, `man 5 proc_pid_clear_refs`); elsewhere nothing is to be done."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
