"""Writes recipes/<model>-lora-<card>gb.toml: for each published model and class of card what the planner chooses.

python scripts/make_recipes.py                  # all of them, a few seconds each
python scripts/make_recipes.py wan2.2-ti2v-5b   # those of a model
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from longtake.config.load import config_of
from longtake.config.schema import MemoryStrategy, RunConfig
from longtake.models.libraries import quiet_libraries
from longtake.models.wan.variants import VARIANTS, WanVariant
from longtake.planner.planning import plan
from longtake.planner.plans import Report
from longtake.planner.request import Where, request_of
from longtake.planner.tracer import Tracer

FOLDER = Path(__file__).parents[1] / "recipes"
STEPS = 2000
SMALL = (832, 480)
MOST_HOURS = 72
"""Of the clips that fit, a recipe is for the largest whose steps take no longer in all."""


@dataclass(frozen=True)
class Card:
    """A class of cards: `name` is planned for, with a budget that leaves a display some memory."""

    gigabytes: int
    name: str
    budget: str
    host_memory: str
    others: str


CARDS = (
    Card(16, "rtx-4080", "14.5GiB", "64GiB", "RTX 4080, 4060 Ti 16GB, A4000"),
    Card(24, "rtx-4090", "22GiB", "64GiB", "RTX 4090, 3090, A5000, L4"),
    Card(48, "l40s", "43GiB", "128GiB", "L40S, RTX A6000, RTX 6000 Ada"),
    Card(80, "h100-sxm", "77GiB", "192GiB", "H100, A100 80GB"),
)


@dataclass(frozen=True)
class Clip:
    """What is trained on."""

    num_frames: int
    size: tuple[int, int]


def clips(model: WanVariant) -> Iterator[Clip]:
    """What the model was made for; then what 480p models were; then fewer frames of that."""
    yield Clip(model.num_frames, model.size)
    if model.size == (1280, 720):
        yield Clip(model.num_frames, SMALL)
    yield Clip(49, SMALL if model.vae == "2.1" else model.size)


def config_for(model: WanVariant, clip: Clip, card: Card) -> RunConfig:
    """The run that is planned, its strategy left open."""
    table = {
        "model": {"name": model.name},
        "data": {"source": "clips/", "num_frames": clip.num_frames, "size": clip.size},
        "lora": {"rank": 32, "alpha": 32.0},
        "training": {"steps": STEPS, "global_batch_size": 1, "shift": shift_of(model, clip)},
        "memory": {"budget": card.budget},
        "output": {"run": f"runs/{model.name}"},
    }
    return config_of(table, [])


def shift_of(model: WanVariant, clip: Clip) -> float:
    """The authors' for the size."""
    return 3.0 if clip.size == SMALL else model.shift


def planned(model: WanVariant, card: Card, tracers: dict[float, Tracer], choice: Sequence[Clip]) -> tuple[Clip, Report]:
    """The largest clips that a card has room for and trains on in a few days, or the smallest; with the report."""
    found = []
    for clip in choice:
        config = config_for(model, clip, card)
        request, _ = request_of(config, Where(gpu=card.name, host_memory=card.host_memory), clips=False)
        tracer = tracers.setdefault(shift_of(model, clip), Tracer(request.subject))
        report = plan(request, tracer)
        if report.chosen is None:
            continue
        found.append((clip, report))
        if seconds_of(report) * STEPS <= MOST_HOURS * 3600:
            break
    if not found:
        raise SystemExit(f"{model.name} fits no {card.gigabytes} GB")
    return found[-1]


def seconds_of(report: Report) -> float:
    """Of a step of the chosen plan."""
    assert report.chosen is not None
    return report.plans[report.chosen].step_seconds


LONG = Clip(129, SMALL)
"""What the model at the top of README.md is trained on, on the smallest card and on the largest."""


