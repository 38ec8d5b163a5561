"""What would have to change where nothing fits: fewer frames, a smaller size, another device; each with its number."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from longtake.config.schema import MemoryStrategy, ParallelConfig
from longtake.config.sharing import sharing_conflicts
from longtake.planner.candidates import CUTS, Freedom, allowed, bases, frugal
from longtake.planner.hardware import DEVICES
from longtake.planner.load import Load
from longtake.planner.naming import name_of
from longtake.planner.parts import Parts
from longtake.planner.plans import Advice, Bucket, Plan
from longtake.planner.search import Candidate, Question, Search
from longtake.planner.words import seconds_words
from longtake.units import format_bytes

NO_MATTER = 0.02
"""Differences that no plan is right about."""
STRIDE = 4
"""Frames of clips are 4n+1."""
MOST_FRAMES = 1025
SIZES = ((1280, 720), (1024, 576), (832, 480), (640, 368), (480, 272), (320, 192))
"""(width, height) in pixels that divide by 16, falling."""


def advice(search: Search, question: Question) -> tuple[Advice, ...]:
    """Changes, one at a time, with which the most frugal strategy that the user's pins allow fits."""
    return tuple(_found(search.parts, question))


def most_frames(parts: Parts, question: Question) -> int | None:
    """The most frames of which a clip of the question's size fits, None where not even the fewest do."""
    _, height, width = question.bucket
    known: dict[int, int] = {}

    def excess(steps: int) -> int:
        if steps not in known:
            known[steps] = _frugal(parts, replace(question, bucket=(1 + STRIDE * steps, height, width)))[1]
        return known[steps]

    fewest = 0 if parts.spec.task in ("t2v", "ti2v") else 1
    low, high = fewest, (MOST_FRAMES - 1) // STRIDE
    if excess(low) > 0:
        return None
    if excess(high) <= 0:
        return 1 + STRIDE * high
    while high - low > 1:
        # Bytes grow in proportion to the tokens, so the line through the nearest two leads there.
        guess = low + int((high - low) * -excess(low) / (excess(high) - excess(low)))
        guess = min(max(guess, low + 1), high - 1)
        if excess(guess) > 0:
            high = guess
        else:
            low = guess
            if low + 1 < high and excess(low + 1) > 0:
                high = low + 1
    return 1 + STRIDE * low


def of_auto(search: Search, chosen: Plan) -> str:
    """What `auto` would choose in place of a pinned engine, where that is faster than `chosen` or needs less."""
    found = Search(search.parts, replace(search.question, freedom=_of_any_engine(search.question.freedom)))
    best = next((each for each in found.found() if found.fits(each)), None)
    if best is None:
        return ""
    faster = best.seconds < (1 - NO_MATTER) * chosen.step_seconds
    less = best.device_bytes < (1 - NO_MATTER) * chosen.peak_bytes["device"]
    if not (faster or less):
        return ""
    name = name_of(best.strategy, best.parallel, search.parts.blocks, best.load.clips)
    needs = f"{format_bytes(best.device_bytes)}, {seconds_words(best.seconds)} a step"
    return f'parallel.strategy = "auto" would choose {name}: {needs}'


def _found(parts: Parts, question: Question) -> Iterator[Advice]:
    frames = most_frames(parts, question)
    if frames is not None and frames < question.bucket[0]:
        yield _advice(parts, replace(question, bucket=(frames, *question.bucket[1:])), f"data.num_frames = {frames}")
    for width, height in SIZES:
        smaller: Bucket = (question.bucket[0], height, width)
        if width * height < question.bucket[1] * question.bucket[2] and _fits(parts, replace(question, bucket=smaller)):
            yield _advice(parts, replace(question, bucket=smaller), f"data.size = [{width}, {height}]")
            break
    if question.freedom.pinned:
        free = replace(question, freedom=replace(question.freedom, pinned={}))
        if _fits(parts, free):
            pins = ", ".join(f"memory.{name}" for name in question.freedom.pinned)
            yield _advice(parts, free, f"leave {pins} to the planner")
    if "strategy" in question.freedom.pinned_parallel:
        free = replace(question, freedom=_of_any_engine(question.freedom))
        if _fits(parts, free):
            yield _advice(parts, free, "leave parallel.strategy to the planner")
    if not question.machine.is_cpu:
        yield from _larger(parts, question)


