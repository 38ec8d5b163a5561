"""A rank that trains the cases of a folder in one group of ranks, and before them the references, shared out."""

import json
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from engine_cases import GLOBAL_BATCH, RATES, Case, Outcome
from longtake.config.schema import RunConfig
from longtake.config.sharing import SHARDED
from longtake.data.cache import Entry
from longtake.data.loader import Tensors, Visit
from longtake.distributed.backend import Backend
from longtake.distributed.engines import engage, sequence_parallel_of
from longtake.distributed.ranks import ALONE, Ranks, joined
from longtake.distributed.sequence_parallel import sequence_parallel
from longtake.distributed.start_checks import check_engine, group_size
from longtake.memory.strategy import Among, apply
from longtake.models.libraries import quiet_libraries
from longtake.training.batch import Batch, collate, summed_loss
from longtake.training.flow_matching import draw, generator_for
from longtake.training.model import TrainedModel, build_model, find_model
from longtake.training.optimizer import allocate_states, build_optimizer, learning_rate, set_rate
from longtake.training.precision import compute_in
from longtake.training.samples import Sample

BUCKET = (9, 48, 80)
"""45 tokens, which two ranks cannot share evenly, as little as the model's 5 heads."""
FIRST_SCALE = 2.0**24
"""Of fp16: more than the gradients bear, so that steps are skipped until it has come down."""


def main() -> None:
    """Leaves the outcome of each case in the folder."""
    quiet_libraries()
    folder = Path(sys.argv[1])
    cases = [Case(**each) for each in json.loads((folder / "cases.json").read_text())]
    references = list({case.reference.file: case.reference for case in cases}.values())
    with joined() as ranks:
        for case in references[ranks.rank :: ranks.world]:
            trained(case, ALONE).write(folder, case)
        for case in cases:
            outcome = trained(case, ranks)
            if ranks.is_first:
                outcome.write(folder, case)


def trained(case: Case, ranks: Ranks) -> Outcome:
    """Runs the case; each rank returns all of it."""
    config = case.config()
    model = build_model(config, find_model(config, print), ranks.device, ranks)
    with _engaged(case, model, ranks) as backend:
        training = _Training(case, config, model, backend, ranks)
        losses, norms, skipped = map(list, zip(*(training.step(step) for step in range(case.steps)), strict=True))
        held, weights = _gathered(backend, ranks)
        classes = type(backend).__name__, type(backend.module).__name__
        return Outcome(losses, norms, skipped, *classes, group_size(backend), held, weights)


@dataclass(frozen=True)
class _Training:
    """Steps as the trainer makes them, of samples that are functions of their number alone."""

    case: Case
    config: RunConfig
    model: TrainedModel
    backend: Backend
    ranks: Ranks

    def step(self, step: int) -> tuple[float, float, bool]:
        """Loss, norm of the gradient, and whether the update was left out."""
        backend, training, ranks = self.backend, self.config.training, self.ranks
        set_rate(backend.optimizer, learning_rate(step, training))
        (loss,) = ranks.summed(self._accumulate(step) / self.config.parallel.sp)
        norm = backend.clip(training.clip_norm)
        skip = not (math.isfinite(loss) and math.isfinite(norm))
        backend.step(skip)
        backend.scale.update(math.isfinite(norm))
        return loss, norm, skip

    def _accumulate(self, step: int) -> float:
        """Backward over this rank's share of the global batch, one sample after the other."""
        model, training, sp = self.model, self.config.training, self.config.parallel.sp
        size = GLOBAL_BATCH * sp // self.ranks.world
        first = GLOBAL_BATCH * step + self.ranks.rank // sp * size
        total = torch.zeros(())
        for index in range(first, first + size):
            self.backend.begin(index == first + size - 1)
            batch = self._batch(index)
            with compute_in(model.transformer, model.spec, training.precision, self.ranks.device):
                loss = summed_loss(self.backend.module, model.spec, batch) / GLOBAL_BATCH
                self.backend.backward(loss * self.case.gradient_factor)
            total += loss.detach()
        return float(total)

    def _batch(self, index: int) -> Batch:
        spec, training, generator = self.model.spec, self.config.training, generator_for(f"sample {index}")
        latents = spec.latent_shape(*BUCKET)
        shapes = [latents, (20, *latents[1:]), (spec.image_tokens, spec.image_dim)]
        shapes += [(7 + index % 5, spec.text_dim), (1, spec.text_dim)]
        tensors = Tensors(*(torch.randn(shape, generator=generator) for shape in shapes))
        visit = Visit(Entry(str(index), "", "", BUCKET, (BUCKET[0],), "", "", "", "train"), 0, 0)
        drawn = draw(visit.key, latents, training, 0.1, (0.0, 1.0))
        return collate([Sample(visit, tensors, drawn)], spec, training, self.ranks.device)


@contextmanager
def _engaged(case: Case, model: TrainedModel, ranks: Ranks) -> Iterator[Backend]:
    """The engine in the order in which a run puts it on, with its strategy."""
    config, transformer, spec = case.config(), model.transformer, model.spec

    def optimizer_of(parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
        if case.optimizer == "sgd":
            return torch.optim.SGD([*parameters.values()], lr=RATES["sgd"])
        return build_optimizer(parameters, config.training, config.memory)

    with ExitStack() as held:
        scratch = Path(held.enter_context(TemporaryDirectory()))
        sharing = sequence_parallel_of(config.parallel, ranks, spec.heads)
        if sharing is not None:
            held.enter_context(sequence_parallel(transformer, spec, sharing))
        among = Among(sharing, config.parallel.strategy in SHARDED)
        held.enter_context(apply(transformer, spec, config.memory, scratch, model.weight_files, among=among))
        fp16 = case.precision == "fp16"
        backend = engage(transformer, model.parameters, optimizer_of, config.parallel, ranks, fp16)
        check_engine(backend, config.parallel, ranks)
        if case.optimizer == "adamw":
            allocate_states(backend.optimizer)
        backend.scale.load_state(backend.scale.state() | {"scale": FIRST_SCALE})
        _fill_adapters(backend)
        yield backend


def _fill_adapters(backend: Backend) -> None:
    """Gives each `lora_B` values in place of zeros, with which no `lora_A` would have a gradient."""
    with backend.tensors(write=True) as held:
        for piece in held["trained"]:
            if "lora_B" in piece.name:
                drawn = torch.randn(piece.shape, generator=generator_for(piece.name)) * 0.02
                piece.values.copy_(drawn.view(-1)[piece.start : piece.stop])


def _gathered(backend: Backend, ranks: Ranks) -> tuple[list[int], dict[str, Tensor]]:
    """How many trained values each rank has, and what they are."""
    with backend.tensors() as held:
        pieces = held["trained"]
        count = sum(piece.values.numel() for piece in pieces)
        own = [(piece.name, piece.shape, piece.start, piece.values.clone()) for piece in pieces if piece.saved]
    found: dict[tuple[str, tuple[int, ...]], dict[int, Tensor]] = {}
    for name, shape, start, values in (piece for each in ranks.gathered(own) for piece in each):
        found.setdefault((name, shape), {})[start] = values
    rows = {key: torch.cat([parts[start] for start in sorted(parts)]) for key, parts in found.items()}
    return ranks.gathered(count), {name: row.view(shape) for (name, shape), row in rows.items()}


if __name__ == "__main__":
    main()
