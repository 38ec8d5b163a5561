"""`longtake init`: a first config that fits the model, the clips and the machine."""

from pathlib import Path

import torch

from longtake import files
from longtake.config.dump import to_toml
from longtake.config.schema import (
    DataConfig,
    LoraConfig,
    ModelConfig,
    OutputConfig,
    Precision,
    RunConfig,
    TrainingConfig,
    ValidationConfig,
)
from longtake.data.metadata import read_source, usable
from longtake.data.video import ClipInfo, probe
from longtake.errors import ConfigError, DataError, Problem
from longtake.models.wan import tiny
from longtake.models.wan.detection import identify
from longtake.models.wan.variants import VARIANTS, WanVariant
from longtake.models.wan.weights import locate
from longtake.progress import Reporter


def write_first_config(model: str, source: Path, output: Path, reporter: Reporter) -> None:
    """Writes `output`: every key with its manual, values chosen for the model, the clips and this machine.

    Raises ConfigError where `output` exists, DataError and ModelError where data or model cannot be used.
    """
    if output.exists():
        raise ConfigError(
            Problem("the file exists", str(output), "choose another name with -o", code="config-file-exists")
        )
    variant, section = _model(model)
    infos = _probe_all(source, variant, reporter)
    precision = _precision(variant)
    num_frames = _frames(infos, variant)
    config = RunConfig(
        model=section.model_copy(update={"dtype": precision}),
        data=DataConfig(source=_seen_from(output, source), num_frames=num_frames, size=variant.size, cache="cache"),
        lora=LoraConfig(),
        training=TrainingConfig(shift=variant.shift, precision=precision),
        validation=ValidationConfig(),
        output=OutputConfig(run=f"runs/{output.stem}"),
    )
    clips, (width, height) = "1 clip" if len(infos) == 1 else f"{len(infos)} clips", variant.size
    header = (
        f"# LoRA of {variant.name} on {clips}: {num_frames} frames of {width}x{height}.\n"
        f"# First `longtake prepare {output.name}`, then `longtake train {output.name}`.\n"
        "# Paths are relative to this file. Remove [lora] to train all weights.\n\n"
    )
    files.write_text(output, header + to_toml(config, comments=True))


def _model(model: str) -> tuple[WanVariant, ModelConfig]:
    if model in VARIANTS:
        return VARIANTS[model], ModelConfig(name=model)
    path = Path(model).resolve()
    if path.exists():
        return identify(path), ModelConfig(path=str(path))
    for variant in VARIANTS.values():
        if variant.hub_id and variant.hub_id.lower() == model.lower():
            return variant, ModelConfig(name=model)
    found = locate(ModelConfig(name=model), tiny.bundled, lambda _text: None)
    return found.variant, ModelConfig(name=model)


def _probe_all(source: Path, variant: WanVariant, reporter: Reporter) -> list[ClipInfo]:
    records, problems = read_source(source, image_allowed=variant.spec.task in ("t2v", "ti2v"))
    infos: list[ClipInfo] = []
    for record in usable(records, problems):
        try:
            infos.append(probe(record.path, record.where))
        except DataError as error:
            problems += error.problems
    for problem in problems:
        reporter.line(f"left out: {problem}")
    if not infos:
        raise DataError(
            Problem("no clip can be used", str(source), "mend the clips named above", code="clip-none-usable")
        )
    return infos


def _frames(infos: list[ClipInfo], variant: WanVariant) -> int:
    """The model's own number of frames, or the most that half of the clips have."""
    fps = variant.spec.fps
    lengths = sorted(1 if info.is_image else int(info.duration * fps + 1e-6) for info in infos)
    most = min(variant.num_frames, lengths[len(lengths) // 2])
    return max(1, (most - 1) // 4 * 4 + 1)


def _precision(variant: WanVariant) -> Precision:
    """bf16, as the published weights are trained; fp32 for a model so small that a CPU trains it."""
    return "bf16" if variant.parameters > 10**8 or torch.cuda.is_available() else "fp32"


def _seen_from(output: Path, path: Path) -> str:
    """`path` relative to the folder of `output` where it lies inside, else absolute."""
    full, folder = path.resolve(), output.resolve().parent
    return str(full.relative_to(folder)) if full.is_relative_to(folder) else str(full)
