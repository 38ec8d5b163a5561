"""A whole run, from a config to an adapter: what `longtake train` does."""

from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path

import torch

from longtake.config.conflicts import check
from longtake.config.schema import RunConfig
from longtake.data.buckets import stage_frames
from longtake.data.cache import Cache
from longtake.data.encode import component_root, load_manifest
from longtake.data.loader import BucketSampler, EntryReader
from longtake.data.split import split
from longtake.distributed.backend import SingleDevice, local_device, world
from longtake.errors import ConfigError, Problem
from longtake.files import write_json
from longtake.lora import adapter_state, save_adapter
from longtake.memory.accounting import Workload
from longtake.memory.optimizer_offload import OffloadedAdamW
from longtake.memory_gauge import MemoryGauge, expand_segments, return_freed_memory
from longtake.models.wan.weights import ModelFiles, save_transformer
from longtake.progress import Reporter
from longtake.training.checkpoint import Checkpoint, load_newest
from longtake.training.fallback import StrategyInForce, first_line, in_words, out_of_memory
from longtake.training.interrupt import stop_request
from longtake.training.metrics import Metrics
from longtake.training.model import TrainedModel, build_model, choose_expert, find_model
from longtake.training.optimizer import MovingAverage, allocate_states, build_optimizer
from longtake.training.planned import FILE as PLAN
from longtake.training.planned import Forecast, Planned
from longtake.training.precision import DTYPES
from longtake.training.run_folder import check_run, open_run, record_config
from longtake.training.trainer import Parts, Trainer, largest_micro_batch
from longtake.training.validation import Validation
from longtake.units import format_bytes, parse_bytes

ADAPTER = "adapter.safetensors"


def train(config: RunConfig, resume: bool, reporter: Reporter, planned: Planned | None = None) -> Path:
    """Runs or continues the run of `config` and returns its folder.

    `planned` is what is expected of `config.memory` and its fallbacks; it decides nothing. Raises ConfigError,
    ModelError, DataError and CacheError before anything is written, RunError afterwards.
    """
    assert planned is None or planned.under(config.memory) is planned.strategies[0]
    _, ranks = world()
    check(config, ranks)
    check_run(config, resume, lambda _text: None)  # before anything slow; said when the run is opened
    device = local_device()
    expand_segments(device)
    model_files = find_model(config, reporter.line)
    spec = model_files.variant.spec
    choose_expert(config, spec)
    root = component_root(model_files.root, "model.components")
    manifest = load_manifest(config, spec, root, reporter.line)
    reader = EntryReader(Cache(Path(config.data.cache)), manifest.empty_text)
    training_entries, held = split(manifest.entries, config.data.validation, config.training.seed)
    stages = stage_frames(config.data.num_frames, config.data.frames_schedule)
    batch_size = config.training.global_batch_size
    sampler = BucketSampler(training_entries, stages, config.training.seed, batch_size)
    held = [entry for entry in held if stages[-1][1] in entry.stages]
    validation = Validation(config, held, reader, root, device)
    with _brief(Path(config.output.run)):
        validation.prepare(spec)  # before the transformer is there, which leaves encoders no room
    with open_run(config, resume, reporter.line) as run, stop_request() as stop, closing(MemoryGauge(device)) as gauge:
        _budget(config, gauge, device, reporter, planned)
        model = build_model(config, model_files, device)
        checkpoint = load_newest(run, reporter.line) if resume else None
        first_step = checkpoint.step if checkpoint else 0
        strategy = _strategy(config, run, model, sampler, first_step, reporter)
        strategy.check()
        reporter.line(f"memory: {in_words(config.memory)}")
        if planned is not None:
            reporter.line(f"planned: {planned.described()}")
        forecast = Forecast(planned, sampler, config.training.steps)
        with _brief(run), strategy, _optimizer(config, model) as optimizer:
            record_config(config, run)  # what could refuse to begin has not
            if planned is not None:
                write_json(run / PLAN, planned.report)
            parts = _parts(config, strategy, optimizer, forecast, validation, gauge, reporter, checkpoint)
            try:
                trainer = Trainer(parts, stop)
                if checkpoint is not None:
                    trainer.restore(checkpoint)
                    reporter.line(f"resumed after step {checkpoint.step}")
                allocate_states(optimizer)
                trainer.fit(first_step)
            finally:
                parts.metrics.close()
        write_outputs(config, run, model, parts.average, model_files)
    return run


