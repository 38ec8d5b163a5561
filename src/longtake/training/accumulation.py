"""The gradient of a rank's share of a global batch, micro-batch by micro-batch."""

from collections.abc import Sequence

import torch

from longtake.config.schema import RunConfig
from longtake.config.sharing import SHARDED
from longtake.training.batch import collate, summed_loss
from longtake.training.experts import Trained
from longtake.training.flow_matching import generator_for
from longtake.training.precision import compute_in
from longtake.training.samples import Sample


def accumulate(
    trained: Trained, samples: Sequence[Sample], config: RunConfig, device: torch.device, last: bool = True
) -> float:
    """Backward over the micro-batches; the loss is this rank's part of the mean over the whole global batch.

    Without `last` more are to come.
    """
    model, backend, training = trained.model, trained.backend, config.training
    size = training.micro_batch_size
    keep = config.lora is not None or config.parallel.strategy not in SHARDED
    total = torch.zeros((), device=device)
    for first in range(0, len(samples), size):
        chosen = samples[first : first + size]
        backend.begin(last and first + size >= len(samples))
        batch = collate(chosen, model.spec, training, device)
        # LoRA's dropout draws from the global generator: give it a state that is a function of the visit
        torch.manual_seed(generator_for(f"dropout:{training.seed}:{chosen[0].visit.key}").initial_seed())
        with compute_in(model.transformer, model.spec, training.precision, device, keep):
            loss = summed_loss(backend.module, model.spec, batch) / training.global_batch_size
            backend.backward(loss)
        total += loss.detach()
    return float(total)
