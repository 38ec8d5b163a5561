"""What one does with a finished or running run: sample from it, take its adapter."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from longtake import files
from longtake.config.load import load_config
from longtake.config.schema import ModelConfig, Precision, RunConfig
from longtake.data.encode import component_root
from longtake.data.video import read_image, write_clip
from longtake.distributed.backend import local_device
from longtake.errors import ConfigError, ModelError, Problem
from longtake.lora import Adapter, attach_adapter, read_adapter, trained_adapter
from longtake.lora.origin import other_model
from longtake.models.spec import ModelSpec
from longtake.models.wan import tiny
from longtake.models.wan.weights import ModelFiles, load_transformer, locate
from longtake.progress import Reporter
from longtake.sampling import SampleRequest, check_request, encode_requests, sample_encoded
from longtake.training.checkpoint import load_newest
from longtake.training.experts import prefix_of
from longtake.training.model import Expert, choose_experts, find_model
from longtake.training.outputs import ADAPTER, adapter_of, of_expert, trained_folder
from longtake.training.precision import DTYPES
from longtake.training.run_folder import CONFIG


@dataclass(frozen=True)
class Wish:
    """What the user asks of a sample; `size` is `WIDTHxHEIGHT` or empty, `num_frames` None: run's or model's own."""

    prompt: str
    negative_prompt: str
    image: Path | None
    last_image: Path | None
    num_frames: int | None
    size: str
    steps: int
    guidance_scale: float
    seed: int


def read_run(run: Path) -> RunConfig:
    """The config of a run; raises ConfigError where the folder is no run."""
    if not (run / CONFIG).is_file():
        raise ConfigError(
            Problem(
                "this is no run folder (it has no config.toml)",
                str(run),
                "give output.run of a run",
                code="run-missing",
            )
        )
    return load_config(run / CONFIG)


def run_adapter(run: Path, config: RunConfig, spec: ModelSpec, expert: Expert, reporter: Reporter) -> Adapter:
    """The run's adapter of an expert: the finished one, else the newest checkpoint's, its average if it has one."""
    assert config.lora is not None
    finished = of_expert(run / ADAPTER, expert, choose_experts(config, spec))
    if finished.is_file():
        adapter = read_adapter(finished)
        if adapter.metadata.get("longtake.steps") == str(config.training.steps):
            return adapter  # else the run goes on to more steps
    checkpoint = load_newest(run, reporter.line)
    if checkpoint is None:
        raise ConfigError(
            Problem(
                "the run has no adapter and no checkpoint yet",
                str(run),
                "wait for output.save_every",
                code="run-nothing-saved",
            )
        )
    reporter.line(f"the run is not finished: using the checkpoint after step {checkpoint.step}")
    prefix = prefix_of(expert)
    state = adapter_of(checkpoint.of("ema", prefix)) or adapter_of(checkpoint.of("trained", prefix))
    return trained_adapter(state, config.lora, {})


def sample_to_file(
    run: Path | None, model: ModelConfig | None, loras: Sequence[Path], wish: Wish, out: Path, reporter: Reporter
) -> None:
    """Samples from a run, or from a model with or without LoRA files, one for a transformer, and writes the mp4."""
    device = local_device()
    if run is not None:
        config = read_run(run)
        model_files = find_model(config, reporter.line)
        request = _request(wish, config.data.size, config.data.num_frames, config.training.shift)
        precision = config.model.dtype
    else:
        assert model is not None
        model_files = locate(model, tiny.bundled, reporter.line)
        variant = model_files.variant
        request = _request(wish, variant.size, variant.num_frames, variant.shift)
        precision = _default_precision(device)
    spec = model_files.variant.spec
    root = component_root(model_files, "model.components")
    check_request(request, spec)
    adapters = adapters_of(loras, spec, reporter.line)
    (encoded,) = encode_requests(root, spec, [request], device)  # before the transformer, which leaves encoders no room
    transformers = {}
    if run is not None:
        for expert in choose_experts(config, spec):
            trained = _trained_transformer(run, config, model_files, expert, device, reporter)
            transformers[expert.component] = trained
    for name in spec.experts:
        if name not in transformers:
            transformers[name] = load_transformer(model_files, name, DTYPES[precision], device)
    for component, adapter in adapters.items():
        attach_adapter(transformers[component], adapter)
    with reporter.bar("sampling", request.steps, "steps") as advance:
        frames = sample_encoded(root, spec, transformers, encoded, device, lambda done: advance(done, ""))
    files.write_file(out, lambda staged: write_clip(frames, staged, float(spec.fps)))


def _trained_transformer(
    run: Path,
    config: RunConfig,
    model_files: ModelFiles,
    expert: Expert,
    device: torch.device,
    reporter: Reporter,
) -> Any:
    """The run's transformer with its adapter attached, or as full fine-tuning left it."""
    component, spec = expert.component, model_files.variant.spec
    dtype = DTYPES[config.model.dtype]
    if config.lora is None:
        folder = trained_folder(run, expert, choose_experts(config, spec))
        if not folder.is_dir():
            raise ConfigError(
                Problem("the run is not finished", str(run), "continue it with --resume", code="run-unfinished")
            )
        return load_transformer(replace(model_files, transformers={component: folder}), component, dtype, device)
    transformer = load_transformer(model_files, component, dtype, device)
    adapter = run_adapter(run, config, spec, expert, reporter)
    attach_adapter(transformer, adapter)
    return transformer


