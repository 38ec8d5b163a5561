"""What a strategy needs of host memory and disk, what of both is free, and the refusal of what would not fit."""

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

from longtake.config.schema import MemoryStrategy
from longtake.errors import ConfigError, Problem
from longtake.memory.block_swap import swapped_blocks
from longtake.memory.flattened import inner_tensors
from longtake.memory.quantization import QuantizedWeight, quantizable, quantize
from longtake.models.spec import ModelSpec
from longtake.models.weight_files import WeightFile
from longtake.units import format_bytes

PINNED_SHARE = 0.8
"""Share of the free host memory that may be pinned.

Pinned memory can neither be swapped nor be given back under pressure, so the rest is left to pageable memory and the
page cache. That is our assumption and no limit of the driver's: on Linux it has none, and `RLIMIT_MEMLOCK` does not
count what cudaHostRegister pins. WSL has one that cannot be asked for (0.5 to 4 GiB in reports, microsoft/WSL#8447 and
#14078); what exceeds it the driver refuses when the strategy is applied or the largest bucket run, before a step.
"""
STATE_BYTES = 8
"""AdamW's two fp32 moments of one value."""
REMEDIES = {
    "activation_offload": "lower memory.activation_offload_fraction",
    "block_swap": "lower memory.block_swap",
    "optimizer_offload": "leave out memory.optimizer_offload",
}


@dataclass(frozen=True)
class Workload:
    """A micro-batch: tokens of each of its clips, how many clips, bytes of an activation's value."""

    tokens: int
    micro_batch_size: int
    itemsize: int


@dataclass(frozen=True)
class Needs:
    """Bytes in host memory and on disk, by the field of [memory] that needs them."""

    host: Mapping[str, int]
    disk: Mapping[str, int]

    @property
    def host_bytes(self) -> int:
        """Sum."""
        return sum(self.host.values())

    @property
    def disk_bytes(self) -> int:
        """Sum."""
        return sum(self.disk.values())


@dataclass(frozen=True)
class Free:
    """Bytes that may be used; `pinned` says that the host's are the share that may be pinned."""

    host_bytes: int
    disk_bytes: int
    pinned: bool = False


def needs(
    transformer: nn.Module,
    spec: ModelSpec,
    strategy: MemoryStrategy,
    workload: Workload,
    weight_files: Mapping[str, WeightFile],
    turns: bool = False,
) -> Needs:
    """What `strategy` needs beside what the process holds while `transformer` is loaded and no strategy applied.

    So frozen weights that are plain CPU tensors cost nothing to keep in host memory: block swap replaces them. The
    optimiser's states are counted as if they were not there yet. Works on `meta`, whose weights count as the device's.
    With `turns` the weights of all blocks wait there while another transformer is used.
    """
    found: dict[str, dict[str, int]] = {"host": {}, "disk": {}}
    if strategy.activation_offload != "none":
        moved = _kept_bytes(len(getattr(transformer, spec.blocks)), spec, strategy, workload)
        found[strategy.activation_offload]["activation_offload"] = moved
    if strategy.block_swap or turns:
        count = len(getattr(transformer, spec.blocks))
        away = count if turns else min(strategy.block_swap, count)
        found[strategy.block_swap_from]["block_swap"] = _swapped_bytes(transformer, spec, strategy, weight_files, away)
    if strategy.optimizer_offload:
        trained = sum(parameter.numel() for parameter in transformer.parameters() if parameter.requires_grad)
        found["host"]["optimizer_offload"] = STATE_BYTES * trained
    return Needs(**found)


def together(of_each: Sequence[Needs]) -> Needs:
    """What models of one shape need under one strategy, of which one computes at a time: its activations once."""

    def total(tier: Callable[[Needs], Mapping[str, int]]) -> dict[str, int]:
        once = {"activation_offload"}
        fields = dict.fromkeys(field for own in of_each for field in tier(own))
        return {field: (max if field in once else sum)(tier(own).get(field, 0) for own in of_each) for field in fields}

    return Needs(total(lambda own: own.host), total(lambda own: own.disk))


def check(needed: Needs, free: Free) -> None:
    """Raises ConfigError with the numbers and with what to change where `free` is less than `needed`."""
    problems = []
    if needed.host_bytes > free.host_bytes:
        of = f" ({PINNED_SHARE:.0%} of what is free, since it is pinned)" if free.pinned else ""
        problems.append(_refusal(needed.host, f"host memory{of}", free.host_bytes, "disk"))
    if needed.disk_bytes > free.disk_bytes:
        problems.append(_refusal(needed.disk, "the run folder's disk", free.disk_bytes, "host"))
    if problems:
        raise ConfigError(problems)


def free_for(device: torch.device, scratch: Path) -> Free:
    """What is free now for a strategy of a model on `device` whose files go to the folder `scratch`."""
    existing = next(path for path in (scratch, *scratch.absolute().parents) if path.exists())
    available = psutil.virtual_memory().available
    limited = min([available, *cgroup_free(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))])
    pinned = device.type == "cuda"
    host = int(limited * PINNED_SHARE) if pinned else limited
    return Free(max(0, host), shutil.disk_usage(existing).free, pinned)