def write_outputs(
    config: RunConfig, run: Path, model: TrainedModel, average: MovingAverage | None, model_files: ModelFiles
) -> None:
    """What people take away: the adapter in each format asked for, or the transformer; of the average if any."""
    with average.in_use() if average else nullcontext():
        if config.lora is None:
            save_transformer(model.transformer, run / "transformer", "diffusers")
            return
        state = adapter_state(model.transformer)
    described = adapter_metadata(config, model_files)
    save_adapter(run / ADAPTER, state, config.lora.alpha, "comfyui", described)
    for form in config.output.formats:
        if form != "comfyui":
            save_adapter(run / f"adapter-{form}.safetensors", state, config.lora.alpha, form, described)


def adapter_metadata(config: RunConfig, model_files: ModelFiles) -> dict[str, str]:
    """What an adapter's file says of how it was made."""
    return {
        "longtake.version": version("longtake"),
        "longtake.model": model_files.variant.name,
        "longtake.expert": config.model.expert,
        "longtake.num_frames": str(config.data.num_frames),
        "longtake.steps": str(config.training.steps),
    }


def _budget(
    config: RunConfig, gauge: MemoryGauge, device: torch.device, reporter: Reporter, planned: Planned | None
) -> None:
    """Says what may be used; with a budget given CUDA's allocator is held to it, and a CPU's keeps nothing freed."""
    reporter.line(gauge.device_line())
    free = gauge.free_bytes()
    wanted = free if config.memory.budget == "auto" else parse_bytes(config.memory.budget, "memory.budget")
    if wanted > free:
        remedy = "lower it or end other processes"
        what = f"the budget is {format_bytes(wanted)} and only {format_bytes(free)} are free"
        raise ConfigError(Problem(what, "memory.budget", remedy))
    if config.memory.budget != "auto" and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(wanted / total, device)
    elif config.memory.budget != "auto":
        return_freed_memory()
    reporter.line(f"budget: {format_bytes(wanted)}{_not_held(config, device, wanted, planned)}")
    if device.type == "cuda" and torch.cuda.device_count() > 1:
        reporter.line(f"{torch.cuda.device_count()} GPUs are visible and this version uses one of them")


def _not_held(config: RunConfig, device: torch.device, budget: int, planned: Planned | None) -> str:
    if config.memory.budget == "auto" or device.type == "cuda":
        return ""
    below = planned is not None and planned.strategies[0].device_peak_bytes <= budget
    return f" (a CPU run is not held to it{', but planned to stay below it' if below else ''})"


def _strategy(
    config: RunConfig, run: Path, model: TrainedModel, sampler: BucketSampler, first_step: int, reporter: Reporter
) -> StrategyInForce:
    """[memory] for the largest micro-batch that is to come."""
    training = config.training
    visits = largest_micro_batch(sampler, model.spec, training.micro_batch_size, first_step)
    tokens = model.spec.tokens(*visits[0].entry.bucket)
    workload = Workload(tokens, training.micro_batch_size, DTYPES[training.precision].itemsize)
    return StrategyInForce(model, config.memory, workload, run, reporter.line)


def _parts(
    config: RunConfig,
    strategy: StrategyInForce,
    optimizer: torch.optim.Optimizer,
    forecast: Forecast,
    validation: Validation,
    gauge: MemoryGauge,
    reporter: Reporter,
    checkpoint: Checkpoint | None,
) -> Parts:
    training, model, device = config.training, strategy.model, validation.device
    return Parts(
        config=config,
        run=strategy.run,
        model=model,
        strategy=strategy,
        optimizer=optimizer,
        backend=SingleDevice([*model.parameters.values()], optimizer, device, training.precision == "fp16"),
        average=MovingAverage(model.parameters, training.ema) if training.ema else None,
        sampler=forecast.sampler,
        reader=validation.reader,
        validation=validation,
        metrics=Metrics(
            strategy.run, checkpoint.step if checkpoint else None, config.output.wandb, config.model_dump()
        ),
        gauge=gauge,
        forecast=forecast,
        device=device,
        reporter=reporter,
    )


@contextmanager
def _optimizer(config: RunConfig, model: TrainedModel) -> Iterator[torch.optim.Optimizer]:
    optimizer = build_optimizer(model.parameters, config.training, config.memory)
    try:
        yield optimizer
    finally:
        if isinstance(optimizer, OffloadedAdamW):
            optimizer.close()


@contextmanager
def _brief(run: Path) -> Iterator[None]:
    """Memory that runs out where nothing can be done again ends the run with one line."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise out_of_memory(first_line(error), run) from error
