"""A plan in words: the answer in one line, what it costs, its settings, the command that trains it. Needs no torch."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from longtake.config.schema import MemoryStrategy, ParallelConfig
from longtake.planner.events import KINDS
from longtake.planner.naming import MACHINE_GPUS
from longtake.planner.plans import Bucket, Plan, Report, Stage, StagePeak, Tier
from longtake.units import format_bytes

PARTS = (*KINDS, "allocator_slack", "context")
"""What a peak on the device is made of, in the order in which it is drawn."""
LETTERS: Mapping[str, str] = dict(zip(PARTS, "wagocbukSX", strict=True))
"""A letter for each of PARTS, for bars without colours."""
MEANINGS: Mapping[str, str] = {
    "weights": "the model's weights that stay on the device",
    "adapters": "the LoRA that is trained",
    "gradients": "of what is trained",
    "optimizer": "AdamW's states",
    "checkpoints": "what blocks keep for the backward pass",
    "block": "activations and their gradients, the batch",
    "buffers": "what copies fill: streamed weights, what comes back",
    "workspace": "inside kernels",
    "allocator_slack": "reserved by the allocator, not used",
    "context": "CUDA's context, and NCCL's",
}
STAGES: Mapping[Stage, str] = {
    "prepare": "prepare",
    "train": "training",
    "validation": "validation",
    "sampling": "sampling",
    "save": "saving",
}
"""Each stage in words, in the order of a run."""
MOST_BUDGET = 4
"""A budget that is so many times a plan's peak is left out of pictures, in which the bytes would be too low to read."""
RENDEZVOUS = "--max-restarts 3 --rdzv-id my-run --rdzv-backend c10d --rdzv-endpoint host0:29500"
"""How ranks of several machines find each other: `my-run` is any name, `host0` one of the machines."""
SEPARATE_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
"""Else ranks that are started again after a failure often do not find each other."""
_FACTORS = {"MiB": 2.0**20, "GiB": 2.0**30}


def answer(report: Report) -> str:
    """The one line that somebody who asks wants: whether it fits, how fast it is, and where the peak is."""
    budget = format_bytes(report.budget_bytes)
    if not report.plans:
        return f"nothing fits {budget}: there is no plan"
    plan = report.plans[report.chosen or 0]
    device = format_bytes(plan.peak_bytes.get("device", 0))
    if report.chosen is None:
        return f"nothing fits {budget}: the nearest plan needs {device} ({why_not(report, plan)})"
    speed = f"{seconds_words(plan.step_seconds)} a step, bound by {plain(plan.bound_by)}"
    return f"fits: {used_of_budget(report, plan)}, {speed}; the peak is in {peak_words(plan)}"


def used_of_budget(report: Report, plan: Plan) -> str:
    """`22.6 of 24.0 GiB`."""
    device, budget = format_bytes(plan.peak_bytes.get("device", 0)), format_bytes(report.budget_bytes)
    number, _, unit = device.partition(" ")
    return f"{number if budget.endswith(unit) else device} of {budget}"


def case(report: Report) -> str:
    """What the answer is about."""
    what = f"{report.model}, {report.task}, {'LoRA' if report.method == 'lora' else 'full fine-tuning'}"
    shape = f"{bucket_words(report.bucket)} ({report.tokens:,} tokens)"
    return plain(f"{what}; {shape}; {report.gpus} x {report.gpu}; planned in {seconds_words(report.seconds)}")


def why_not(report: Report, plan: Plan) -> str:
    """Why `plan` does not fit: what the planner said, or by how much it exceeds which budget; empty where it fits."""
    if plan.fits or plan.why_not:
        return plain(plan.why_not)
    over = [f"{format_bytes(nbytes)} more than the {tier}'s budget" for tier, nbytes in _excess(report, plan).items()]
    return ", ".join(over) or "another stage does not fit"


def verdict(report: Report, plan: Plan) -> str:
    """`yes`, or `no` with the tiers whose budget is exceeded."""
    over = ", ".join(_excess(report, plan))
    return "yes" if plan.fits else f"no: {over}" if over else "no"


def scale_bytes(peak_bytes: int, budget_bytes: int) -> int:
    """The bytes that a picture of a peak has to have room for: the budget too, unless it is far above."""
    return max(peak_bytes, budget_bytes if budget_bytes <= MOST_BUDGET * peak_bytes else 0, 1)


def peak_words(plan: Plan) -> str:
    """Where a plan's peak is: `training at 129 frames of 832x480`, `validation, UMT5`."""
    if plan.stage == "train":
        return f"training at {bucket_words(plan.bucket)}"
    among = [stage for stage in plan.stages if stage.stage == plan.stage and stage.what]
    what = plain(max(among, key=lambda stage: stage.device_bytes).what) if among else ""
    return f"{STAGES[plan.stage]}, {what}" if what else STAGES[plan.stage]


def bucket_words(bucket: Bucket) -> str:
    """`129 frames of 832x480`."""
    frames, height, width = bucket
    return f"{frames} frames of {width}x{height}"


