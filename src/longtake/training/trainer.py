"""The training loop: one global batch a step, from the cache to a checkpoint, the same after every interruption."""

import math
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from longtake.data.reading_ahead import ReadingAhead
from longtake.errors import LongtakeError, Problem, RunError, agreed
from longtake.progress import Advance
from longtake.training.accumulation import accumulate
from longtake.training.checkpoint import Checkpoint, checkpoint_path, save_checkpoint
from longtake.training.clock_watch import ClockWatch
from longtake.training.experts import Trained, averages_in_use, held_of, prefix_of
from longtake.training.fallback import first_line
from longtake.training.interrupt import StopRequest
from longtake.training.optimizer import learning_rate, set_rate
from longtake.training.parts import Parts
from longtake.training.restoring import restore
from longtake.training.samples import Sample
from longtake.units import format_bytes

MOST_SKIPPED = 3
"""Updates in a row that may be skipped for a loss or gradient that is not finite."""


class Trainer:
    """Runs the steps of `parts` from `first_step` on; a step counts once its update is made."""

    def __init__(self, parts: Parts, stop: StopRequest) -> None:
        self.parts = parts
        self.stop = stop
        self.clock = ClockWatch()
        self.skipped_in_row = 0
        self.saved_step: int | None = None

    def restore(self, checkpoint: Checkpoint) -> None:
        """Puts weights, optimiser, average and loss scale back; raises RunError where it is of another model."""
        for trained in self.parts.trained:
            restore(checkpoint, trained)
        self.saved_step = checkpoint.step

    def fit(self, first_step: int) -> None:
        """Trains to the last step, saving and validating on the way; the strategy is applied and stays so.

        Raises RunError where a signal stopped the run (after saving), three updates in a row were not finite, or memory
        ran out under every strategy or in an update; CacheError (after saving) where an entry is damaged or gone.
        """
        parts, training = self.parts, self.parts.config.training
        if first_step < training.steps:
            self._rehearse(first_step)
        if self._to_look(first_step) and not parts.metrics.has_validation(first_step):
            self._validate(first_step)  # or a run that ended between a checkpoint and its validation would lack it
        parts.forecast.begin(parts.strategy.current)
        bar = parts.reporter.bar("training", training.steps, "steps", first_step, parts.forecast.left)
        with self._reading(first_step) as ahead, bar as advance:
            for step in range(first_step, training.steps):
                self._show(self._step(step, self._take(ahead, step)), advance)
                done, stopped = step + 1, self._stopped()
                self._look_at_clock(done)
                if done == training.steps or stopped or done % parts.config.output.save_every == 0:
                    self.save(done)
                if stopped:
                    raise self._stopped_after(done, stopped)
                if self._to_look(done):
                    self._validate(done)

    def save(self, step: int) -> None:
        """Writes the checkpoint after `step` updates."""
        parts = self.parts
        parts.metrics.flush()
        state = {f"{prefix_of(each.model.expert)}backend": each.backend.scale.state() for each in parts.trained}
        with held_of(parts.trained) as held:
            save_checkpoint(parts.run, step, held, state, parts.config.output.keep, parts.ranks)
        self.saved_step = step

    def _stopped(self) -> str:
        """The signal that asks the run to stop, on whichever rank it came."""
        asked = self.stop.signal  # read once: a signal may come at any line
        if self.parts.ranks.world == 1 or not self.parts.ranks.any(bool(asked)):
            return asked
        return next(signal for signal in self.parts.ranks.gathered(asked) if signal)

    def _stopped_after(self, step: int, signal: str) -> LongtakeError:
        what = f"stopped by {signal} after step {step}, which is saved"
        return agreed(RunError(Problem(what, str(self.parts.run), "continue with --resume", code="run-stopped")))

    def _reading(self, first_step: int) -> ReadingAhead[list[Sample]]:
        parts, steps = self.parts, range(first_step, self.parts.config.training.steps)
        tell = partial(parts.events.tell, own=True)
        return ReadingAhead(parts.samples, steps, parts.config.data.workers, tell)

    def _take(self, ahead: ReadingAhead[list[Sample]], step: int) -> Sequence[Sample]:
        """This rank's share of the global batch; where a rank has none to come, all save what is done and leave."""
        ranks = self.parts.ranks
        try:
            samples = ranks.each(lambda: ahead.take(step, lambda: bool(self.stop.signal)))
        except LongtakeError:
            try:
                self._save_once(step)
            except RunError as refused:
                self.parts.events.tell("save-refused", str(refused))  # beside what ends the run
            raise
        if ranks.any(samples is None):
            self._save_once(step)
            raise self._stopped_after(step, self._stopped())
        assert samples is not None
        return samples

    def _save_once(self, step: int) -> None:
        """Saves what `step` updates have made, unless there are none, or that is there already."""
        if step != (self.saved_step or 0):
            self.save(step)

    def _look_at_clock(self, step: int) -> None:
        self.parts.events.at(step)
        if said := self.clock.jumped():
            self.parts.events.tell("clock-set", f"after step {step}: {said}; no time that is measured depends on it")

    def _of(self, step: int) -> Trained:
        """What a step trains."""
        return self.parts.trained[self.parts.samples.turn(step)]

    def _rehearse(self, first_step: int) -> None:
        """Forward and backward of the largest micro-batch to come: memory runs out now or in no bucket.

        Nothing of it is kept but the fallback that it may have needed, and the pools that it filled.
        """
        parts = self.parts
        size = parts.config.training.micro_batch_size
        visits = parts.samples.sampler.largest(parts.spec.tokens, size, first_step)
        devices = [parts.device] if parts.device.type == "cuda" else []
        for trained in parts.trained:
            samples, waits = parts.samples.read(visits, trained.model.expert.sigma_range), trained.backend.waits
            # gradients that are not to be used are not summed up, so that memory may run out on one rank alone
            once = partial(accumulate, trained, samples, parts.config, parts.device, last=waits)
            with torch.random.fork_rng(devices):
                parts.strategy.attempt(once, "the largest bucket", None if waits else partial(_drop, trained))
            _drop(trained)
        frames, height, width = visits[0].entry.bucket
        peak = parts.gauge.read()
        parts.reporter.line(
            f"the largest bucket: {frames} frames of {width}x{height}, micro-batch {size}, took"
            f" device {format_bytes(peak.device_peak_bytes)}, host {format_bytes(peak.host_peak_bytes)} at its peak"
        )

    def _step(self, step: int, samples: Sequence[Sample]) -> dict[str, Any]:
        """One optimiser step; returns its line of metrics."""
        parts, training = self.parts, self.parts.config.training
        started, trained = time.perf_counter(), self._of(step)
        rate = learning_rate(step, training)
        set_rate(trained.backend.optimizer, rate)
        again = partial(_drop, trained) if parts.ranks.world == 1 else None  # else others may wait for its gradients
        compute = partial(accumulate, trained, samples, parts.config, parts.device)
        loss, retries = parts.strategy.attempt(compute, f"step {step + 1}", again)
        (loss,) = parts.ranks.summed(loss / (parts.ranks.world // parts.samples.share[1]))
        try:
            norm, skip = self._update(trained, loss)
        except torch.OutOfMemoryError as error:
            raise self._lost_update(step, error) from error
        seconds = time.perf_counter() - started
        bucket = samples[0].visit.entry.bucket
        parts.forecast.add(bucket, seconds, parts.strategy.current, whole=not retries)
        memory = parts.gauge.read().most_of(parts.ranks.gathered)
        line: dict[str, Any] = {
            "loss": loss,
            "learning_rate": rate,
            "grad_norm": norm,
            "step_seconds": seconds,
            "tokens_per_second": training.global_batch_size * parts.spec.tokens(*bucket) / seconds,
            "device_peak_bytes": memory.device_peak_bytes,
            "host_peak_bytes": memory.host_peak_bytes,
            **parts.forecast.fields(step + 1, bucket),
            "device_bytes": memory.device_bytes,
            "host_bytes": memory.host_bytes,
            "driver_peak_bytes": memory.driver_peak_bytes,
            "num_frames": bucket[0],
            **trained.backend.scale.state(),
        }
        if noise := trained.model.expert.noise:
            line["expert"] = noise
        if difference := parts.strategy.difference():
            line["strategy"] = difference
        if retries:
            line["out_of_memory"] = retries
        if skip:
            skipped = [visit.key for visit in parts.samples.sampler.batch(step)]
            line |= {"loss": None, "grad_norm": None, "skipped": skipped}
        parts.metrics.write(step + 1, line)
        self._count_skips(step, skip)
        return line | {"step": step + 1}

    def _update(self, trained: Trained, loss: float) -> tuple[float, bool]:
        """(norm of the gradient, whether the update was left out because loss or gradient is not finite)."""
        backend = trained.backend
        norm = backend.clip(self.parts.config.training.clip_norm)
        skip = not (math.isfinite(loss) and math.isfinite(norm))
        backend.step(skip)
        backend.scale.update(math.isfinite(norm))
        if not skip and trained.average is not None:
            trained.average.update()
        return norm, skip

    def _lost_update(self, step: int, error: torch.OutOfMemoryError) -> RunError:
        """Some parameters may have been updated and others not, so nothing of this state is saved."""
        run, saved = self.parts.run, self.saved_step
        what = f"the device ran out of memory in the update of step {step + 1} ({first_line(error)})"
        last = (
            f"the last checkpoint is {checkpoint_path(run, saved)}" if saved is not None else "no checkpoint is there"
        )
        remedy = f"{last}; set memory.optimizer_offload = true or use fewer data.num_frames, then --resume"
        return RunError(Problem(what, str(run), remedy, code="memory-device-full-in-update"))

    def _count_skips(self, step: int, skip: bool) -> None:
        """An overflow under fp16 is how the scale is found; elsewhere three in a row end the run."""
        parts = self.parts
        if not skip:
            self.skipped_in_row = 0
            return
        self.skipped_in_row += 1
        what = f"step {step + 1}: loss or gradient is not finite; the update is skipped"
        parts.events.tell("update-skipped", what)
        most = MOST_SKIPPED if parts.config.training.precision != "fp16" else 30
        if self.skipped_in_row >= most:
            what = f"{most} updates in a row had a loss or gradient that is not finite, the last at step {step + 1}"
            remedy = "lower training.learning_rate, and continue with --resume from the last checkpoint"
            raise agreed(RunError(Problem(what, str(parts.run), remedy, code="loss-not-finite")))

    def _to_look(self, step: int) -> bool:
        config = self.parts.config
        return step in (0, config.training.steps) or step % config.validation.every == 0

    def _validate(self, step: int) -> None:
        parts = self.parts
        if not parts.validation.entries and not parts.config.validation.samples:
            return
        with averages_in_use(parts.trained):
            self._look(step)

    def _look(self, step: int) -> None:
        parts = self.parts
        parts.gauge.begin_stage()
        models = [trained.model for trained in parts.trained]
        loss = parts.validation.loss(models) if parts.validation.entries else None
        if loss is not None:
            parts.reporter.line(f"step {step}: validation loss {loss:.4f}")
        for path in parts.validation.sample(models, step, parts.run / "samples"):
            parts.reporter.line(f"step {step}: sample {path}")
        if loss is not None:  # last, so that the line says that the samples are there too
            device, host = parts.gauge.stage_peak()
            peaks = {"validation_device_peak_bytes": device, "validation_host_peak_bytes": host}
            parts.metrics.write(step, {"validation_loss": loss, **peaks})

    def _show(self, line: dict[str, Any], advance: Advance) -> None:
        loss = "skipped" if line["loss"] is None else f"{line['loss']:.4f}"
        device, host, planned = (line[f"{what}_peak_bytes"] for what in ("device", "host", "planned"))
        beside = "" if planned is None else f", planned {format_bytes(planned)}"
        memory = f"device {format_bytes(line['device_bytes'])} (peak {format_bytes(device)}{beside})"
        memory += f"  host {format_bytes(line['host_bytes'])} (peak {format_bytes(host)})"
        advance(line["step"], f"loss {loss}  {line['tokens_per_second']:.0f} tokens/s  {memory}")
        if comparison := self.parts.forecast.comparison(device):
            self.parts.reporter.line(f"after step {line['step']}: {comparison}")


def _drop(trained: Trained) -> None:
    """As if no backward pass had run."""
    trained.backend.step(skip=True)
