"""The devices that a plan can be for, and how fast each is at what a training step does. Needs no torch.

Rates are datasheets' (dense bf16 with fp32 sums, bytes of memory and links), and beside them stands which fraction a
training step reaches. None of them was measured by us on a GPU; the ones fitted say to what.

* MAMF: the largest matrix products' rate that anybody found on a card, from the table "Maximum Achievable Matmul FLOPS"
  of https://github.com/stas00/ml-engineering (compute/accelerator): A100 SXM 271, H100 SXM 794 TFLOP/s.
* FlashAttention-2: up to 73 % of an A100's rate forward, 63 % backward (https://arxiv.org/abs/2307.08691, section 4.1);
  370 and 322 TFLOP/s on an H100, heads of 128, no mask, 16k tokens (https://arxiv.org/abs/2407.08608, figures 5 and 6).
  It is what torch's flash operator runs, on Hopper too.
* Memory: what torch calls the total capacity in its out-of-memory messages, the least that people quote of a card. It
  is 0.5 to 1 GiB less than nvidia-smi's total, and less than the name says.
* PCIe x16 from pinned memory: 24.8 GB/s each way for 4.0 (nvbandwidth on A100s,
  https://forums.developer.nvidia.com/t/352186, where one direction fell to 11 GB/s when both ran: some hosts do that);
  some 55 for 5.0 in published outputs of nvbandwidth, and a tenth less here, since not every host keeps up.

Cards without bf16 (Turing and older) are not in the table: a step in fp16 needs a loss scaler and other kernels.
"""

from __future__ import annotations

import difflib
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from longtake.errors import ConfigError, Problem

if TYPE_CHECKING:
    import torch

Generation: TypeAlias = Literal["ampere", "ada", "hopper", "blackwell", "cpu"]
Precision: TypeAlias = Literal["bf16", "fp16", "fp32"]
GIB = 2**30
TERA = 10**12
GIGA = 10**9

POWER_LIMITED = 0.8
"""What a kernel of tensor cores reaches in a step that runs for minutes, of what it reaches alone for moments.

Fitted to a published step of Wan 14B on an H100 with FlashAttention-3, 7.162 s (`benchmarks/published.py`). An A100
seems to lose nothing: 9 s for a forward pass, 27 to 36 s for a step of the I2V-14B at 32,760 tokens on an A800
(https://github.com/modelscope/DiffSynth-Studio/issues/658) are what its kernels' own rates add up to.
"""
LAUNCH_SECONDS = 1e-5
"""Of the program for one kernel, which bounds a step of little work: Python, autograd, dispatcher, driver.

An estimate: the driver alone takes 2 to 5 us, an operator in eager mode with its backward node twice that and more.
"""
CPU_CALL_SECONDS = 1e-5
"""Of an operator on a CPU beside its work: about a quarter of a linear layer's forward and backward pass of 4 x 4."""
CPU_MATMUL_EFFICIENCY, CPU_BANDWIDTH_EFFICIENCY = 0.8, 0.27
"""Of a measured CPU's rates, what a step reaches: adapters' thin products; strided and transcendental operators that
allocate what they return. Fitted to a profiled fp32 step of 6 blocks, 384 wide, 2,560 tokens, one thread (x86-64).
"""
DISK_BYTES_PER_SECOND = 2 * GIGA
"""Of an NVMe disk, each way. Datasheets say 3.5 to 7 for reading, but activations are written as much as read, and
writing slows down to 1 or 2 GB/s when the disk's cache is full; volumes of rented machines are often slower than this.
"""
PCIE_4, PCIE_5 = 25 * GIGA, 50 * GIGA
THROUGH_HOST = 0.4
"""Between two cards that reach each other over PCIe alone, of its rate; GeForce cards go through host memory."""
OVER_NVLINK = 0.8
"""Of NVLink's rate in one direction, in collectives of many MiB (nccl-tests' bus bandwidth on DGX A100 and H100)."""


@dataclass(frozen=True)
class Device:
    """A device: bytes, rates in FLOP/s and bytes/s, and fractions of them that a step reaches.

    `memory_bytes` is what torch can have with the context, `tensor_flops` the rate in the compute type, `fp32_flops`
    that of fp32 matrix products. `host_bytes_per_second` is reached from pinned memory, in each direction;
    with `duplex` in both at once. `peer_bytes_per_second` is between two of them. `matmul_efficiency` is a fraction
    of both rates of products, the other two are of `tensor_flops`. `copy_share` is the share of the computation's rate
    that a running copy takes from it: none where copies have engines of their own, a core's on a CPU.
    """

    name: str
    generation: Generation
    memory_bytes: int
    tensor_flops: float
    fp32_flops: float
    memory_bytes_per_second: float
    host_bytes_per_second: float
    peer_bytes_per_second: float
    matmul_efficiency: float
    attention_efficiency: float
    attention_backward_efficiency: float
    bandwidth_efficiency: float = 0.88
    launch_seconds: float = LAUNCH_SECONDS
    disk_bytes_per_second: float = DISK_BYTES_PER_SECOND
    duplex: bool = True
    copy_share: float = 0.0


