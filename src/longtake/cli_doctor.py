"""`longtake doctor`: what the dataset will be, before anything is encoded."""

from pathlib import Path
from typing import Annotated, Optional

import typer

from longtake import cli_options as options


def register(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    app.command()(doctor)


def doctor(
    config: options.ConfigArgument,
    json_file: Annotated[str, typer.Option("--json", help="File to write as JSON, or - for the terminal.")] = "",
    html: Annotated[Optional[Path], typer.Option("--html", help="Page of the clips' pictures to write.")] = None,  # noqa: UP045
    clips: Annotated[int, typer.Option("--clips", help="Most clips on the page, evenly chosen.")] = 200,
    gpu: Annotated[str, typer.Option("--gpu", help="Device that the last line plans for, as in longtake plan.")] = "",
    no_plan: Annotated[bool, typer.Option("--no-plan", help="Leave out what the largest bucket will need.")] = False,
    assignments: options.SetOption = None,
    num_frames: options.Frames = None,
    height: options.Height = None,
    width: options.Width = None,
) -> None:
    """Say what the dataset will be: each clip's bucket, or why it is left out; nothing is encoded."""
    from longtake.cli_train import load
    from longtake.config.flags import Flags

    loaded = load(config, assignments or [], Flags(num_frames=num_frames, height=height, width=width))
    from longtake.doctor.command import Asked, answer
    from longtake.progress import Reporter

    answer(loaded, Asked(json_file, html, clips, gpu, not no_plan), Reporter())
