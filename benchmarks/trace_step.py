"""Traces one whole LoRA training step on the `meta` device and prints its peak bytes: no GPU, no weights, no data.

    python benchmarks/trace_step.py
    python benchmarks/trace_step.py --model wan2.1-t2v-1.3b --frames 81 --size 832x480
    python benchmarks/trace_step.py --strategies "most frugal" --frames 129 --explain

It prints peaks under named strategies and how they grow with the tokens; what is alive at the peak of the longest clip,
and what the strategy costs there; what fits which card; and how plain checkpointing's peak comes about from that of a
simpler trace.
"""

import argparse
import gc
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TypeAlias

import torch
from meta_training import Details, Step, Traced, as_it_was, build, meta_batch, trace

from longtake.config.schema import LoraConfig, MemoryStrategy, TrainingConfig
from longtake.memory.quantization import quantize_blocks
from longtake.memory.strategy import MOST_FRUGAL_HEAD_GROUPS, MOST_FRUGAL_SLICES
from longtake.models.wan.variants import VARIANTS, variant
from longtake.planner.ledger import Ledger
from longtake.training.batch import Batch

PLAIN = "per block"
SWAPPED = "inputs to host, all swapped"
ONE_GROUP = "inputs to host, all swapped, 16 slices"
"""Traced on request alone: traces in slices take longest."""
MOST_FRUGAL = "most frugal"
"""The one before it in `strategies` but for the optimiser's states, which wait in host memory."""
KINDS = ("weights", "buffers", "adapters", "gradients", "optimizer", "checkpoints", "block", "workspace")
OF_ANOTHER_TRACE = 69.0
"""GiB per block at 129 frames, from a trace of diffusers' model alone that was made without this program."""
SIMPLER = Details(torch.bfloat16, adam=False, fused_rms_norm=False, workspaces=False)
CHANGES = (
    ("rms_norm is CUDA's one operator and keeps its bf16 input, no fp32 intermediates", {"fused_rms_norm": True}),
    ("adapters in fp32, with peft's fp32 copy of each one's input", {"adapters": torch.float32, "peft_casts": True}),
    ("without those copies, which `compute_in` switches off", {"peft_casts": False}),
    ("AdamW's two moments in fp32, and its update", {"adam": True}),
    ("workspaces of attention's backward pass", {"workspaces": True}),
)
"""From the simpler trace to that of the trainer's step."""
QUANTISED = ("inputs to host, int8", "inputs to host, nf4", "inputs to host, all swapped, int8")
CARDS = (80, 48, 24, 16)
SPARE = 0.1
"""Share of a card that its table leaves to the CUDA context and to the allocator's slack."""
Steps: TypeAlias = dict[tuple[str, int], Step]
"""By strategy and frames."""


@dataclass(frozen=True)
class Case:
    """What is traced: a model's name, (width, height) in pixels, the LoRA's rank."""

    model: str
    size: tuple[int, int]
    rank: int

    def tokens(self, frames: int) -> int:
        """Of a clip."""
        return variant(self.model).spec.tokens(frames, self.size[1], self.size[0])


