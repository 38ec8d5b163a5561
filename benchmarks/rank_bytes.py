"""Bytes of the tensors that each rank holds under every engine, and of activations that ranks share, beside the plan's.

    python benchmarks/rank_bytes.py [--only NAME ...]

Ranks are processes on the CPU that exchange over gloo. Storages are counted, each once and rounded up to 512 bytes, as
the plan does it: parameters and buffers of the model (shards and what is whole beside them), gradients after the last
backward pass, AdamW's states with any copies that it updates; under ZeRO-3 the most that is gathered in a step. AdamW's
step counters are numbers in host memory and left out. Activations are what operators have made that is alive at the
peak of forward and backward, counted by the planner's ledger on the tensors of a real step.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from plan_accuracy import batch_of, with_values
from process_memory import CPU
from rank_cases import CASES, RankCase, planned
from torch import Tensor, nn

from longtake.config.sharing import SHARDED
from longtake.distributed.backend import Backend
from longtake.distributed.engines import engage, sequence_parallel_of, shared_out
from longtake.distributed.ranks import ALONE, Ranks, joined
from longtake.distributed.sequence_parallel import sequence_parallel
from longtake.memory.strategy import Among, apply
from longtake.planner.ledger import Ledger
from longtake.planner.rank_items import rounded
from longtake.planner.recording import label_gradients
from longtake.training.batch import Batch, summed_loss
from longtake.training.optimizer import build_optimizer, trained_parameters
from longtake.training.precision import compute_in

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
STEPS = 3
"""The last of them is measured: states are there, and DeepSpeed gathers in the order of the first."""
HELD = ("parameters", "gradients", "optimizer", "gathered")
Bytes = dict[str, int]


@dataclass(frozen=True)
class Training:
    """A rank's model and engine, inside whose contexts a step can be made."""

    each: RankCase
    transformer: Any
    parameters: dict[str, nn.Parameter]
    backend: Backend
    batch: Batch

    def forward_and_backward(self) -> None:
        """The only micro-batch of a step."""
        subject = self.each.case.subject
        self.backend.begin(True)
        with compute_in(self.transformer, subject.spec, subject.training.precision, CPU):
            self.backend.backward(summed_loss(self.backend.module, subject.spec, self.batch))


@contextmanager
def training(each: RankCase, ranks: Ranks) -> Iterator[Training]:
    """As `training.trainer` has it."""
    case, parallel, spec = each.case, each.sharing, each.case.subject.spec
    torch.manual_seed(0)
    transformer = with_values(case.subject)
    shared_out(transformer, transformer.blocks, parallel, ranks, CPU, lambda _wanted: None)
    parameters = trained_parameters(transformer)
    sharing = sequence_parallel_of(parallel, ranks, spec.heads)
    with ExitStack() as stack:
        if sharing is not None:
            stack.enter_context(sequence_parallel(transformer, spec, sharing))
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        among = Among(sharing, parallel.strategy in SHARDED)
        stack.enter_context(apply(transformer, spec, case.memory, scratch, among=among))
        optimizer_of = lambda trained: build_optimizer(trained, case.subject.training)  # noqa: E731
        backend = engage(transformer, parameters, optimizer_of, parallel, ranks, fp16=False)
        yield Training(each, transformer, parameters, backend, batch_of(case))


def held_bytes(each: RankCase, ranks: Ranks) -> Bytes:
    """What this rank has of the model, its gradients and the optimiser."""
    with training(each, ranks) as given:
        zero, gathered = getattr(given.backend, "zero", None), [0]
        for step in range(STEPS):
            if step == STEPS - 1:
                _look_while_computing(given.transformer, lambda: gathered.append(_gathered(given.transformer)))
            given.forward_and_backward()
            found = {"gradients": storages(_gradients(given, zero))}
            given.backend.clip(1.0)
            given.backend.step(False)
    weights = _weights(given.transformer)
    copies = storages([*weights, *_updated(zero)]) - storages(weights)
    states = [value for state in _optimizer(given, zero).state.values() for value in state.values()]
    found |= {"parameters": storages(weights), "optimizer": copies + storages(map(local, filter(_has_axes, states)))}
    return found | ({"gathered": max(gathered)} if each.sharing.strategy == "deepspeed_stage_3" else {})


def activation_bytes(each: RankCase, ranks: Ranks) -> Bytes:
    """Most that is there in forward and backward beyond what was there before, gradients of weights left out."""
    ledger = Ledger("cpu", workspaces=False)
    with training(each, ranks) as given, label_gradients(ledger, [*given.parameters.values()]):
        ledger.hold("weights", [*given.transformer.parameters(), *given.transformer.buffers()])
        with ledger:
            given.forward_and_backward()
    return {"activations": ledger.peak["block"]}


def storages(tensors: Iterable[Tensor]) -> int:
    """Bytes of their storages."""
    found = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(map(rounded, found.values()))