def device(name: str, where: str = "--gpu") -> Device:
    """The device of that name, or that a driver or a user calls so; raises ConfigError with the nearest name."""
    found = DEVICES.get(name) or recognise(name)
    if found is not None:
        return found
    near = difflib.get_close_matches(name.lower(), DEVICES, 1, 0.7)
    remedy = f"did you mean {near[0]}?" if near else f"name one of {', '.join(DEVICES)}"
    raise ConfigError(Problem(f"no rates are known for a device called {name!r}", where, remedy, code="gpu-unknown"))


def recognise(name: str) -> Device | None:
    """The device that `torch.cuda.get_device_name` or a user calls `name`, None where it is in no row.

    Cards of another size or rate under a like name (laptops', MIG slices, H100 NVL, H20, L40, 3090 Ti) are not taken
    for the row's; A800, H800, 4090 D and the Max-Q edition of the PRO 6000, with as much memory, are.
    """
    words = re.sub(r"[^a-z0-9.]+", " ", name.lower()).strip()
    if _OTHER.search(words):
        return None
    return next((DEVICES[row] for pattern, row in _SPELLINGS if re.search(pattern, words)), None)


_GA100 = (271 / 312, 0.73, 0.63)
_HOPPER = (POWER_LIMITED * 794 / 989, POWER_LIMITED * 370 / 989, POWER_LIMITED * 322 / 989)
_WORKSTATION = (POWER_LIMITED * 0.80, POWER_LIMITED * 0.60, POWER_LIMITED * 0.55)
"""0.80 as Hopper's, the other two chosen for the published 21.77 s of an L40S; assumed for its like."""
_GEFORCE = (POWER_LIMITED * 0.95, POWER_LIMITED * 0.90, POWER_LIMITED * 0.75)
"""Assumed, fitted to no step: their tensor cores add up in fp32 at half the rate of the same chip's in a workstation
card, so that all else is rarely what they wait for."""

DEVICES: dict[str, Device] = {
    row.name: row
    for row in (
        # https://www.nvidia.com/en-us/data-center/h200: 989 TFLOP/s, 4.8 TB/s, NVLink 450 GB/s each way
        Device(
            "h200", "hopper", int(139.72 * GIB), 989 * TERA, 67 * TERA,
            4800 * GIGA, PCIE_5, OVER_NVLINK * 450 * GIGA, *_HOPPER,
        ),
        # https://www.nvidia.com/en-us/data-center/h100 (SXM and PCIe)
        Device(
            "h100-sxm", "hopper", int(79.10 * GIB), 989 * TERA, 67 * TERA,
            3350 * GIGA, PCIE_5, OVER_NVLINK * 450 * GIGA, *_HOPPER,
        ),
        Device(
            "h100-pcie", "hopper", int(79.10 * GIB), 756 * TERA, 51 * TERA,
            2000 * GIGA, PCIE_5, THROUGH_HOST * PCIE_5, *_HOPPER,
        ),
        # https://www.nvidia.com/en-us/data-center/a100 (SXM)
        Device(
            "a100-40gb", "ampere", int(39.38 * GIB), 312 * TERA, 19.5 * TERA,
            1555 * GIGA, PCIE_4, OVER_NVLINK * 300 * GIGA, *_GA100,
        ),
        Device(
            "a100-80gb", "ampere", int(79.14 * GIB), 312 * TERA, 19.5 * TERA,
            2039 * GIGA, PCIE_4, OVER_NVLINK * 300 * GIGA, *_GA100,
        ),
        # https://www.nvidia.com/en-us/data-center/l40s: 362 TFLOP/s without sparsity
        Device(
            "l40s", "ada", int(44.34 * GIB), 362 * TERA, 91.6 * TERA,
            864 * GIGA, PCIE_4, THROUGH_HOST * PCIE_4, *_WORKSTATION,
        ),
        # NVIDIA's Ampere GA102, Ada and RTX Blackwell architecture papers, appendices: bf16 with fp32 accumulation
        Device(
            "rtx-3090", "ampere", int(23.56 * GIB), 71 * TERA, 35.6 * TERA,
            936 * GIGA, PCIE_4, THROUGH_HOST * PCIE_4, *_GEFORCE,
        ),
        Device(
            "rtx-4080", "ada", int(15.59 * GIB), 97.5 * TERA, 48.7 * TERA,
            717 * GIGA, PCIE_4, THROUGH_HOST * PCIE_4, *_GEFORCE,
        ),
        Device(
            "rtx-4090", "ada", int(23.52 * GIB), 165.2 * TERA, 82.6 * TERA,
            1008 * GIGA, PCIE_4, THROUGH_HOST * PCIE_4, *_GEFORCE,
        ),
        Device(
            "rtx-5090", "blackwell", int(31.36 * GIB), 209.5 * TERA, 104.8 * TERA,
            1792 * GIGA, PCIE_5, THROUGH_HOST * PCIE_5, *_GEFORCE,
        ),
        Device(
            "rtx-a6000", "ampere", int(47.40 * GIB), 154.8 * TERA, 38.7 * TERA,
            768 * GIGA, PCIE_4, THROUGH_HOST * PCIE_4, *_WORKSTATION,
        ),
        Device(
            "rtx-pro-6000", "blackwell", int(94.96 * GIB), 503.8 * TERA, 126 * TERA,
            1792 * GIGA, PCIE_5, THROUGH_HOST * PCIE_5, *_WORKSTATION,
        ),
        # a server of 8 cores without bf16 units, for a plan on another machine; `measure_cpu` has this one's rates
        Device(
            "cpu", "cpu", 32 * GIB, 0.4 * TERA, 0.4 * TERA,
            40 * GIGA, 8 * GIGA, GIGA, CPU_MATMUL_EFFICIENCY, 0.8, 0.7, CPU_BANDWIDTH_EFFICIENCY,
            CPU_CALL_SECONDS, copy_share=1 / 8,
        ),
    )
}  # fmt: skip