def costs(plan: Plan) -> str:
    """What a plan takes beside the device's memory."""
    host, disk = plan.peak_bytes.get("host", 0), plan.peak_bytes.get("disk", 0)
    places = [f"{format_bytes(host)} of host memory" if host else "", f"{format_bytes(disk)} on disk" if disk else ""]
    used = ", ".join(place for place in places if place) or "nothing beside the device's memory"
    if plan.stalled_seconds < 0.001 * plan.step_seconds:
        return f"{used}; no waiting for copies"
    return (
        f"{used}; {seconds_words(plan.stalled_seconds)} of each step's {seconds_words(plan.step_seconds)} are waiting"
    )


def all_stages(plan: Plan) -> list[StagePeak]:
    """The stages of a run in its order, training among them where the plan tells what it needs."""
    stages = list(plan.stages)
    largest = max(plan.buckets, key=lambda needs: needs.device_bytes, default=None)
    host_bytes = plan.peak_bytes.get("host", 0)
    if plan.stage == "train":
        stages.append(StagePeak("train", bucket_words(plan.bucket), plan.peak_bytes.get("device", 0), host_bytes))
    elif largest is not None:
        stages.append(StagePeak("train", bucket_words(largest.bucket), largest.device_bytes, host_bytes))
    order = list(STAGES)
    return sorted(stages, key=lambda stage: order.index(stage.stage))


def settings(plan: Plan) -> list[tuple[str, str]]:
    """(section.key, value as TOML) of what makes a plan: its checkpointing, micro-batch, and all that is not usual."""
    usual = _fields(MemoryStrategy(), ParallelConfig(), 0)
    always = "memory.gradient_checkpointing"
    fields = _fields(plan.strategy, plan.parallel, plan.micro_batch_size)
    return [(key, json.dumps(value)) for key, value in fields.items() if key == always or value != usual[key]]


def command_of(report: Report, plan: Plan) -> str:
    """The command that trains `plan`: the chosen one's, with what `plan` has otherwise set on top.

    Empty where none was chosen, as there is no command to start from.
    """
    chosen = None if report.chosen is None else report.plans[report.chosen]
    if chosen is None or not report.command or plan is chosen:
        return report.command if plan is chosen else ""
    before = _fields(chosen.strategy, chosen.parallel, chosen.micro_batch_size)
    after = _fields(plan.strategy, plan.parallel, plan.micro_batch_size)
    changes = [f"{key}={_as_set(value)}" for key, value in after.items() if value != before[key]]
    if changes and chosen.strategy.fallbacks:
        changes.append("memory.fallbacks=[]")  # what another strategy falls back to may not go with this one
    command, mark, comment = report.command.partition("  # ")
    return " ".join([command, *(f"--set {shlex.quote(change)}" for change in changes)]) + mark + comment


def training_command(file: str, gpus: int) -> str:
    """What prepares and trains `file` on so many GPUs; if they are of several machines, each of them is to train."""
    prepare = f"longtake prepare {file} && "
    if gpus <= MACHINE_GPUS:
        return f"{prepare}longtake train {file}{f' --gpus {gpus}' if gpus > 1 else ''}"
    machines = next(count for count in range(2, gpus + 1) if gpus % count == 0 and gpus // count <= MACHINE_GPUS)
    each = f"--nnodes {machines} --nproc-per-node {gpus // machines} {RENDEZVOUS}"
    return f"{prepare}{SEPARATE_STORE} torchrun {each} -m longtake train {file}"


def seconds_words(seconds: float) -> str:
    """`41.2 s`, `0.83 s`, `1240 s`: three digits where there are not more before the point."""
    if seconds < 0.1:
        return f"{seconds:.2g} s"
    decimals = 0 if seconds >= 99.95 else 1 if seconds >= 9.995 else 2
    return f"{seconds:.{decimals}f} s"


def unit_of(counts: Iterable[int]) -> str:
    """The unit in which a table of bytes reads best: `GiB`, or `MiB` where none of them is a GiB."""
    return "GiB" if max(counts, default=0) >= _FACTORS["GiB"] else "MiB"


def in_unit(count: int, unit: str) -> str:
    """`count` bytes in `unit`, one decimal, without the unit; 0 as such."""
    return f"{count / _FACTORS[unit]:.1f}" if count else "0"


def plain(text: str) -> str:
    """`text` as one line without characters that a terminal would obey."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _excess(report: Report, plan: Plan) -> dict[Tier, int]:
    """By how many bytes a plan exceeds which budgets."""
    budgets: dict[Tier, int] = {
        "device": report.budget_bytes,
        "host": report.host_budget_bytes,
        "disk": report.disk_budget_bytes,
    }
    excess = {tier: plan.peak_bytes.get(tier, 0) - budget for tier, budget in budgets.items()}
    return {tier: nbytes for tier, nbytes in excess.items() if nbytes > 0}


def _fields(memory: MemoryStrategy, parallel: ParallelConfig, micro_batch_size: int) -> dict[str, Any]:
    """section.key -> value of what makes a plan; the budget and what to fall back to do not."""
    sections = {"memory": memory.model_dump(mode="json", exclude={"budget", "fallbacks"})}
    sections |= {"parallel": parallel.model_dump(mode="json"), "training": {"micro_batch_size": micro_batch_size}}
    return {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}


def _as_set(value: Any) -> str:
    """`value` as `--set` reads it: text that is no TOML is taken as it is."""
    return value if isinstance(value, str) else json.dumps(value)
