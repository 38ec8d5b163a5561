"""What is planned for FSDP2, beside what torch's own holds on one of four ranks whose others answer nothing."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from longtake.config.schema import LoraConfig, MemoryStrategy, ParallelConfig, TrainingConfig
from longtake.memory.host_buffers import keep_on_device
from longtake.memory.strategy import recomputing
from longtake.models.wan.variants import variant
from longtake.planner.composition import compose
from longtake.planner.events import KINDS, Compute
from longtake.planner.meta_model import MetaModel, Subject, build, meta_batch
from longtake.planner.parallel import distribute
from longtake.planner.recorded import structure_of
from longtake.planner.recording import record
from longtake.planner.shards import fsdp2_shares
from longtake.planner.sizes import sizes_of
from longtake.planner.step import forward_and_backward
from longtake.planner.update import record_update
from longtake.training.batch import Batch

BUCKET = (9, 96, 96)
SUBJECT = Subject(variant("tiny-i2v"), LoraConfig(rank=8), TrainingConfig())
STRATEGY = MemoryStrategy()


@pytest.fixture
def four_ranks() -> Iterator[None]:
    torch.distributed.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def shard(model: MetaModel) -> None:
    for block in model.transformer.blocks:
        fully_shard(block)
    fully_shard(model.transformer, reshard_after_forward=False)


def real(batch: Batch) -> Batch:
    """With values; what is computed from a gathered weight has none worth looking at."""

    def filled(values: Any) -> Any:
        return torch.full(values.shape, 0.5) if isinstance(values, Tensor) else values

    conditioning = type(batch.conditioning)(**{name: filled(each) for name, each in vars(batch.conditioning).items()})
    latents, noise, sigma, weights = map(filled, (batch.latents, batch.noise, batch.sigma, batch.weights))
    return Batch(latents, noise, sigma, weights, conditioning)


def buffers(transformer: Any) -> int:
    """Bytes of what is gathered, of what it was gathered in, and of what gradients are scattered from."""
    groups = [each._get_fsdp_state()._fsdp_param_groups[0] for each in (transformer, *transformer.blocks)]
    parameters = [parameter for group in groups for parameter in group.fsdp_params]
    gathered = [each for parameter in parameters for each in getattr(parameter, "all_gather_outputs", ())]
    results = [group._all_gather_result for group in groups if group._all_gather_result is not None]
    context = groups[0].comm_ctx
    if context.all_gather_state is not None:
        results.append(context.all_gather_state.all_gather_result)
    scattered = [state.reduce_scatter_input for state in context.reduce_scatter_states]
    tensors = [*gathered, *(result.all_gather_output for result in results), *scattered]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


@pytest.mark.usefixtures("four_ranks")
def test_shards_are_those_that_torch_makes() -> None:
    model = build(SUBJECT)
    shares = fsdp2_shares(sizes_of(model, record_update(model, STRATEGY)), 4)
    shard(model)
    held = {True: 0, False: 0}
    for parameter in model.transformer.parameters():
        held[parameter.requires_grad] += -(-parameter.to_local().untyped_storage().nbytes() // 512) * 512
    assert held == {True: shares.trained, False: shares.frozen}


@pytest.mark.usefixtures("four_ranks")
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")
def test_what_is_gathered_and_scattered_is_what_torch_holds() -> None:
    model = build(SUBJECT)
    batch, update = meta_batch(SUBJECT.spec, BUCKET), record_update(model, STRATEGY)
    sizes = sizes_of(model, update)
    composed = compose(record(model, structure_of(STRATEGY), batch, False), update, STRATEGY, SUBJECT.blocks, False)
    planned = distribute(composed, ParallelConfig(strategy="fsdp2"), 4, sizes)
    seen: list[int] = []
    model.transformer.to_empty(device="cpu")
    with ExitStack() as stack:
        stack.enter_context(recomputing(model.transformer, SUBJECT.spec, STRATEGY, lambda _: keep_on_device))
        shard(model)
        for block in model.transformer.blocks:
            block.ffn.register_forward_hook(lambda *_: seen.append(buffers(model.transformer)))
        forward_and_backward(model, real(batch))
    expected = [
        dict(zip(KINDS, item.held, strict=True))["buffers"]
        for item in planned.micro_batch
        if isinstance(item, Compute) and item.label.startswith(("forward", "backward")) and item.work.attention_flops
    ]
    shares, last = fsdp2_shares(sizes, 4), len(seen) - 1
    # before the first gradients go none are scattered, beside the last block none is gathered
    spared = {SUBJECT.blocks: shares.block_gradients, last: shares.block}
    assert seen == [nbytes - spared.get(index, 0) for index, nbytes in enumerate(expected)]
