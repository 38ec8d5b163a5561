"""Options that several commands of the command line share: the flags that people carry over from existing recipes."""

from pathlib import Path
from typing import Annotated, Optional

import typer

ConfigArgument = Annotated[Path, typer.Argument(help="The run's TOML file.")]
OptionalConfig = Annotated[Optional[Path], typer.Argument(help="The run's TOML file; without one, --model.")]  # noqa: UP045
SetOption = Annotated[Optional[list[str]], typer.Option("--set", help="section.key=value; may be repeated.")]  # noqa: UP045
Budget = Annotated[Optional[str], typer.Option("--budget", help="Device memory to use: 24GiB.")]  # noqa: UP045
Frames = Annotated[Optional[int], typer.Option("--num-frames", "--num_frames", help="Frames a clip, 4n+1.")]  # noqa: UP045
FramesOrMax = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--num-frames", "--num_frames", help="Frames a clip, 4n+1, or max: the most that fit."),
]
Height = Annotated[Optional[int], typer.Option("--height", help="Pixels.")]  # noqa: UP045
Width = Annotated[Optional[int], typer.Option("--width", help="Pixels.")]  # noqa: UP045
Checkpointing = Annotated[bool, typer.Option("--use-gradient-checkpointing", "--use_gradient_checkpointing")]
CheckpointingOffload = Annotated[
    bool, typer.Option("--use-gradient-checkpointing-offload", "--use_gradient_checkpointing_offload")
]
Strategy = Annotated[Optional[str], typer.Option("--training-strategy", "--training_strategy")]  # noqa: UP045
Rank = Annotated[Optional[int], typer.Option("--lora-rank", "--lora_rank", "--rank")]  # noqa: UP045
Targets = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--lora-target-modules", "--lora_target_modules", help="Comma-separated."),
]
LearningRate = Annotated[Optional[float], typer.Option("--learning-rate", "--learning_rate")]  # noqa: UP045
Accumulation = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--gradient-accumulation-steps", "--gradient_accumulation_steps"),
]
Gpus = Annotated[int, typer.Option("--gpus", help="GPUs to use.")]
GpusToStart = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--gpus", help="GPUs of this machine to train on; without it one, or those of torchrun's ranks."),
]