def recipe(model: WanVariant, card: Card, tracers: dict[float, Tracer], wanted: Clip | None = None) -> str:
    """The text of a recipe, for `wanted` clips if they are given."""
    clip, report = planned(model, card, tracers, [wanted] if wanted else [*clips(model)])
    (width, height), num_frames = clip.size, clip.num_frames
    assert report.chosen is not None
    chosen = report.plans[report.chosen]
    device, host = (chosen.peak_bytes[tier] / 2**30 for tier in ("device", "host"))
    seconds = chosen.step_seconds
    shift = shift_of(model, clip)
    title = model.hub_id.split("/")[1].removesuffix("-Diffusers").removesuffix("-diffusers")
    lines = [
        f"# LoRA of {title} at {num_frames} frames of {width}x{height} on one GPU with {card.gigabytes} GB:",
        f"# {chosen.name}.",
        "#",
        f"#   cp recipes/{name_of(model, card, clip)} run.toml    # paths below are relative to the file",
        "#   longtake prepare run.toml",
        "#   longtake train run.toml",
        "#",
        f"# Hardware: one NVIDIA GPU with {card.gigabytes} GB ({card.others}), {card.host_memory.removesuffix('GiB')}"
        " GB of host memory.",
        f"# Peak: {device:.1f} GiB on the GPU, {host:.1f} GiB of host memory.",
        f"# Time: {seconds:.1f} s a step of one clip on {card.name}; {STEPS} steps are"
        f" {STEPS * seconds / 3600:.0f} hours.",
        "# Planned, not measured on a GPU:",
        f"#   longtake plan --model {model.name} --num-frames {num_frames} --size {width}x{height}"
        f" --gpu {card.name} --budget {card.budget} --host-memory {card.host_memory}"
        f" --set training.shift={shift:g} --set training.global_batch_size=1",
        "",
        "[model]",
        f'name = "{model.name}"',
        *(('expert = "both"',) if len(model.spec.experts) == 2 else ()),
        "",
        "[data]",
        'source = "clips/"',
        'cache = "cache/"',
        f"num_frames = {num_frames}",
        f"size = [{width}, {height}]",
        "",
        "[lora]",
        "rank = 32",
        "alpha = 32",
        "",
        "[training]",
        f"steps = {STEPS}",
        "global_batch_size = 1",
        'precision = "bf16"',
        "learning_rate = 1e-4",
        f"shift = {shift}",
        "",
        "[memory]",
        *fields(chosen.strategy),
        "",
        "[validation]",
        "every = 250",
        "",
        "[output]",
        f'run = "runs/{model.name}"',
        "save_every = 100",
    ]
    return "\n".join(lines) + "\n"


def fields(strategy: MemoryStrategy) -> Iterator[str]:
    """Those that are not the default, and always the first."""
    defaults = MemoryStrategy().model_dump()
    for field, value in strategy.model_dump(exclude={"budget", "fallbacks"}).items():
        if field == "gradient_checkpointing" or value != defaults[field]:
            text = str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else value
            yield f"{field} = {text}"


def name_of(model: WanVariant, card: Card, clip: Clip | None = None) -> str:
    """Of the file."""
    long = "-129f" if clip == LONG else ""
    return f"{model.name}{long}-lora-{card.gigabytes}gb.toml"


def main() -> None:
    """Writes the recipes of the models that are named, or of all."""
    quiet_libraries()
    wanted = sys.argv[1:] or [name for name, model in VARIANTS.items() if model.hub_id]
    for name in wanted:
        tracers: dict[float, Tracer] = {}
        for card in CARDS:
            path = FOLDER / name_of(VARIANTS[name], card)
            path.write_text(recipe(VARIANTS[name], card, tracers), encoding="utf-8")
            print(path, flush=True)
        for card in (CARDS[0], CARDS[-1]) if name == "wan2.1-i2v-14b-480p" else ():
            path = FOLDER / name_of(VARIANTS[name], card, LONG)
            path.write_text(recipe(VARIANTS[name], card, tracers, LONG), encoding="utf-8")
            print(path, flush=True)


if __name__ == "__main__":
    main()