_OTHER = re.compile(r"\b(laptop|mobile|mig|nvl|ti|super|ada)\b")
_SPELLINGS = (
    (r"\bh200\b", "h200"),
    (r"\bh[18]00\b.*\bpcie\b", "h100-pcie"),
    (r"\bh[18]00\b", "h100-sxm"),
    (r"\ba[18]00\b.*\b40 ?gb?\b", "a100-40gb"),
    (r"\ba[18]00\b", "a100-80gb"),
    (r"\bl40s\b", "l40s"),
    (r"\b(rtx)? ?3090\b", "rtx-3090"),
    (r"\b(rtx)? ?4080\b", "rtx-4080"),
    (r"\b(rtx)? ?4090\b", "rtx-4090"),
    (r"\b(rtx)? ?5090\b", "rtx-5090"),
    (r"\b(rtx)? ?a6000\b", "rtx-a6000"),
    (r"\b(rtx)? ?pro 6000\b", "rtx-pro-6000"),
    (r"\bcpu\b", "cpu"),
)


def measure_cpu(precision: Precision = "fp32", seconds: float = 0.1) -> Device:
    """This machine as torch uses it now, with its number of threads, in about ten times `seconds`.

    Attention, and all that runs in the compute type, is measured in `precision`; fp32 products beside it. Copies are
    made by threads; where the computation uses all cores, `copy_share` says what one takes from it.
    """
    import psutil
    import torch
    from torch.nn import functional

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    rows, weight = torch.ones(512, 1024), torch.ones(1024, 1024)
    fp32 = 2 * 512 * 1024**2 / _best(lambda: functional.linear(rows, weight), seconds)
    low, low_weight = rows.to(dtype), weight.to(dtype)
    tensor = 2 * 512 * 1024**2 / _best(lambda: functional.linear(low, low_weight), seconds)
    forward, backward = _attention_rates(dtype, seconds)
    source = torch.ones(2**20)  # 4 MiB, as a block's activations of a small model
    host, other = torch.ones(2**22).numpy(), torch.ones(2**22).numpy()
    tiny = torch.ones(4, 4, requires_grad=True)
    one = tiny.detach()
    moved = 3 * source.nbytes / _best(lambda: source + source, seconds)
    copied = host.nbytes / _best(lambda: host.__setitem__(slice(None), other), seconds)
    call = _best(lambda: torch.autograd.grad(functional.linear(one, tiny), tiny, one), seconds) / 4
    memory = int(psutil.virtual_memory().total)
    fractions = (CPU_MATMUL_EFFICIENCY, forward / tensor, backward / tensor, CPU_BANDWIDTH_EFFICIENCY)
    rates = (tensor, fp32, moved, copied, copied, *fractions, call)
    threads = torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or threads
    return Device("cpu", "cpu", memory, *rates, copy_share=1 / threads if threads >= cores else 0.0)


def _attention_rates(dtype: torch.dtype, seconds: float) -> tuple[float, float]:
    """FLOP/s of fused attention forward and backward, four heads of 64 and 512 tokens."""
    import torch
    from torch.nn import functional

    random = torch.Generator().manual_seed(0)  # equal values would make the gradients denormal, which is slow
    query, gradient = torch.randn(2, 1, 4, 512, 64, generator=random).to(dtype)
    query.requires_grad_()
    out = functional.scaled_dot_product_attention(query, query, query)
    forward = _best(lambda: functional.scaled_dot_product_attention(query, query, query), seconds)
    backward = _best(lambda: torch.autograd.grad(out, query, gradient, retain_graph=True), seconds)
    flops = 4 * 4 * 64 * 512**2
    return flops / forward, 2.5 * flops / backward


def _best(run: Callable[[], object], seconds: float) -> float:
    """Seconds of the fastest of the runs that begin within `seconds`, of three at least: the first ones warm up."""
    end, times = time.perf_counter() + seconds, list[float]()
    while len(times) < 3 or time.perf_counter() < end:
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)