def local(tensor: Any) -> Tensor:
    """What this rank has of it."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _weights(transformer: nn.Module) -> list[Tensor]:
    parameters = [*transformer.parameters()]
    shards = [parameter.ds_tensor for parameter in parameters if hasattr(parameter, "ds_tensor")]
    return [*map(local, parameters), *shards, *transformer.buffers()]


def _gradients(given: Training, zero: Any) -> list[Tensor]:
    """DeepSpeed has them in a buffer, or in lists by group."""
    found = [local(each.grad) for each in given.transformer.parameters() if each.grad is not None]
    if given.each.sharing.strategy == "deepspeed_stage_3":
        return [*found, zero.grad_partitions_flat_buffer]
    lists = [*zero.averaged_gradients.values(), *zero.all_grad_tensors.values()] if zero else []
    return [*found, *(tensor for each in lists for tensor in each or ())]


def _updated(zero: Any) -> list[Tensor]:
    """What DeepSpeed's optimiser updates, whether that is the weights' memory or its own."""
    if zero is None:
        return []
    return getattr(zero, "fp32_partitioned_groups_flat", None) or zero.single_partition_of_fp32_groups


def _optimizer(given: Training, zero: Any) -> torch.optim.Optimizer:
    return given.backend.optimizer if zero is None else zero.optimizer


def _has_axes(tensor: Tensor) -> bool:
    return tensor.ndim > 0


def _gathered(transformer: Any) -> int:
    """Weights that ZeRO-3 has whole for a time, and the buffers in which several were gathered together."""
    moving = [each for each in transformer.parameters() if hasattr(each, "ds_tensor") and not each.ds_persist]
    handles = getattr(transformer, "ds_inflight_param_registry", {}).values()
    parts = [part for handle in handles for one in getattr(handle, "handles", [handle]) for part in _partitions(one)]
    return storages([*moving, *parts])


def _partitions(handle: Any) -> Sequence[Tensor]:
    return getattr(handle, "partitions", None) or ()


def _look_while_computing(transformer: Any, look: Callable[[], None]) -> None:
    for block in transformer.blocks:
        for module in block.modules():
            if not [*module.children()]:
                module.register_forward_hook(lambda *_: look())


def measured(names: Sequence[str]) -> dict[str, list[Bytes]]:
    """By case what each rank has found, of one launch for each number of ranks; one of two runs what needs one."""
    found: dict[str, list[Bytes]] = {}
    for count in sorted({max(2, CASES[name].ranks) for name in names}):
        own = [name for name in names if max(2, CASES[name].ranks) == count]
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "bytes.json"
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
            command = [*torchrun, __file__, "--out", str(out), "--only", *own]
            run = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=False)
            if run.returncode:
                raise RuntimeError(run.stderr)
            found |= json.loads(out.read_text())
    return found


def on_this_rank(names: Sequence[str], out: Path) -> None:
    """What ranks do."""
    torch.set_num_threads(1)
    alone = [name for name in names if CASES[name].ranks == 1]
    with joined() as ranks:
        mine = {name: [of_case(CASES[name], ALONE)] for name in alone[ranks.rank :: ranks.world]}
        found = {name: bytes_ for each in ranks.gathered(mine) for name, bytes_ in each.items()}
        for name in names:
            if name not in alone:
                found[name] = ranks.gathered(of_case(CASES[name], ranks))
        if ranks.is_first:
            out.write_text(json.dumps(found))


def of_case(each: RankCase, ranks: Ranks) -> Bytes:
    """What is looked for."""
    return activation_bytes(each, ranks) if each.activations else held_bytes(each, ranks)


def rows(found: Mapping[str, list[Bytes]]) -> Iterator[str]:
    """The tables: of what is held, of activations; `measured` is what the rank has that has most."""
    plans = {name: planned(CASES[name]) for name in found}
    for kinds in (HELD, ("activations",)):
        yield f"| MiB, planned / measured | {' | '.join(kinds)} | furthest from 1 |"
        yield f"|---|{'--:|' * (len(kinds) + 1)}"
        for name, ranks in found.items():
            plan = plans[name]
            most = {kind: max(each[kind] for each in ranks) for kind in plan}
            if not plan.keys() <= set(kinds):
                continue
            cells = [f"{plan[kind] / 2**20:.2f} / {most[kind] / 2**20:.2f}" if kind in plan else "" for kind in kinds]
            furthest = max((most[kind] / plan[kind] for kind in plan), key=lambda ratio: abs(ratio - 1))
            yield f"| {name} | {' | '.join(cells)} | {furthest:.4f} |"
        yield ""


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="measure as one of several ranks, and write what they found")
    parser.add_argument("--only", nargs="+", default=[*CASES], choices=CASES, metavar="NAME", help="names of cases")
    options = parser.parse_args()
    if options.out:
        on_this_rank(options.only, options.out)
        return
    for row in rows(measured(options.only)):
        print(row, flush=True)
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
