"""What a run may use of the device: said, and where it can be, enforced."""

import torch

from longtake.config.schema import RunConfig
from longtake.errors import ConfigError, Problem
from longtake.memory_gauge import MemoryGauge, return_freed_memory
from longtake.progress import Reporter
from longtake.training.planned import Planned
from longtake.units import format_bytes, parse_bytes


def hold_to_budget(
    config: RunConfig, gauge: MemoryGauge, device: torch.device, reporter: Reporter, planned: Planned | None
) -> None:
    """Says what may be used; with a budget given CUDA's allocator is held to it, and a CPU's keeps nothing freed."""
    reporter.line(gauge.device_line())
    free = gauge.free_bytes()
    wanted = free if config.memory.budget == "auto" else parse_bytes(config.memory.budget, "memory.budget")
    if wanted > free:
        remedy = "lower it or end other processes"
        what = f"the budget is {format_bytes(wanted)} and only {format_bytes(free)} are free"
        raise ConfigError(Problem(what, "memory.budget", remedy, code="budget-above-free"))
    if config.memory.budget != "auto" and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(wanted / total, device)
    elif config.memory.budget != "auto":
        return_freed_memory()
    reporter.line(f"budget: {format_bytes(wanted)}{_not_held(config, device, wanted, planned)}")


def _not_held(config: RunConfig, device: torch.device, budget: int, planned: Planned | None) -> str:
    if config.memory.budget == "auto" or device.type == "cuda":
        return ""
    below = planned is not None and planned.strategies[0].device_peak_bytes <= budget
    return f" (a CPU run is not held to it{', but planned to stay below it' if below else ''})"
