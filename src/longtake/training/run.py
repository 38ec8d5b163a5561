"""A whole run, from a config to an adapter: what `longtake train` does, on one process or on many."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from longtake.config.conflicts import check
from longtake.config.schema import RunConfig
from longtake.config.sharing import SHARDED, sharing_conflicts
from longtake.data.buckets import stage_frames
from longtake.data.cache import Cache, digest
from longtake.data.encode import component_root, load_manifest
from longtake.data.loader import BucketSampler, EntryReader
from longtake.data.split import split
from longtake.distributed.backend import Backend
from longtake.distributed.engines import chosen, engage, require, sequence_parallel_of
from longtake.distributed.ranks import ALONE, Ranks
from longtake.distributed.sequence_parallel import sequence_parallel
from longtake.distributed.start_checks import check_engine, check_equal, check_same, check_shared
from longtake.errors import ConfigError, Problem
from longtake.files import write_json
from longtake.memory.accounting import Workload
from longtake.memory.optimizer_offload import OffloadedAdamW
from longtake.memory.strategy import Among
from longtake.memory_gauge import MemoryGauge, expand_segments
from longtake.models.spec import ModelSpec
from longtake.models.wan.weights import ModelFiles
from longtake.progress import Reporter
from longtake.training.average import MovingAverage
from longtake.training.budget import hold_to_budget
from longtake.training.checkpoint import Checkpoint, check_room, checkpoint_path, load_checkpoint, load_newest
from longtake.training.experts import Trained, held_of, turns_in_words
from longtake.training.fallback import StrategyInForce, first_line, in_words, out_of_memory
from longtake.training.interrupt import StopRequest, stop_request
from longtake.training.metrics import Metrics
from longtake.training.model import TrainedModel, build_models, choose_experts, find_model
from longtake.training.optimizer import allocate_states, build_optimizer
from longtake.training.outputs import write_outputs
from longtake.training.parts import Parts
from longtake.training.planned import FILE as PLAN
from longtake.training.planned import Forecast, Planned
from longtake.training.precision import DTYPES
from longtake.training.run_events import RunEvents
from longtake.training.run_folder import check_run, goes_on, open_run, record_config
from longtake.training.samples import SampleReader
from longtake.training.trainer import Trainer
from longtake.training.validation import Validation


@dataclass(frozen=True)
class _Begun:
    """A run that this process takes part in; `asked` is its config with "auto" left as it was."""

    asked: RunConfig
    config: RunConfig
    run: Path
    ranks: Ranks
    reporter: Reporter
    planned: Planned | None
    gauge: MemoryGauge
    stop: StopRequest
    events: RunEvents


@dataclass(frozen=True)
class _Found:
    """What a run is made from, before anything of it is on the device."""

    model_files: ModelFiles
    validation: Validation
    sampler: BucketSampler


def train(
    config: RunConfig, resume: bool, reporter: Reporter, planned: Planned | None = None, ranks: Ranks = ALONE
) -> Path:
    """Runs or continues the run of `config` and returns its folder; every one of `ranks` calls it.

    `planned` is what is expected of `config.memory` and its fallbacks; it decides nothing. Processes that a launcher
    has started again go on from the last checkpoint. Raises ConfigError, ModelError, DataError and CacheError before
    anything is written, RunError afterwards.
    """
    assert planned is None or planned.under(config.memory) is planned.strategies[0]
    asked, config = config, config.model_copy(update={"parallel": chosen(config.parallel, ranks)})
    check_same(ranks, config)
    ranks.each(lambda: check(config, ranks.world))
    ranks.each(lambda: require(config.parallel))
    resume = resume or goes_on(Path(config.output.run), ranks)
    ranks.first(lambda: check_run(asked, resume, lambda _text: None))  # before anything slow; said when it is opened
    expand_segments(ranks.device)
    found = _find(config, reporter, ranks)
    with ExitStack() as held:
        stop = held.enter_context(stop_request())
        run = ranks.first(lambda: held.enter_context(open_run(asked, resume, reporter.line)))
        check_shared(ranks, run)
        gauge = held.enter_context(closing(MemoryGauge(ranks.device)))
        events = RunEvents(run, reporter.line, ranks)
        with events.noting_the_end():
            ranks.each(lambda: hold_to_budget(config, gauge, ranks.device, reporter, planned))
            _go(_Begun(asked, config, run, ranks, reporter, planned, gauge, stop, events), found, resume)
    return run


def _find(config: RunConfig, reporter: Reporter, ranks: Ranks) -> _Found:
    """The model's files and the prepared data; encodes what is to be sampled."""
    model_files = ranks.one_by_machine(lambda: find_model(config, reporter.line))
    spec = model_files.variant.spec
    ranks.each(lambda: choose_experts(config, spec))
    root = component_root(model_files, "model.components")
    manifest = ranks.each(lambda: load_manifest(config, spec, root, reporter.line))
    check_equal(ranks, {"data.cache": digest(asdict(manifest))}, "put the cache where all ranks see it")
    reader = EntryReader(Cache(Path(config.data.cache)), manifest.empty_text)
    training_entries, held = split(manifest.entries, config.data.validation, config.training.seed)
    stages = stage_frames(config.data.num_frames, config.data.frames_schedule)
    sampler = BucketSampler(training_entries, stages, config.training.seed, config.training.global_batch_size)
    ranks.each(lambda: _check_shares(config, spec, sampler, ranks))
    held = [entry for entry in held if stages[-1][1] in entry.stages]
    sp = config.parallel.sp
    lockstep = config.parallel.strategy not in ("single", "ddp") or sp > 1
    share = (ranks.rank // sp, ranks.world // sp)
    validation = Validation(config, held, reader, root, ranks.device, ranks, share, lockstep)
    with _brief(Path(config.output.run)):
        validation.prepare(spec)  # before the transformer is there, which leaves encoders no room
    return _Found(model_files, validation, sampler)


def _check_shares(config: RunConfig, spec: ModelSpec, sampler: BucketSampler, ranks: Ranks) -> None:
    """Raises ConfigError where the model's heads or a clip's tokens cannot be shared out as the config has it."""
    found = [*sharing_conflicts(config.memory, config.parallel, ranks.world, spec.heads)]
    shapes = {entries[0].bucket for buckets in sampler.buckets for entries in buckets}
    for frames, height, width in sorted(shapes):
        if (tokens := spec.tokens(frames, height, width)) < config.parallel.sp:
            what = f"{tokens} tokens of {frames} frames of {width}x{height} are fewer than ranks that share them"
            found.append(Problem(what, "parallel.sp", f"at most {tokens}", code="rank-without-tokens"))
    if found:
        raise ConfigError(found)


def _go(begun: _Begun, found: _Found, resume: bool) -> None:
    """Builds the model, trains it, and writes what comes of it."""
    config, ranks, say = begun.config, begun.ranks, begun.reporter.line
    models = ranks.each(lambda: build_models(config, found.model_files, ranks.device, ranks))
    damaged = begun.events.telling("checkpoint-damaged")
    checkpoint = ranks.first(lambda: load_newest(begun.run, damaged)) if resume else None
    with ExitStack() as held:
        strategy = _strategy(begun, models, found.sampler, checkpoint.step if checkpoint else 0, held)
        ranks.each(strategy.check)
        say(f"memory: {in_words(config.memory)}")
        if ranks.world > 1:
            say(f"parallel: {_in_words(config, ranks)}")
        if len(models) > 1:
            say(f"experts: {turns_in_words([model.expert for model in models], config.training)}")
        if begun.planned is not None:
            say(f"planned: {begun.planned.described()}")
        forecast = Forecast(begun.planned, found.sampler, config.training.steps)
        held.enter_context(_brief(begun.run))
        ranks.each(lambda: held.enter_context(strategy))
        with ExitStack() as engines:
            backends = [engines.enter_context(_engine(config, model, ranks)) for model in models]
            _record(begun)
            parts = _parts(begun, strategy, backends, forecast, found.validation, checkpoint)
            try:
                step = _fit(Trainer(parts, begun.stop), checkpoint)
            finally:
                parts.metrics.close()
    finished = load_checkpoint(checkpoint_path(begun.run, step))
    ranks.first(lambda: write_outputs(config, begun.run, finished, found.model_files, begun.reporter.line))


def _fit(trainer: Trainer, checkpoint: Checkpoint | None) -> int:
    """Trains from the checkpoint on; gives the step of the last one."""
    parts, first_step = trainer.parts, checkpoint.step if checkpoint else 0
    if checkpoint is not None:
        trainer.restore(checkpoint)
        parts.events.at(first_step)
        parts.events.tell("run-resumed", f"resumed after step {first_step}")
    for trained in parts.trained:
        allocate_states(trained.backend.optimizer)
    if first_step < parts.config.training.steps:
        with held_of(parts.trained) as held:
            check_room(parts.run, held, parts.config.output.keep, parts.events.telling("disk-low"), parts.ranks)
    trainer.fit(first_step)
    assert trainer.saved_step is not None, "a run ends with a checkpoint"
    return trainer.saved_step


def _record(begun: _Begun) -> None:
    """Writes down what is trained and what was planned: what could refuse to begin has not."""

    def write() -> None:
        record_config(begun.asked, begun.run)
        if begun.planned is not None:
            write_json(begun.run / PLAN, begun.planned.report)

    begun.ranks.first(write)


def _strategy(
    begun: _Begun, models: Sequence[TrainedModel], sampler: BucketSampler, first_step: int, held: ExitStack
) -> StrategyInForce:
    """[memory] for the largest micro-batch that is to come, around ranks that share clips."""
    config, ranks, training = begun.config, begun.ranks, begun.config.training
    spec = models[0].spec
    sharing = sequence_parallel_of(config.parallel, ranks, spec.heads)
    if sharing is not None:
        for model in models:
            held.enter_context(sequence_parallel(model.transformer, spec, sharing))
    visits = sampler.largest(spec.tokens, training.micro_batch_size, first_step)
    tokens = -(-spec.tokens(*visits[0].entry.bucket) // config.parallel.sp)
    workload = Workload(tokens, training.micro_batch_size, DTYPES[training.precision].itemsize)
    among = Among(sharing, config.parallel.strategy in SHARDED)
    say = begun.events.telling("memory-ran-out")  # all that it says is about that
    return StrategyInForce(models, config.memory, workload, begun.run, say, ranks, among)


def _parts(
    begun: _Begun,
    strategy: StrategyInForce,
    backends: Sequence[Backend],
    forecast: Forecast,
    validation: Validation,
    checkpoint: Checkpoint | None,
) -> Parts:
    config, ranks, resumed = begun.config, begun.ranks, checkpoint.step if checkpoint else None
    decay = config.training.ema
    trained = tuple(
        Trained(model, backend, MovingAverage(backend, decay) if decay else None)
        for model, backend in zip(strategy.models, backends, strict=True)
    )
    return Parts(
        config=config,
        run=begun.run,
        trained=trained,
        strategy=strategy,
        ranks=ranks,
        samples=SampleReader(
            forecast.sampler,
            validation.share,
            validation.reader,
            config.training,
            config.data.caption_dropout,
            tuple(model.expert.sigma_range for model in strategy.models),
        ),
        validation=validation,
        metrics=Metrics(begun.run, resumed, config.output.wandb, config.model_dump(), ranks.is_first),
        gauge=begun.gauge,
        forecast=forecast,
        device=validation.device,
        reporter=begun.reporter,
        events=begun.events,
    )


@contextmanager
def _engine(config: RunConfig, model: TrainedModel, ranks: Ranks) -> Iterator[Backend]:
    """The engine of [parallel] with the optimiser of [memory]."""
    optimizer_of = lambda parameters: build_optimizer(parameters, config.training, config.memory)  # noqa: E731
    fp16 = config.training.precision == "fp16"
    given = (model.transformer, model.parameters, optimizer_of, config.parallel, ranks, fp16)
    backend = ranks.each(lambda: engage(*given))
    check_engine(backend, config.parallel, ranks)
    try:
        yield backend
    finally:
        if isinstance(backend.optimizer, OffloadedAdamW):
            backend.optimizer.close()


def _in_words(config: RunConfig, ranks: Ranks) -> str:
    parallel = config.parallel
    told = {
        name: value for name, value in parallel.model_dump(exclude={"strategy"}).items() if value not in (1, "none")
    }
    return ", ".join([f"{ranks.world} ranks under {parallel.strategy}", *(f"{k} = {v}" for k, v in told.items())])


@contextmanager
def _brief(run: Path) -> Iterator[None]:
    """Memory that runs out where nothing can be done again ends the run with one line."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise out_of_memory(first_line(error), run) from error
