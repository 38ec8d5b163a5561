"""`longtake sample`: a video of a run's adapter, or of a model with LoRA files."""

from pathlib import Path
from typing import Annotated, Optional

import typer

from longtake.errors import ConfigError, Problem


def register(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    app.command()(sample)


def sample(
    prompt: Annotated[str, typer.Option(help="What to show.")],
    out: Annotated[Path, typer.Option(help="The mp4 to write.")],
    run: Annotated[Optional[Path], typer.Option(help="A run's folder: its model with its adapter.")] = None,  # noqa: UP045
    model: Annotated[str, typer.Option(help="Variant name, path or hub id.")] = "",
    low_noise_model: Annotated[
        str, typer.Option("--low-noise-model", help="Of an A14B model in two files, the low-noise one.")
    ] = "",
    components: Annotated[
        str, typer.Option(help="Folder or hub id of VAE and encoders where the model has none.")
    ] = "",
    loras: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option("--lora", help="A LoRA file in any format; of a model of two transformers, one for each."),
    ] = None,
    image: Annotated[Optional[Path], typer.Option(help="First frame.")] = None,  # noqa: UP045
    last_image: Annotated[Optional[Path], typer.Option("--last-image", help="Last frame.")] = None,  # noqa: UP045
    num_frames: Annotated[Optional[int], typer.Option("--num-frames", "--num_frames")] = None,  # noqa: UP045
    size: Annotated[str, typer.Option(help="WIDTHxHEIGHT.")] = "",
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 30,
    guidance_scale: Annotated[float, typer.Option("--guidance-scale")] = 5.0,
    seed: Annotated[int, typer.Option()] = 0,
    negative_prompt: Annotated[str, typer.Option("--negative-prompt")] = "",
) -> None:
    """Make a video with a run's adapter, or with a model and a LoRA file."""
    if (run is None) == (not model):
        raise ConfigError(
            Problem(
                "give either --run or --model", "longtake sample", "not both, not neither", code="sample-model-unclear"
            )
        )
    if run is not None and loras:
        raise ConfigError(
            Problem("a run has its own adapter", "--lora", "use --model with --lora", code="sample-lora-beside-run")
        )
    if out.suffix.lower() != ".mp4":
        what = f"a video is written as mp4, not as {out.suffix or 'a file without an ending'}"
        raise ConfigError(Problem(what, "--out", "name it .mp4", code="sample-not-mp4"))
    from longtake.models.libraries import quiet_libraries

    quiet_libraries()
    from longtake.progress import Reporter
    from longtake.training.results import Wish, model_of, sample_to_file

    wish = Wish(prompt, negative_prompt, image, last_image, num_frames, size, steps, guidance_scale, seed)
    given = model_of(model, low_noise_model, components) if run is None else None
    sample_to_file(run, given, loras or [], wish, out, Reporter())
    typer.echo(out)
