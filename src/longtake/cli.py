"""The command line. Heavy imports are inside each command, so that `--help` and a config's error answer at once."""

import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, Optional

import typer

from longtake import cli_doctor, cli_explain, cli_export, cli_sample
from longtake import cli_options as options
from longtake.errors import ConfigError, LongtakeError, Problem

app = typer.Typer(
    help="Fine-tune Wan video models (text-to-video, image-to-video; LoRA or full).",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

UsageError: Any = typer.BadParameter.__mro__[2]
"""Root of what typer raises for a wrong command line; it brings its own copy of click, or none, by its version."""
INTERRUPTED = 130
"""What typer makes of Ctrl-C."""


def main() -> None:
    """Runs the command line; exits with 0, 1 (failed), 2 (the input is wrong) or 3 (nothing fits)."""
    try:
        # not standalone: typer would print a box of several lines for a wrong flag
        status = app(sys.argv[1:] or ["--help"], prog_name="longtake", standalone_mode=False)
    except LongtakeError as error:
        _leave(error.problems, error.exit_status, error.agreed)
    except UsageError as error:
        _leave([_usage_problem(error)], ConfigError.exit_status, agreed=True)
    except OSError as error:
        _leave(
            [Problem(error.strerror or str(error), str(error.filename or ""), code="system-refused")],
            LongtakeError.exit_status,
        )
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    except Exception:  # the last frame of a rank: others would wait for it; one process raises it again
        if os.environ.get("WORLD_SIZE", "1") == "1":
            raise
        # at once: other ranks wait for this one, and what is torch's might wait for them at the end of the process
        traceback.print_exc()
        _leave([Problem("ended by the error above", code="rank-crashed")], LongtakeError.exit_status)
    if status == INTERRUPTED:
        _leave([Problem("interrupted", code="command-interrupted")], LongtakeError.exit_status)
    _leave_status(status or 0)
    sys.exit(status)


@app.command()
def init(
    model: Annotated[str, typer.Option(help="Variant name, path or hub id.")],
    data: Annotated[Path, typer.Option(help="Folder of clips, or CSV, JSON, JSONL.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The TOML file to write.")] = Path("run.toml"),
) -> None:
    """Write a first config, commented, for this data and this machine."""
    _quiet_libraries()
    from longtake.progress import Reporter
    from longtake.training.first_config import write_first_config

    write_first_config(model, data, output, Reporter())
    print(f"wrote {output}; next: longtake prepare {output}")


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="Model folder, safetensors file, or LoRA.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a checkpoint is: variant, task, parameters, dtype, layout; LoRA files too."""
    from longtake.models.wan.detection import inspect as inspect_path

    found = inspect_path(path)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    for key, value in found.items():
        if value not in (None, [], (), ""):
            print(f"{key:16} {', '.join(map(str, value)) if isinstance(value, list | tuple) else value}")


cli_doctor.register(app)


@app.command()
def prepare(
    config: options.ConfigArgument,
    assignments: options.SetOption = None,
    num_frames: options.Frames = None,
    height: options.Height = None,
    width: options.Width = None,
) -> None:
    """Encode clips and captions into the conditioning cache; resumable, shared among ranks."""
    from longtake.cli_train import load
    from longtake.config.flags import Flags

    loaded = load(config, assignments or [], Flags(num_frames=num_frames, height=height, width=width))
    _quiet_libraries()
    from longtake.data.encode import component_root
    from longtake.data.encode import prepare as prepare_cache
    from longtake.distributed.backend import local_device, world
    from longtake.progress import Reporter
    from longtake.training.model import find_model

    rank, ranks = world()
    found = find_model(loaded, Reporter(quiet=rank > 0).line)
    root = component_root(found, "model.components")
    manifest = prepare_cache(loaded, found.variant.spec, root, local_device(), Reporter(), (rank, ranks))
    if rank == 0:
        print(f"{len(manifest.entries)} clips ready in {loaded.data.cache}; next: longtake train {config}")


@app.command()
def plan(
    config: options.OptionalConfig = None,
    model: Annotated[str, typer.Option("--model", help="Variant name, path or hub id.")] = "",
    num_frames: options.FramesOrMax = None,
    size: Annotated[str, typer.Option("--size", help="WIDTHxHEIGHT.")] = "",
    method: Annotated[str, typer.Option("--method", help="lora or full.")] = "",
    budget: options.Budget = None,
    gpu: Annotated[str, typer.Option("--gpu", help="A device's name: h100-sxm, rtx-4090, ...; cpu.")] = "",
    gpus: options.Gpus = 1,
    host_memory: Annotated[str, typer.Option("--host-memory", help="Host memory to use: 64GiB.")] = "",
    json_file: Annotated[str, typer.Option("--json", help="File to write as JSON, or - for the terminal.")] = "",
    html: Annotated[Optional[Path], typer.Option("--html", help="Page to write.")] = None,  # noqa: UP045
    output: Annotated[Optional[Path], typer.Option("-o", "--output", help="TOML to write.")] = None,  # noqa: UP045
    height: options.Height = None,
    width: options.Width = None,
    checkpointing: options.Checkpointing = False,
    checkpointing_offload: options.CheckpointingOffload = False,
    strategy: options.Strategy = None,
    rank: options.Rank = None,
    targets: options.Targets = None,
    accumulation: options.Accumulation = None,
    assignments: options.SetOption = None,
) -> None:
    """Say what training will need under each memory strategy, and which is the fastest that fits; no GPU is needed."""
    from longtake.config.flags import Flags
    from longtake.planner.command import Asked, answer

    flags = Flags(
        budget=budget,
        height=height,
        width=width,
        use_gradient_checkpointing=checkpointing,
        use_gradient_checkpointing_offload=checkpointing_offload,
        training_strategy=strategy,
        lora_rank=rank,
        lora_target_modules=targets,
        gradient_accumulation_steps=accumulation,
    )
    asked = Asked(config, model, num_frames or "", size, method, gpu, gpus, host_memory, tuple(assignments or ()))
    status = answer(asked, flags, json_file, html, output)
    if status:
        raise typer.Exit(status)


@app.command()
def train(
    config: options.ConfigArgument,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in output.run.")] = False,
    assignments: options.SetOption = None,
    gpus: options.GpusToStart = None,
    budget: options.Budget = None,
    num_frames: options.Frames = None,
    height: options.Height = None,
    width: options.Width = None,
    checkpointing: options.Checkpointing = False,
    checkpointing_offload: options.CheckpointingOffload = False,
    strategy: options.Strategy = None,
    rank: options.Rank = None,
    targets: options.Targets = None,
    learning_rate: options.LearningRate = None,
    accumulation: options.Accumulation = None,
) -> None:
    """Train, or continue with --resume; every flag beats the TOML."""
    from longtake import cli_train
    from longtake.config.flags import Flags

    flags = Flags(
        budget=budget,
        num_frames=num_frames,
        height=height,
        width=width,
        use_gradient_checkpointing=checkpointing,
        use_gradient_checkpointing_offload=checkpointing_offload,
        training_strategy=strategy,
        lora_rank=rank,
        lora_target_modules=targets,
        learning_rate=learning_rate,
        gradient_accumulation_steps=accumulation,
    )
    asked = cli_train.Asked(config, resume, tuple(assignments or ()), gpus, flags)
    status = cli_train.train(asked, print)
    if status:
        raise typer.Exit(status)


cli_sample.register(app)
cli_export.register(app)
cli_explain.register(app)


@app.command()
def demo(out: Annotated[Path, typer.Option(help="Folder to work in.")] = Path("demo")) -> None:
    """Go the whole way on real clips with the bundled tiny model: prepare, train, sample, report."""
    _quiet_libraries()
    from longtake.demo.demo import run_demo
    from longtake.progress import Reporter

    for line in run_demo(out, Reporter()):
        print(line)


def _quiet_libraries() -> None:
    """Before the libraries are imported: they talk then, too."""
    from longtake.models.libraries import quiet_libraries

    quiet_libraries()


def _leave(problems: Sequence[Problem], status: int, agreed: bool = False) -> NoReturn:
    """Ends with one line a problem; of ranks that all have it the first says it, one that is alone names itself."""
    rank, alone = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1") == "1"
    if alone or not agreed or rank == "0":
        of_rank = "" if alone or agreed else f"rank {rank}: "
        for problem in problems:
            print(f"error: {of_rank}{problem}", file=sys.stderr, flush=True)
    _leave_status(status)
    if alone:
        sys.exit(status)
    if agreed:  # a launcher ends the others as soon as one leaves: not before all has been said
        _meet_again()
    os._exit(status)  # other ranks may wait for this one: nothing of torch's is waited for at its end


def _meet_again() -> None:
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def _leave_status(status: int) -> None:
    from longtake.distributed.launch import leave_status

    leave_status(status)


def _usage_problem(error: Any) -> Problem:
    """A wrong command line in one line; `error` is of `UsageError`."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "longtake"
    return Problem(error.format_message().rstrip("."), command, f"see `{command} --help`", code="command-wrong")