def strategies(blocks: int) -> dict[str, MemoryStrategy]:
    """The named strategies for a model of `blocks` blocks; all but the quantised ones are exact."""
    host, kept = {"activation_offload": "host"}, {"gradient_checkpointing": "block_keep_attention"}
    half, swapped = {"block_swap": max(blocks // 2, 3)}, {**host, "block_swap": blocks}
    sliced = {**swapped, "slices": MOST_FRUGAL_SLICES}
    grouped = {**sliced, "attention_head_groups": MOST_FRUGAL_HEAD_GROUPS}
    named = {
        "no checkpointing": {"gradient_checkpointing": "none"},
        "every 2 blocks": {"checkpoint_every": 2},
        PLAIN: {},
        "per block, 8-bit AdamW": {"optimizer": "adamw8bit"},
        "per block, attention kept": kept,
        "inputs to host": host,
        "inputs and attention to host": {**host, **kept},
        "inputs to host, half swapped": {**host, **half},
        "inputs and attention to host, half swapped": {**host, **kept, **half},
        SWAPPED: swapped,
        "inputs and attention to host, all swapped": {**swapped, **kept},
        ONE_GROUP: sliced,
        "inputs to host, all swapped, 16 slices, 4 head groups": grouped,
        "inputs and attention to host, all swapped, 16 slices, 4 head groups": {**grouped, **kept},
        MOST_FRUGAL: {**grouped, "optimizer_offload": True},
        QUANTISED[0]: {**host, "quantization": "int8"},
        QUANTISED[1]: {**host, "quantization": "nf4"},
        QUANTISED[2]: {**swapped, "quantization": "int8"},
    }
    return {name: MemoryStrategy.model_validate(fields) for name, fields in named.items()}


def steps(case: Case, names: Sequence[str], frames: Sequence[int], workers: Executor) -> Steps:
    """Traces of a step of one clip under every strategy, by (strategy, frames)."""
    chosen = strategies(variant(case.model).transformer_config["num_layers"])
    tasks: list[tuple[str, tuple[int, ...]]] = []
    for name in names:
        together = chosen[name].quantization != "none"  # quantising takes longer than tracing
        tasks += [(name, tuple(frames))] if together else [(name, (each,)) for each in frames]
    longest = sorted(tasks, key=lambda task: -chosen[task[0]].slices)
    found: Steps = {}
    for task, traced in zip(longest, workers.map(partial(_traced, case), longest), strict=True):
        found |= {(task[0], each): step for each, step in zip(task[1], traced, strict=True)}
    return found


def reconciliation(traced: Traced, case: Case, frames: int) -> Iterator[tuple[str, int]]:
    """(change, peak after it) on the way from a simpler trace per block, which comes first, to the trainer's step."""
    details, batch = SIMPLER, meta_batch(traced.spec, frames, case.size)
    yield "bf16 adapters, no optimiser, decomposed rms_norm, no workspaces", _peak(traced, batch, details)
    for what, change in CHANGES:
        details = replace(details, **change)
        yield what, _peak(traced, batch, details)


def bytes_a_token(found: Steps, case: Case, name: str, frames: Sequence[int]) -> float:
    """By how much the peak grows with the tokens between two lengths of clip."""
    fewer, more = (found[name, each].peak.total() for each in frames)
    return (more - fewer) / (case.tokens(frames[1]) - case.tokens(frames[0]))


@cache
def model_of(case: Case) -> Traced:
    """The model on `meta` with its adapter; one for each process."""
    lora = LoraConfig(rank=case.rank, alpha=case.rank)
    return build(variant(case.model), lora, TrainingConfig(micro_batch_size=1))


def _traced(case: Case, task: tuple[str, tuple[int, ...]]) -> list[Step]:
    traced = model_of(case)
    gc.collect()
    gc.freeze()  # the model stays, and need not be searched for garbage all the time: a third of the trace's
    strategy = strategies(len(traced.transformer.blocks))[task[0]]
    with as_it_was(traced.transformer):
        if strategy.quantization != "none":
            with Ledger():  # which remembers what slow kernels on `meta` give
                quantize_blocks(traced.transformer, traced.spec, strategy.quantization)
        found = [trace(traced, strategy, meta_batch(traced.spec, frames, case.size)) for frames in task[1]]
    return [replace(step, timeline=[]) for step in found]


def _peak(traced: Traced, batch: Batch, details: Details) -> int:
    return trace(traced, MemoryStrategy(), batch, details).peak.total()


def peaks(found: Steps, case: Case, names: Sequence[str], frames: Sequence[int]) -> Iterator[str]:
    """The table of peaks, and their growth between the two longest clips."""
    yield "| peak, GiB | " + " | ".join(f"{each} frames" for each in frames) + " | bytes a token |"
    yield "|---|" + "--:|" * (len(frames) + 1)
    yield "| tokens | " + " | ".join(f"{case.tokens(each):,}" for each in frames) + " | |"
    for name in names:
        shown = [gib(found[name, each].peak.total()) for each in frames]
        growth = f"{bytes_a_token(found, case, name, frames[-2:]):,.0f}" if len(frames) > 1 else ""
        yield f"| {name} | " + " | ".join(shown) + f" | {growth} |"


def breakdown(found: Steps, names: Sequence[str], frames: int) -> Iterator[str]:
    """What is alive at the peak."""
    yield "| alive at the peak, GiB | " + " | ".join(KINDS) + " |"
    yield "|---|" + "--:|" * len(KINDS)
    for name in names:
        yield f"| {name} | " + " | ".join(gib(found[name, frames].peak[kind]) for kind in KINDS) + " |"


def costs(found: Steps, names: Sequence[str], frames: int) -> Iterator[str]:
    """Host memory, bytes over the bus and floating-point operations; the last compared with no checkpointing."""
    yield "| | host memory, GiB | to the device, GiB | from the device, GiB | PFLOP | more than without checkpointing |"
    yield "|---|--:|--:|--:|--:|--:|"
    least = found["no checkpointing", frames].flops if ("no checkpointing", frames) in found else None
    for name in names:
        step = found[name, frames]
        moved = [gib(count) for count in (step.host_bytes, step.moved["inward"], step.moved["outward"])]
        more = f"{100 * (step.flops / least - 1):.1f} %" if least else ""
        yield f"| {name} | " + " | ".join(moved) + f" | {step.flops / 1e15:.2f} | {more} |"


def cards(found: Steps, names: Sequence[str], frames: Sequence[int]) -> Iterator[str]:
    """For each card the exact strategy that leaves SPARE of it and computes least, then copies least."""
    yield "| card, GiB | " + " | ".join(f"{each} frames" for each in frames) + " |"
    yield "|--:|" + "---|" * len(frames)
    for card in CARDS:
        chosen = [_for_card(found, names, each, card) for each in frames]
        yield f"| {card} | " + " | ".join(chosen) + " |"


def _for_card(found: Steps, names: Sequence[str], frames: int, card: int) -> str:
    exact = {name for name, strategy in strategies(40).items() if strategy.optimizer == "adamw"} - set(QUANTISED)
    steps = {name: found[name, frames] for name in names if name in exact}
    fitting = {name: step for name, step in steps.items() if step.peak.total() <= (1 - SPARE) * card * 2**30}
    if not fitting:
        return "none"
    best = min(fitting, key=lambda name: (fitting[name].flops, fitting[name].moved.total()))
    return f"{best}: {gib(fitting[best].peak.total())}, host {gib(fitting[best].host_bytes)}"


def way(lines: Sequence[tuple[str, int]]) -> Iterator[str]:
    """The reconciliation's table."""
    yield f"| per block, made elsewhere (14B, 129 frames) | | {OF_ANOTHER_TRACE:.2f} |\n|---|--:|--:|"
    (what, before), *changes = lines
    yield f"| {what} | | {gib(before)} |"
    for what, peak in changes:
        yield f"| {what} | {(peak - before) / 2**30:+.2f} | {gib(peak)} |"
        before = peak


def explained(case: Case, name: str, frames: int) -> Iterator[str]:
    """The largest storages that are alive at the peak, and which operator made each."""
    traced = model_of(case)
    strategy, batch = strategies(len(traced.transformer.blocks))[name], meta_batch(traced.spec, frames, case.size)
    peak = trace(traced, strategy, batch).peak.total()
    for storage in trace(traced, strategy, batch, explain_at=peak).largest[:40]:
        yield f"{storage.nbytes:>14,} {storage.kind:10} {storage.operator}"


def gib(count: float) -> str:
    """Bytes in GiB."""
    return f"{count / 2**30:.2f}"


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", default="wan2.1-i2v-14b-480p", choices=[*VARIANTS])
    parser.add_argument("--frames", type=int, nargs="+", default=[49, 81, 129])
    parser.add_argument("--size", default="832x480", help="width x height in pixels")
    parser.add_argument("--rank", type=int, default=32)
    known = [*strategies(40)]
    usual = [name for name in known if name != ONE_GROUP]
    parser.add_argument("--strategies", nargs="+", default=usual, choices=known, metavar="NAME")
    parser.add_argument("--explain", action="store_true", help="list the largest storages at the last peak, no tables")
    return parser.parse_args()


def main() -> None:
    """Reads the command line and prints the tables."""
    chosen, started = options(), time.perf_counter()
    width, height = (int(side) for side in chosen.size.split("x"))
    case = Case(chosen.model, (width, height), chosen.rank)
    names, frames = chosen.strategies, sorted(chosen.frames)
    if chosen.explain:
        print(*explained(case, names[-1], frames[-1]), sep="\n")
        return
    print(f"{case.model}, LoRA r{case.rank} (attention, ffn), {chosen.size}, one clip, bf16\n")
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as workers:
        found = steps(case, names, frames, workers)
    last = frames[-1]
    tables = [peaks(found, case, names, frames), breakdown(found, names, last), costs(found, names, last)]
    for table in (*tables, cards(found, names, frames)):
        print(*table, "", sep="\n", flush=True)
    print(*way([*reconciliation(model_of(case), case, last)]), sep="\n")
    seconds = time.perf_counter() - started
    print(f"\n{last} frames where not said otherwise; {seconds:.0f} s; torch {torch.__version__}")


if __name__ == "__main__":
    main()