def cgroup_free(membership: Path, mount: Path) -> Iterator[int]:
    """Bytes that each memory limit on the process's control groups leaves; none outside Linux or without a limit.

    `membership` is the process's /proc/self/cgroup (`man 7 cgroups`), `mount` where the hierarchies are mounted. The
    page cache in a group's usage is given back under pressure, so it counts as free, as in MemAvailable.
    """
    for hierarchy, group in _groups(membership, mount):
        names = ("memory.max", "memory.current") if hierarchy == mount else _V1
        # In a container the group may be mounted as the root: then its own folder is not there, and the root's is.
        for folder in (group, *group.parents):
            limit, used = (_number(folder / name) for name in names)
            if limit is not None and used is not None:
                yield limit - used + _page_cache(folder / "memory.stat")
            if folder == hierarchy:
                break


_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")


def _kept_bytes(blocks: int, spec: ModelSpec, strategy: MemoryStrategy, workload: Workload) -> int:
    """What moves: each segment's input and, where attention is kept, its output and fp32 logsumexp in each block."""
    segments = ceil(blocks / strategy.checkpoint_every)
    moved = round(segments * strategy.activation_offload_fraction)
    tokens = workload.micro_batch_size * workload.tokens
    hidden = tokens * spec.heads * spec.head_dim * workload.itemsize
    if strategy.gradient_checkpointing != "block_keep_attention":
        return moved * hidden
    attended = min(blocks, moved * strategy.checkpoint_every)
    return moved * hidden + attended * (hidden + tokens * spec.heads * torch.float32.itemsize)


def _swapped_bytes(
    transformer: nn.Module, spec: ModelSpec, strategy: MemoryStrategy, weight_files: Mapping[str, WeightFile], away: int
) -> int:
    """Bytes of the frozen weights of the `away` blocks that are swapped which are not yet where they shall wait."""
    blocks: nn.ModuleList = getattr(transformer, spec.blocks)
    total = 0
    for index in swapped_blocks(len(blocks), away):
        for name, parameter in blocks[index].named_parameters(f"{spec.blocks}.{index}"):
            if parameter.requires_grad:
                continue
            final = _final(name, parameter, spec, strategy)
            if strategy.block_swap_from == "host":
                there = parameter.device.type == "cpu"
            else:
                there = _lies_in_file(final, weight_files.get(name))
            total += 0 if there else sum(inner.nbytes for inner in inner_tensors(final))
    return total


def _final(name: str, parameter: Tensor, spec: ModelSpec, strategy: MemoryStrategy) -> Tensor:
    """The weight as the strategy will have it, without values where it is still to be quantised."""
    kind = strategy.quantization
    if kind == "none" or isinstance(parameter, QuantizedWeight) or not quantizable(name, parameter, spec):
        return parameter.data
    return quantize(torch.empty_like(parameter, device="meta"), kind)


def _lies_in_file(weight: Tensor, file: WeightFile | None) -> bool:
    """Whether a safetensors file has the bytes as they are computed with."""
    return file is not None and len(inner_tensors(weight)) == 1 and file.holds(weight.dtype)


def _refusal(needed: Mapping[str, int], where: str, free: int, other: str) -> Problem:
    listed = " and ".join(f"{format_bytes(count)} for {field}" for field, count in needed.items())
    largest = max(needed, key=lambda field: needed[field])
    remedy = REMEDIES[largest]
    if largest != "optimizer_offload":
        key = "memory.block_swap_from" if largest == "block_swap" else "memory.activation_offload"
        remedy = f'{remedy}, or set {key} = "{other}"'
    what = f"the strategy needs {listed}, and {format_bytes(free)} of {where} may be used"
    return Problem(what, f"memory.{largest}", remedy, code="memory-strategy-too-big")


def _groups(membership: Path, mount: Path) -> Iterator[tuple[Path, Path]]:
    """(where the hierarchy with the memory controller is mounted, the process's folder in it)."""
    with contextlib.suppress(OSError):
        for line in membership.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                yield mount, mount / path.lstrip("/")
            elif "memory" in controllers.split(","):
                yield mount / "memory", mount / "memory" / path.lstrip("/")


def _number(path: Path) -> int | None:
    """The number in a file; None where there is no file, or no limit (`max`, in version 1 a number near 2**63)."""
    with contextlib.suppress(OSError, ValueError):
        value = int(path.read_text())
        return value if value < 2**62 else None
    return None


def _page_cache(stat: Path) -> int:
    """Bytes of files in a group's usage; in version 1 the `total_` lines include the groups below."""
    values: dict[str, int] = {}
    with contextlib.suppress(OSError):
        values = {name: int(value) for name, value in (line.split() for line in stat.read_text().splitlines())}
    return sum(values.get(f"total_{name}", values.get(name, 0)) for name in ("inactive_file", "active_file"))