def _request(wish: Wish, size: tuple[int, int], num_frames: int, shift: float) -> SampleRequest:
    if wish.size:
        match = re.fullmatch(r"(\d+)x(\d+)", wish.size)
        if match is None:
            raise ConfigError(
                Problem(
                    f"cannot read {wish.size!r}",
                    "--size",
                    "write WIDTHxHEIGHT, for example 832x480",
                    code="flag-unreadable",
                )
            )
        size = (int(match[1]), int(match[2]))
    return SampleRequest(
        prompt=wish.prompt,
        image=read_image(wish.image.resolve(), size) if wish.image else None,
        last_image=read_image(wish.last_image.resolve(), size) if wish.last_image else None,
        size=size,
        num_frames=wish.num_frames or num_frames,
        steps=wish.steps,
        guidance_scale=wish.guidance_scale,
        seed=wish.seed,
        shift=shift,
        negative_prompt=wish.negative_prompt,
    )


def model_of(model: str, low_noise_model: str = "", components: str = "") -> ModelConfig:
    """What `model`, a path, a variant's name or a hub id, stands for, with what it lacks itself."""
    path = str(Path(model).resolve()) if Path(model).exists() else ""
    name = "" if path else model
    if low_noise_model and not path:
        what = "it goes with the file of the high-noise transformer"
        raise ConfigError(Problem(what, "--low-noise-model", "give that file as --model", code="model-low-noise-alone"))
    return ModelConfig(name=name, path=path, low_noise_path=low_noise_model, components=components)


def _default_precision(device: torch.device) -> Precision:
    return "bf16" if device.type == "cuda" else "fp32"


def adapters_of(loras: Sequence[Path], spec: ModelSpec, say: Callable[[str], None]) -> dict[str, Adapter]:
    """The LoRA for each transformer, by its component's name; what names another model of the task is said.

    Raises ModelError where a file's transformer cannot be told, or it names a model of another task.
    """
    found: dict[str, Adapter] = {}
    for path in loras:
        adapter = read_adapter(path)
        if of_another := other_model(adapter, path, spec):
            say(of_another)
        component = _expert_of(adapter, path, spec)
        if component in found:
            raise ModelError(
                Problem(f"there is a LoRA for {component} already", str(path), "give one for each", code="lora-twice")
            )
        found[component] = adapter
    return found


def _expert_of(adapter: Adapter, path: Path, spec: ModelSpec) -> str:
    """Which transformer a LoRA file is for: the only one, or that which its metadata or its name says."""
    if len(spec.experts) == 1:
        return spec.experts[0]
    told = adapter.metadata.get("longtake.expert", "")
    said = [told] if told in ("high", "low") else [noise for noise in ("high", "low") if noise in path.stem.lower()]
    if len(said) != 1:
        what = "the file does not say which of the two transformers it is for"
        raise ModelError(Problem(what, str(path), 'put "high" or "low" into its name', code="lora-expert-unclear"))
    return spec.experts[0 if said == ["high"] else 1]