def _larger(parts: Parts, question: Question) -> Iterator[Advice]:
    """The smallest device of the table on which it fits, its whole memory used."""
    machine = question.machine
    for device in sorted(DEVICES.values(), key=lambda each: each.memory_bytes):
        if device.generation == "cpu" or device.memory_bytes <= machine.budget_bytes:
            continue
        larger = replace(question, machine=replace(machine, device=device, budget_bytes=device.memory_bytes))
        if _fits(parts, larger):
            yield _advice(parts, larger, f"--gpu {device.name}")
            return


def _of_any_engine(freedom: Freedom) -> Freedom:
    """With neither an engine nor what only some of them have."""
    kept = {name: value for name, value in freedom.pinned_parallel.items() if name == "sp"}
    return replace(freedom, pinned_parallel=kept)


def _fits(parts: Parts, question: Question) -> bool:
    return _frugal(parts, question)[1] <= 0


def _advice(parts: Parts, question: Question, change: str) -> Advice:
    candidate, _ = _frugal(parts, question)
    return Advice(change, candidate.device_bytes, candidate.seconds)


def _frugal(parts: Parts, question: Question) -> tuple[Candidate, int]:
    """The most frugal of the question's strategies that host and disk allow, and by how much it does not fit."""
    search, found = Search(parts, question), []
    for parallel in _sharings(search):
        for strategy in _most_frugal(parts, question, parallel):
            found.append(search.candidate(strategy, _load(question, parallel), 0, parallel))
            if search.fits(found[-1]) or found[-1].device_bytes > question.machine.budget_bytes:
                break  # the disk helps a host that is too small, and nothing else
    best = min(found, key=search.excess)
    return best, search.excess(best)


def _sharings(search: Search) -> Iterator[ParallelConfig]:
    """Those that take what is pinned of [memory], where as many ranks as can share a clip, and where none do.

    The more of them share one the less each keeps of it, but what NCCL takes grows too.
    """
    pinned, machine = MemoryStrategy(**search.question.freedom.pinned), search.machine
    heads, ways = search.parts.spec.heads, search.sharings()
    degrees = {min(each.sp for each in ways), max(each.sp for each in ways)}
    possible = [each for each in ways if not any(sharing_conflicts(pinned, each, machine.gpus, heads))]
    return (each for each in possible or ways if each.sp in degrees)


def _load(question: Question, parallel: ParallelConfig) -> Load:
    clips = question.freedom.micro_batch_size or 1
    own = question.global_batch_size * parallel.sp // question.machine.gpus
    return Load(question.bucket, clips, own > clips, parallel.sp)


def _most_frugal(parts: Parts, question: Question, parallel: ParallelConfig) -> Iterator[MemoryStrategy]:
    """All that a strategy can move away, to host memory and to the disk."""
    heads = parts.spec.heads // parallel.sp
    cut = CUTS[0] if parts.drops_out else (CUTS[-1][0], min(CUTS[-1][1], heads))
    for place in ("host", "disk"):
        wanted = {"optimizer_offload": True, "activation_offload": place, **frugal(parts.blocks, parts.frozen, cut)}
        if "block_swap" in wanted:
            wanted["block_swap_from"] = place
        pinned = dict(question.freedom.pinned)
        if pinned.get("optimizer") == "adamw8bit":
            wanted.pop("optimizer_offload")
        fields = {**wanted, **pinned}
        strategy = next(iter(bases(Freedom(fields), (fields["slices"], fields["attention_head_groups"]), {})), None)
        if strategy is None:
            continue
        swap = {name: value for name, value in fields.items() if name in ("block_swap", "block_swap_from")}
        yield allowed(strategy.model_copy(update=swap), parallel, question.machine.gpus, parts.spec.heads)
