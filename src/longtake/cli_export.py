"""`longtake export` and `longtake push`: a run's results for other programs and for the hub."""

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from longtake.errors import ConfigError, Problem

Run = Annotated[Path, typer.Option(help="A run's folder.")]


def register(app: typer.Typer) -> None:
    """Adds the commands to the command line."""
    app.command()(export)
    app.command()(push)


def export(
    run: Run,
    form: Annotated[str, typer.Option("--format", help="comfyui, diffusers or kohya.")],
    out: Annotated[
        Path, typer.Option(help="File to write; for full weights in several files or diffusers', a folder.")
    ],
    merge: Annotated[bool, typer.Option("--merge", help="Write full weights with the adapter in them.")] = False,
    rank: Annotated[Optional[int], typer.Option(help="Lower the adapter's rank; says what is lost.")] = None,  # noqa: UP045
    max_shard_size: Annotated[
        str, typer.Option("--max-shard-size", help="Split full weights into files of at most so much: 5GB.")
    ] = "",
) -> None:
    """Write a run's adapter for other tools, or full weights with it merged in, and a model card beside it."""
    if form not in ("comfyui", "diffusers", "kohya"):
        raise ConfigError(
            Problem(
                f"there is no format {form!r}",
                "--format",
                "use comfyui, diffusers or kohya",
                code="export-format-unknown",
            )
        )
    from longtake.units import parse_bytes

    shard = parse_bytes(max_shard_size, "--max-shard-size") if max_shard_size else None
    _quiet_libraries()
    from longtake.progress import Reporter
    from longtake.training.exporting import ExportWish
    from longtake.training.exporting import export as export_run

    chosen: Any = form  # checked above
    for path in export_run(run, ExportWish(chosen, out, merge, rank, shard), Reporter()):
        typer.echo(path)


def push(
    run: Run,
    repo: Annotated[str, typer.Option(help="Repository of the Hugging Face Hub: owner/name.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str, typer.Option(help="Branch; made if it is not there.")] = "",
) -> None:
    """Upload a finished run's adapter, model card and last samples to the Hugging Face Hub."""
    _quiet_libraries()
    from longtake.progress import Reporter
    from longtake.training.push import Destination
    from longtake.training.push import push as push_run

    typer.echo(push_run(run, Destination(repo, private, revision), Reporter().line))


def _quiet_libraries() -> None:
    from longtake.models.libraries import quiet_libraries

    quiet_libraries()
