"""A rank that trains the cases of a file, one after the other in one group of ranks, and the references of all first."""

import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from engine_cases import GLOBAL_BATCH, STEPS, Case, Outcome
from longtake.config.sharing import SHARDED
from longtake.data.cache import Entry
from longtake.data.loader import Tensors, Visit
from longtake.distributed.backend import Backend
from longtake.distributed.engines import engage, sequence_parallel_of
from longtake.distributed.ranks import ALONE, Ranks, joined
from longtake.distributed.sequence_parallel import sequence_parallel
from longtake.distributed.start_checks import check_engine, group_size
from longtake.memory.strategy import AmongRanks, apply
from longtake.training.batch import Sample, collate, summed_loss
from longtake.training.flow_matching import draw, generator_for
from longtake.training.model import build_model, find_model
from longtake.training.optimizer import allocate_states, build_optimizer
from longtake.training.precision import compute_in

RATES = {"sgd": 0.1, "adamw": 1e-4}
BUCKET = (9, 48, 80)
"""45 tokens and 5 heads: two ranks share neither evenly."""


def main() -> None:
    with joined() as ranks:
        folder = Path(sys.argv[1])
        cases = [Case(**each) for each in json.loads((folder / "cases.json").read_text())]
        references = list({case.reference.key: case.reference for case in cases}.values())
        for case in references[ranks.rank :: ranks.world]:
            trained(case, ALONE).write(folder, case)
        for case in cases:
            outcome = trained(case, ranks)
            if ranks.is_first:
                outcome.write(folder, case)


def trained(case: Case, ranks: Ranks) -> Outcome:
    config, started = case.config(), time.perf_counter()
    model = build_model(config, find_model(config, print), ranks.device, ranks)
    with engaged(case, config, model, ranks) as backend:
        steps = [one_step(step, case, config, model, backend, ranks) for step in range(STEPS)]
        seconds = time.perf_counter() - started
        weights = gathered(backend, ranks)
    losses, norms, skipped = map(list, zip(*steps))
    return Outcome(losses, norms, skipped, type(backend).__name__, group_size(backend), seconds, weights)


@contextmanager
def engaged(case, config, model, ranks) -> Iterator[Backend]:
    def optimizer_of(parameters):
        if case.optimizer == "sgd":
            return torch.optim.SGD([*parameters.values()], lr=RATES["sgd"])
        return build_optimizer(parameters, config.training, config.memory)

    transformer, spec = model.transformer, model.spec
    with ExitStack() as held:
        scratch = Path(held.enter_context(TemporaryDirectory()))
        sharing = sequence_parallel_of(config.parallel, ranks, spec.heads)
        if sharing is not None:
            held.enter_context(sequence_parallel(transformer, spec, sharing))
        among = AmongRanks(sharing, config.parallel.strategy in SHARDED)
        held.enter_context(apply(transformer, spec, config.memory, scratch, model.weight_files, among=among))
        backend = engage(transformer, model.parameters, optimizer_of, config.parallel, ranks, config.training.precision == "fp16")
        check_engine(backend, config.parallel, ranks)
        if case.optimizer == "adamw":
            allocate_states(backend.optimizer)
        with backend.tensors(write=True) as there:
            for piece in there["trained"]:
                if "lora_B" in piece.name:
                    drawn = torch.randn(piece.shape, generator=generator_for(piece.name)) * 0.02
                    piece.values.copy_(drawn.view(-1)[piece.start : piece.stop])
        yield backend


def one_step(step, case, config, model, backend, ranks):
    sp, training = config.parallel.sp, config.training
    share = GLOBAL_BATCH * sp // ranks.world
    first = GLOBAL_BATCH * step + ranks.rank // sp * share
    total = torch.zeros(())
    for index in range(first, first + share):
        backend.begin(index == first + share - 1)
        batch = collate([sample(index, model.spec, training)], model.spec, training, ranks.device)
        with compute_in(model.transformer, model.spec, training.precision, ranks.device):
            loss = summed_loss(backend.module, model.spec, batch) / GLOBAL_BATCH
            backend.backward(loss * case.gradient_factor)
        total += loss.detach()
    (loss,) = ranks.summed(float(total) / sp)
    norm = backend.clip(training.clip_norm)
    skip = not (math.isfinite(loss) and math.isfinite(norm))
    backend.step(skip)
    backend.scale.update(math.isfinite(norm))
    return loss, norm, skip


def sample(index, spec, training):
    g = generator_for(f"sample {index}")
    shape = spec.latent_shape(*BUCKET)
    def made(*s): return torch.randn(s, generator=g)
    tensors = Tensors(made(*shape), made(20, *shape[1:]), made(spec.image_tokens, spec.image_dim), made(7 + index % 5, spec.text_dim), made(1, spec.text_dim))
    entry = Entry(str(index), "", "", BUCKET, (BUCKET[0],), "", "", "", "train")
    return Sample(Visit(entry, 0, 0), tensors, draw(str(index), shape, training, 0.1, (0.0, 1.0)))


def gathered(backend, ranks):
    with backend.tensors() as held:
        own = [(p.name, p.shape, p.start, p.values.clone()) for p in held["trained"] if p.saved]
    rows = {}
    for pieces in ranks.gathered(own):
        for name, shape, start, values in pieces:
            rows.setdefault((name, shape), []).append((start, values))
    return {name: torch.cat([v for _, v in sorted(parts, key=lambda p: p[0])]).view(shape) for (name, shape), parts in rows.items()}


if __name__ == "__main__":
    main()
