"""What `longtake plan` does: flags and a config to a report on the terminal, as JSON, as a page, as a TOML."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote

from rich.console import Console

from longtake import files
from longtake.config.flags import Flags, overrides
from longtake.config.load import Override, config_of, load_config, parse_set
from longtake.config.schema import LoraConfig, RunConfig
from longtake.errors import ConfigError, NothingFits, Problem
from longtake.models.libraries import quiet_libraries
from longtake.planner.candidates import open_conflicts
from longtake.planner.page import write_html
from longtake.planner.plans import Report
from longtake.planner.report import print_report, to_json
from longtake.planner.toml import write_toml
from longtake.planner.words import training_command

LONGEST = "max"
FILE_WIDTH = 120
"""Columns of what goes to a file or a pipe."""


@dataclass(frozen=True)
class Asked:
    """What the command line says beside the flags that `train` has too; empty where nothing is said."""

    config: Path | None
    model: str
    num_frames: str
    size: str
    method: str
    gpu: str
    gpus: int
    host_memory: str
    assignments: tuple[str, ...]


def answer(asked: Asked, flags: Flags, json_file: str, html: Path | None, output: Path | None) -> int:
    """Plans and says so; the exit status, 3 where nothing fits."""
    if output is not None and output.exists():
        raise ConfigError(
            Problem("the file exists", str(output), "choose another name with -o", code="config-file-exists")
        )
    config = _config(asked, flags)
    quiet_libraries()
    from longtake.planner.advice import MOST_FRAMES, of_auto
    from longtake.planner.planning import longest_clip, plan, question_of
    from longtake.planner.request import Where, request_of
    from longtake.planner.search import Search
    from longtake.planner.tracer import Tracer

    where = Where(asked.gpu, asked.gpus, asked.host_memory)
    request, notes = request_of(config, where, clips=asked.config is not None)
    if flags.use_gradient_checkpointing or flags.use_gradient_checkpointing_offload:
        request = replace(request, as_asked=config.memory.model_copy(update={"fallbacks": ()}))
    tracer = Tracer(request.subject)
    if asked.num_frames == LONGEST:
        most = longest_clip(request, tracer)
        if most is not None:
            notes.append(f"{most} frames are {'at least ' if most == MOST_FRAMES else ''}the most that fit")
            made_for = request.variant.num_frames
            if most > made_for:
                notes.append(f"{request.variant.name} was made for {made_for} frames")
            _, height, width = request.worst
            request = replace(request, buckets=((most, height, width),))
            config = config.model_copy(update={"data": config.data.model_copy(update={"num_frames": most})})
    report = plan(request, tracer)
    if report.chosen is not None and flags.training_strategy not in (None, "auto", "single"):
        notes.append(of_auto(Search(tracer, question_of(request, request.worst)), report.plans[0]))
    report = replace(report, notes=(*filter(None, notes), *report.notes), command=_command(report, output, asked))
    _say(report, json_file)
    said = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    if html is not None:
        write_html(report, html)
        said.print(f"wrote {html}")
    if output is not None and report.chosen is not None:
        _write_config(config, report, output)
        said.print(f"wrote {output}")
    return NothingFits.exit_status if report.chosen is None else 0


def _say(report: Report, json_file: str) -> None:
    text = json.dumps(to_json(report), indent=1) + "\n"
    if json_file == "-":
        sys.stdout.write(text)
        return
    if json_file:
        files.write_text(Path(json_file), text)
    print_report(report, Console(width=None if sys.stdout.isatty() else FILE_WIDTH))


def _write_config(config: RunConfig, report: Report, output: Path) -> None:
    assert report.chosen is not None
    chosen = report.plans[report.chosen]
    planned = replace(chosen, strategy=chosen.strategy.model_copy(update={"budget": config.memory.budget}))
    header = [
        f"{report.model}: {chosen.name}",
        f"planned for {report.gpus} x {report.gpu}: {chosen.peak_bytes['device'] / 2**30:.1f} GiB on the device, "
        f"{chosen.peak_bytes['host'] / 2**30:.1f} GiB of host memory, {chosen.step_seconds:.1f} s a step",
        training_command(quote(output.name), report.gpus),
    ]
    write_toml(config, planned, output, header)


def _command(report: Report, output: Path | None, asked: Asked) -> str:
    """What trains the chosen plan."""
    if report.chosen is None:
        return ""
    command = training_command(quote(str(output or asked.config or "planned.toml")), report.gpus)
    if output is not None and asked.config is None:
        return f"{command}  # with data.source and output.run set in it"
    if output is not None or asked.config is not None:
        return command
    return f"add -o planned.toml, set data.source in it, then: {command}"


def _config(asked: Asked, flags: Flags) -> RunConfig:
    """The config with all that the command line says on top, which is printed."""
    given = [*parse_set(asked.assignments), *_own(asked)]
    given += overrides(flags, asked.config or Path(), given, max(1, asked.gpus))
    if asked.config is not None:
        config = load_config(asked.config, given)
    elif asked.model:
        config = config_of({"data": {"source": "clips"}, "lora": {}, "output": {"run": "runs/planned"}}, given)
    else:
        raise ConfigError(
            Problem("there is nothing to plan", "longtake plan", "give a config, or --model", code="plan-of-nothing")
        )
    if asked.method:
        config = _with_method(config, asked.method)
    said = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    for override in given:
        said.print(f"{override.key} = {override.value!r}  ({override.flag})")
    if found := [*open_conflicts(config, max(1, asked.gpus))]:
        raise ConfigError(found)
    return config


def _own(asked: Asked) -> Iterator[Override]:
    """What only `plan` can be told."""
    if asked.model:
        key = "model.path" if Path(asked.model).exists() else "model.name"
        yield Override(key, asked.model, "--model")
    if asked.num_frames and asked.num_frames != LONGEST:
        yield Override("data.num_frames", _whole(asked.num_frames, "--num-frames"), "--num-frames")
        if asked.config is not None:
            yield Override("data.frames_schedule", [], "--num-frames")
    if asked.size:
        yield Override("data.size", [_whole(side, "--size") for side in asked.size.lower().split("x")], "--size")


def _whole(text: str, flag: str) -> int:
    try:
        return int(text)
    except ValueError:
        remedy = 'write a whole number, or "max"' if flag == "--num-frames" else "write WIDTHxHEIGHT: 832x480"
        raise ConfigError(Problem(f"cannot read {text!r}", flag, remedy, code="flag-unreadable")) from None


def _with_method(config: RunConfig, method: str) -> RunConfig:
    if method not in ("lora", "full"):
        raise ConfigError(
            Problem(f"there is no method {method!r}", "--method", "use lora or full", code="plan-method-unknown")
        )
    return config.model_copy(update={"lora": None if method == "full" else config.lora or LoraConfig()})
