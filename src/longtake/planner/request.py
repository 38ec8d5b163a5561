"""From a config, or from flags alone, and the name of a device to what is planned; and a plan back into a config."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from longtake.config.conflicts import conflicts
from longtake.config.load import load_config
from longtake.config.schema import ParallelConfig, RunConfig
from longtake.data.buckets import check_shape, stage_frames
from longtake.data.dataset import place, read_sources
from longtake.errors import ConfigError, NothingFits, Problem
from longtake.memory.accounting import free_for
from longtake.memory.strategy import unfit
from longtake.memory_gauge import expand_segments
from longtake.models.wan.detection import variant_of
from longtake.models.wan.variants import WanVariant
from longtake.planner.candidates import Freedom
from longtake.planner.hardware import DEVICES, Device, device, measure_cpu, recognise
from longtake.planner.machine import Machine
from longtake.planner.meta_model import Subject
from longtake.planner.operators import DeviceType
from longtake.planner.planning import Request, plan
from longtake.planner.plans import Bucket, Report
from longtake.planner.report import to_json
from longtake.planner.words import why_not
from longtake.training.model import choose_experts
from longtake.training.planned import FILE as PLAN
from longtake.training.planned import Planned, PlannedStrategy
from longtake.training.run_folder import CONFIG
from longtake.units import format_bytes, parse_bytes

HOST_BYTES = 128 * 2**30
DISK_BYTES = 512 * 2**30
"""What a machine that is only named is taken to have of either, for each GPU: what a rented one usually has."""
USUAL = "h100-sxm"
NAMED_SIZE = 1.05
"""By how much the size that a card is called by may exceed what there is of its memory."""
UNPINNED = ("budget", "fallbacks")


@dataclass(frozen=True)
class Where:
    """What the user says of the machine; empty where nothing is said.

    `local_gpus` of the `gpus` are in this machine, all of them where it is 0; the others are in such as this one.
    """

    gpu: str = ""
    gpus: int = 1
    host_memory: str = ""
    local_gpus: int = 0


def request_of(config: RunConfig, where: Where, clips: bool = True) -> tuple[Request, list[str]]:
    """What is planned for `config`, and what was assumed; raises ConfigError, ModelError or DataError.

    With `clips` its buckets are those of the clips where these are here.
    """
    found = variant_of(config.model)
    if where.gpus < 1:
        raise ConfigError(
            Problem(f"{where.gpus} GPUs train nothing", "--gpus", "use 1 or more", code="gpus-none-asked")
        )
    machine, notes = _machine(config, where, found)
    experts = len(choose_experts(config, found.spec))
    kind: DeviceType = "cpu" if machine.is_cpu else "cuda"
    subject = Subject(found, config.lora, config.training, config.model.dtype, kind, experts)
    drops_out = config.lora is not None and config.lora.dropout > 0
    if problems := [*unfit(config.memory, (subject.blocks, found.spec.heads), config.lora is not None, drops_out)]:
        raise ConfigError(problems)
    chosen = config.memory.model_fields_set.difference(UNPINNED)
    pinned = {name: getattr(config.memory, name) for name in sorted(chosen)}
    micro = config.training.micro_batch_size if "micro_batch_size" in config.training.model_fields_set else None
    freedom = Freedom(pinned, micro, _pinned(config.parallel))
    samples = bool(config.validation.samples)
    buckets = _buckets(config, found, clips)
    longest = max(frames for frames, _, _ in buckets)
    if longest < config.data.num_frames:
        notes.append(
            f"no clip has data.num_frames = {config.data.num_frames}: planned for the {longest} that they have"
        )
    return Request(subject, machine, buckets, freedom, samples), notes


def planned_run(
    config: RunConfig, resume: bool = False, ranks: int = 1, local_ranks: int = 0
) -> tuple[RunConfig, Planned]:
    """`config` with the fastest strategy and sharing that fit `ranks` ranks on this machine and its budget.

    `local_ranks` of them are on this machine, all where it is 0. A run that is resumed on as many ranks keeps the
    strategy, the sharing and the micro-batch that it had, unless the config asks for others: a plan made anew may
    choose another of two that are nearly as fast, and rounding would differ from there on. Raises NothingFits.
    """
    where = Where(gpus=ranks, local_gpus=local_ranks)
    request, _ = request_of(_as_before(config, ranks) if resume else config, where)
    report = plan(request)
    if report.chosen is None:
        raise nothing_fits(report)
    chosen = report.plans[report.chosen]
    memory = chosen.strategy.model_copy(update={"budget": config.memory.budget})
    training = config.training.model_copy(update={"micro_batch_size": chosen.micro_batch_size})
    shared = chosen.parallel, chosen.micro_batch_size
    seconds = {needs.bucket: needs.step_seconds for needs in chosen.buckets}
    strategies = [
        PlannedStrategy(
            each.strategy.model_copy(update={"fallbacks": ()}),
            each.peak_bytes["device"],
            each.peak_bytes["host"],
            each.step_seconds,
            seconds if each is chosen else {},
        )
        for each in report.plans
        if each is chosen or (each.strategy in memory.fallbacks and (each.parallel, each.micro_batch_size) == shared)
    ]
    run = config.model_copy(update={"memory": memory, "training": training, "parallel": chosen.parallel})
    return run, Planned(tuple(strategies), to_json(report))


def _as_before(config: RunConfig, ranks: int) -> RunConfig:
    """`config` with what its run folder says of memory, sharing and micro-batch, if it was planned for so many ranks.

    And if the config itself asks for no other memory or sharing.
    """
    recorded = Path(config.output.run) / CONFIG
    if not recorded.is_file() or _ranks_before(recorded.parent) not in (ranks, None):
        return config
    before = load_config(recorded)
    pinned = {"budget", *config.memory.model_fields_set.difference(["fallbacks"])}
    if any(getattr(config.memory, name) != getattr(before.memory, name) for name in pinned):
        return config
    if any(value != getattr(before.parallel, name) for name, value in _pinned(config.parallel).items()):
        return config
    size, own = before.training.micro_batch_size, config.training
    if "micro_batch_size" not in own.model_fields_set:
        own = own.model_copy(update={"micro_batch_size": size})
    again = config.model_copy(update={"memory": before.memory, "training": own, "parallel": before.parallel})
    return config if [*conflicts(again, ranks)] else again


def _ranks_before(run: Path) -> int | None:
    """On how many ranks the run was planned; None where no plan of it can be read."""
    try:
        found = json.loads((run / PLAN).read_text(encoding="utf-8"))["gpus"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, int) else None


def nothing_fits(report: Report) -> NothingFits:
    """The error that names the nearest plan and what would make it fit, one problem a line."""
    budget = format_bytes(report.budget_bytes)
    if not report.plans:
        return NothingFits(Problem(f"nothing fits {budget}", "memory.budget", code="plan-nothing-fits"))
    nearest = report.plans[0]
    needs = format_bytes(nearest.peak_bytes["device"])
    what = f"nothing fits {budget}; the nearest, {nearest.name}, needs {needs} ({why_not(report, nearest)})"
    changes = [
        Problem(
            f"with {each.change} it would need {format_bytes(each.device_bytes)}",
            "memory.budget",
            code="plan-would-need",
        )
        for each in report.advice
    ]
    return NothingFits([Problem(what, "memory.budget", code="plan-nothing-fits"), *changes])


def is_open(config: RunConfig) -> bool:
    """Whether a run of `config` is planned: it has a budget, or a GPU and a [memory] that decides nothing."""
    if config.memory.budget != "auto":
        return True
    return torch.cuda.is_available() and not config.memory.model_fields_set.difference(UNPINNED)


def needs_plan(config: RunConfig, ranks: int = 1) -> bool:
    """Whether a run of `config` on so many ranks is planned: as on one, or because no engine is named for several."""
    return is_open(config) or (ranks > 1 and config.parallel.strategy == "auto")


def _pinned(parallel: ParallelConfig) -> dict[str, Any]:
    """The fields of [parallel] that are given, with their values."""
    given = {name: getattr(parallel, name) for name in sorted(parallel.model_fields_set)}
    return {name: value for name, value in given.items() if (name, value) != ("strategy", "auto")}


def _machine(config: RunConfig, where: Where, found: WanVariant) -> tuple[Machine, list[str]]:
    chosen, local, notes = _device(where, config, found)
    given = config.memory.budget
    disk = free_for(torch.device("cpu"), Path(config.output.run)).disk_bytes if local else DISK_BYTES
    host, here = HOST_BYTES * where.gpus, where.local_gpus or where.gpus
    if chosen.generation == "cpu":
        free = psutil.virtual_memory().available // here
        host = free * where.gpus
    elif local:
        free = torch.cuda.mem_get_info()[0]
        host = free_for(torch.device("cuda"), Path(config.output.run)).host_bytes * where.gpus // here
    else:
        free = chosen.memory_bytes
        if not where.host_memory:
            notes.append(f"host memory is taken to be {format_bytes(host)}; say what it is with --host-memory")
    if where.host_memory:
        host = parse_bytes(where.host_memory, "--host-memory")
    budget = free if given == "auto" else parse_bytes(given, "memory.budget")
    if free < budget <= NAMED_SIZE * chosen.memory_bytes and not local:  # a card of 24 GiB has 23.5 for a program
        what = f"{format_bytes(budget)} is more than a program can have on one {chosen.name}"
        notes.append(f"{what}: planned for {format_bytes(free)}")
        budget = free
    if budget > chosen.memory_bytes and not local:
        what = f"the budget is {format_bytes(budget)} and a {chosen.name} has {format_bytes(chosen.memory_bytes)}"
        raise ConfigError(Problem(what, "memory.budget", "lower it, or name another --gpu", code="budget-above-device"))
    return Machine(chosen, where.gpus, budget, host, disk), notes


def _device(where: Where, config: RunConfig, found: WanVariant) -> tuple[Device, bool, list[str]]:
    """The device that is named, or the one that is here, or the usual one; whether it is here; what was assumed."""
    if where.gpu and where.gpu != "cpu":
        return device(where.gpu), False, []
    if not where.gpu and torch.cuda.is_available():
        expand_segments(torch.device("cuda"))  # before anything asks CUDA for memory, as the plan counts on them
        name = torch.cuda.get_device_name()
        known = recognise(name)
        if known is not None:
            return known, True, []
        return DEVICES[USUAL], True, [f"no rates are known for {name}: times are those of {USUAL}"]
    if where.gpu or not found.hub_id:
        return measure_cpu(config.training.precision), True, []
    return DEVICES[USUAL], False, [f"there is no GPU here: planned for {USUAL}; name yours with --gpu"]


def _buckets(config: RunConfig, found: WanVariant, clips: bool) -> tuple[Bucket, ...]:
    """Those of the clips where they are here, else those of the curriculum."""
    width, height = config.data.size
    stages = stage_frames(config.data.num_frames, config.data.frames_schedule)
    shapes = dict.fromkeys(frames for _, frames in stages)
    if problems := [each for frames in shapes for each in check_shape(found.spec, frames, config.data.size)]:
        raise ConfigError(list(dict.fromkeys(problems)))
    curriculum = tuple(dict.fromkeys((frames, height, width) for _, frames in stages))
    if not clips or not Path(config.data.source).exists():
        return curriculum
    said: list[str] = []
    sources = read_sources(config.data, found.spec, said.append)
    placed = place(sources, config.data, found.spec, config.training.seed, said.append)
    own = (item.clip.bucket for item in placed if item.split == "train")
    return tuple(dict.fromkeys((bucket.frames, bucket.height, bucket.width) for bucket in own)) or curriculum
