"""Putting a run back to a checkpoint, whatever ranks and engine wrote it."""

from collections.abc import Sequence

import torch

from longtake.distributed.pieces import Piece
from longtake.errors import Problem, RunError
from longtake.training.checkpoint import Checkpoint
from longtake.training.experts import Trained, prefix_of
from longtake.training.optimizer import allocate_states
from longtake.training.tensor_files import TensorFiles, fill


def restore(checkpoint: Checkpoint, trained: Trained) -> None:
    """Weights, optimiser states, average and loss scale of a transformer as they were; every rank has to call it.

    Raises RunError where they are of another model or optimiser; the loss scale of a run without one stays fresh.
    """
    backend, average, prefix = trained.backend, trained.average, prefix_of(trained.model.expert)
    allocate_states(backend.optimizer)
    with backend.tensors(write=True) as held:
        weights = checkpoint.of("trained", prefix)
        # what no rank knows of the stored, or the store not of the rank's
        if set(weights.names()) != backend.parameters.keys() or [*fill(held["trained"], weights)]:
            where = str(checkpoint.folder)
            raise RunError(
                Problem(
                    "the checkpoint holds other parameters than the run trains",
                    where,
                    code="checkpoint-other-parameters",
                )
            )
        load_states(held["optimizer"], checkpoint.of("optimizer", prefix))
    if average is not None and [*fill(average.pieces, checkpoint.of("ema", prefix))]:
        raise RunError(
            Problem(
                "the checkpoint has no average of the weights",
                str(checkpoint.folder),
                code="checkpoint-average-missing",
            )
        )
    backend.scale.load_state(checkpoint.state.get(f"{prefix}backend", {}))


def load_states(pieces: Sequence[Piece], files: TensorFiles) -> None:
    """Fills the optimiser's states; those of a parameter that `files` knows nothing of stay fresh.

    Raises RunError where they are states of another optimiser; nothing is changed then.
    """
    known = {path.split("/")[0] for path in files.names()}
    for piece in pieces:
        if piece.name.split("/")[0] in known and files.shapes.get(piece.name) != piece.shape:
            what = "the checkpoint's optimiser states are not those of the run's optimiser"
            raise RunError(
                Problem(
                    what,
                    piece.name,
                    "set memory.optimizer as it was, or start a new run",
                    code="checkpoint-other-optimizer",
                )
            )
    with torch.no_grad():
        [*fill(pieces, files)]
