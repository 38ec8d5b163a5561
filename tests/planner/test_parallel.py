from dataclasses import replace
from typing import Any

import pytest
from torch import nn

from longtake.config.schema import LoraConfig, MemoryStrategy, ParallelConfig, TrainingConfig
from longtake.config.sharing import sharing_conflicts
from longtake.models.wan.variants import variant
from longtake.planner.composition import Composed, compose
from longtake.planner.events import KINDS, Compute, Copy, Item, Reached, Wait, Work
from longtake.planner.hardware import device
from longtake.planner.meta_model import Subject, build, meta_batch
from longtake.planner.parallel import Sizes, distribute, engines
from longtake.planner.recorded import structure_of
from longtake.planner.recording import record
from longtake.planner.shards import Weight, zero3_shares
from longtake.planner.sizes import sizes_of
from longtake.planner.timeline import simulate
from longtake.planner.update import record_update

GPU = device("h100-sxm")
LARGE, SMALL, TRAINED = Weight(1024, 1024, 2), Weight(6, 512, 4), Weight(64, 2048, 4)
OUTSIDE = Weight(512, 1024, 2)
MIB = 2**20
SIZES = Sizes(2, (LARGE, SMALL), (TRAINED,), (OUTSIDE,), (), optimizer=2 * MIB)
"""A block has 2 MiB and 12 KiB of frozen weights and adapters of 512 KiB; outside are 1 MiB. Gradients: 1 MiB."""
ENGINES = ("ddp", "fsdp2", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3")
KEPT = MIB // 4 + MIB // 2
"""Of a quarter of the gradients, and of the weight that is at its edge, whole."""
WORK = Work(matmul_flops=10**12, moved_bytes=10**9, calls=10)


def held(**kinds: int) -> tuple[int, ...]:
    """Bytes by kind, of weights and states all."""
    always = {"weights": SIZES.frozen, "adapters": MIB, "optimizer": 2 * MIB}
    return tuple((always | kinds).get(kind, 0) for kind in KINDS)


def step() -> Composed:
    """Of two blocks, each with half a MiB of gradients."""
    passes = [
        ("prologue", 0, 5),
        ("forward 1", 0, 20),
        ("forward 2", 0, 20),
        ("turn", 0, 10),
        ("backward 2", MIB // 2, 40),
        ("backward 1", MIB, 40),
    ]
    items = tuple(Compute(WORK, label, held(gradients=done, block=own * MIB)) for label, done, own in passes)
    update = Compute(WORK, "update", held(gradients=MIB))
    return Composed(items, (update,), items[-1].held, 0, 0)


def ranked(strategy: str, gpus: int = 4, **fields: Any) -> Composed:
    return distribute(step(), ParallelConfig(strategy=strategy, **fields), gpus, SIZES)


def kinds_at(composed: Composed, label: str) -> dict[str, int]:
    items = (*composed.micro_batch, *composed.update)
    found = next(item.held for item in items if isinstance(item, Compute) and item.label == label)
    return dict(zip(KINDS, found, strict=True))


def gradients_of_update(composed: Composed) -> list[int]:
    """Bytes of gradients when their norm is taken, and when they are used."""
    return [item.held[KINDS.index("gradients")] for item in composed.update if isinstance(item, Compute)]


def copies(items: tuple[Item, ...], queue: str = "network", label: str = "") -> list[int]:
    return [each.nbytes for each in items if isinstance(each, Copy) and each.queue == queue and label in each.label]


def test_without_an_engine_nothing_changes() -> None:
    composed = step()
    assert distribute(composed, ParallelConfig(strategy="single"), 1, SIZES) is composed


def test_an_engine_on_one_gpu_has_its_buffers_and_what_it_keeps_in_host_memory() -> None:
    alone = {name: distribute(step(), ParallelConfig(strategy=name), 1, SIZES) for name in ENGINES}
    for composed in alone.values():
        assert composed.peak_bytes >= step().peak_bytes
        assert sum(copies(composed.micro_batch) + copies(composed.update)) == 0
    offload = ParallelConfig(strategy="deepspeed_stage_3", offload="parameters")
    away = distribute(step(), offload, 1, SIZES)
    assert away.host_bytes > SIZES.frozen
    assert away.peak_bytes < alone["deepspeed_stage_3"].peak_bytes


def test_ddp_holds_its_buckets_always_and_sums_gradients_up_beside_backward() -> None:
    composed = ranked("ddp")
    assert kinds_at(composed, "forward 1") == kinds_at(step(), "forward 1") | {"gradients": MIB}
    assert kinds_at(composed, "update") == kinds_at(step(), "update")
    assert copies(composed.update) == [2 * 3 * MIB // 4]
    assert not copies(composed.micro_batch)


def test_ddp_cuts_gradients_into_buckets_that_are_summed_up_as_blocks_are_done() -> None:
    sizes = replace(SIZES, block_trained=(Weight(1024, 10240, 4),), other_trained=(Weight(1024, 256, 4),))
    composed = distribute(step(), ParallelConfig(strategy="ddp"), 2, sizes)
    assert copies(composed.update) == [40 * MIB, 41 * MIB]
    slow = replace(GPU, peer_bytes_per_second=1e9)
    spans = simulate((*composed.micro_batch, *composed.update), slow).spans
    first = next(span for span in spans if span.stream == "network")
    last = next(span for span in spans if span.label == "backward 1")
    assert first.start == last.start


def test_zero_1_shares_out_states_and_keeps_the_gradients_of_its_part() -> None:
    composed = ranked("deepspeed_stage_1")
    bucket = MIB  # of all gradients, which are fewer than a bucket takes
    assert kinds_at(composed, "forward 1")["optimizer"] == 2 * MIB // 4
    expected = {"optimizer": MIB // 2, "gradients": MIB // 2, "buffers": 3 * bucket}
    assert kinds_at(composed, "backward 2") == kinds_at(step(), "backward 2") | expected
    assert gradients_of_update(composed) == [KEPT, KEPT + MIB // 4]
    assert copies(composed.update, label="gradients") == [2 * 3 * MIB // 4]
    assert copies(composed.update, label="updated") == [3 * MIB // 4]
    assert isinstance(composed.update[-1], Wait)


def test_zero_2_shares_out_gradients_and_sums_them_up_in_each_micro_batch() -> None:
    composed = ranked("deepspeed_stage_2")
    assert [kinds_at(composed, label)["gradients"] for label in ("forward 1", "backward 1")] == [0, KEPT]
    assert copies(composed.micro_batch) == [2 * 3 * MIB // 4]
    assert copies(composed.update) == [3 * MIB // 4]


def test_gradients_of_a_part_are_there_beside_those_of_earlier_micro_batches() -> None:
    alone = step()
    items = tuple(replace(item, held=held(gradients=MIB)) for item in alone.micro_batch if isinstance(item, Compute))
    for stage, expected in ((2, [KEPT, 2 * KEPT]), (1, [MIB, MIB + KEPT])):
        parallel = ParallelConfig.model_validate({"strategy": f"deepspeed_stage_{stage}"})
        composed = distribute(replace(alone, micro_batch=items), parallel, 4, SIZES)
        assert [kinds_at(composed, label)["gradients"] for label in ("forward 1", "backward 1")] == expected


def test_fsdp2_has_shards_two_gathered_blocks_and_one_block_of_gradients() -> None:
    composed = ranked("fsdp2")
    padded = 2 * MIB + 4 * (2 * 512 * 4) + MIB // 2  # six rows are two for each of four ranks
    shards = 2 * (MIB // 2 + 2 * 512 * 4) + MIB // 4
    forward = {"weights": shards, "adapters": MIB // 4, "optimizer": MIB // 2}
    assert kinds_at(composed, "forward 1") == kinds_at(step(), "forward 1") | forward | {"buffers": MIB + 2 * padded}
    backward = kinds_at(composed, "backward 1")
    assert backward["gradients"] == MIB // 4 + MIB // 2
    assert backward["buffers"] == MIB + 2 * padded + MIB // 2
    assert kinds_at(composed, "update")["buffers"] == 0
    assert copies(composed.micro_batch, label="others") == [3 * MIB // 4]
    gathered = copies(composed.micro_batch, label="ward")
    assert gathered == [3 * padded // 4] * 4
    assert copies(composed.micro_batch, label="gradients") == [3 * MIB // 8] * 2
    assert not copies(composed.update)


def test_replicas_have_all_shards_and_sum_up_their_gradients() -> None:
    two, alone = ranked("fsdp2", 4, dp_replicate=2), ranked("fsdp2", 2)
    for label in ("prologue", "forward 1", "turn", "backward 2", "update"):
        assert kinds_at(two, label) == kinds_at(alone, label)
    block = MIB // 2
    assert copies(two.micro_batch, label="gradients") == [block // 2, block // 2] * 2  # half is sent, of half a sum
    assert copies(two.micro_batch, label="ward") == copies(alone.micro_batch, label="ward")
    assert two.update[-1] == alone.update[-1]


def test_zero_3_keeps_small_weights_whole_beside_their_shards() -> None:
    composed = ranked("deepspeed_stage_3")
    small, small_shard = 6 * 512 * 4, 6 * 512
    forward = kinds_at(composed, "forward 2")
    assert forward["weights"] == 2 * (MIB // 2 + small_shard + small) + MIB // 4
    assert forward["gradients"] == MIB // 4
    assert gradients_of_update(composed) == [MIB // 4, MIB // 2]
    assert composed.host_bytes == 0


def test_zero_3_gathers_two_blocks_ahead_and_the_weight_that_is_too_much() -> None:
    composed = ranked("deepspeed_stage_3")
    gathered = 2 * (2 * MIB + MIB // 2) + 2 * MIB
    assert kinds_at(composed, "forward 2")["buffers"] == MIB + gathered  # and the bucket of gradients
    assert kinds_at(composed, "turn")["buffers"] == 2 * MIB + gathered
    assert kinds_at(composed, "backward 2")["buffers"] == 2 * MIB + gathered + MIB // 2  # a gradient on its way there
    wide = replace(SIZES, other_frozen=(Weight(2048, 2048, 2),))
    composed = distribute(step(), ParallelConfig(strategy="deepspeed_stage_3"), 4, wide)
    labels = ("prologue", "forward 1", "backward 2", "backward 1")
    more = [
        kinds_at(composed, label)["buffers"] - kinds_at(ranked("deepspeed_stage_3"), label)["buffers"]
        for label in labels
    ]
    assert more == [6 * MIB, 0, 0, 6 * MIB]


def test_offload_moves_states_and_then_all_shards_to_the_host() -> None:
    optimizer, parameters = (ranked("deepspeed_stage_3", offload=name) for name in ("optimizer", "parameters"))
    assert kinds_at(optimizer, "backward 1")["optimizer"] == kinds_at(optimizer, "update")["gradients"] == 0
    assert optimizer.host_bytes == MIB // 2 + 3 * MIB // 4
    shards = zero3_shares(SIZES, 4)
    assert parameters.host_bytes == optimizer.host_bytes + shards.frozen + shards.trained
    assert kinds_at(parameters, "forward 1")["weights"] == shards.whole_frozen
    assert copies(optimizer.micro_batch, "outward") == [MIB // 8] * 2
    assert copies(optimizer.update, "inward") == [7 * MIB // 4, MIB // 4]
    assert copies(parameters.micro_batch, "inward", "ward") == [shards.block // 4] * 4
    assert copies(parameters.update, "inward") == [7 * MIB // 4]
    stage_2 = ranked("deepspeed_stage_2", offload="optimizer")
    assert stage_2.host_bytes == MIB // 2 + 3 * MIB // 4 + MIB // 2
    assert kinds_at(stage_2, "forward 1")["optimizer"] == 0


@pytest.mark.parametrize("strategy", ENGINES)
def test_more_gpus_never_hold_more_and_together_hold_the_model(strategy: str) -> None:
    steps = [ranked(strategy, gpus) for gpus in (2, 4, 8, 16)]
    peaks = [composed.peak_bytes for composed in steps]
    assert peaks == sorted(peaks, reverse=True)
    for gpus, composed in zip((2, 4, 8, 16), steps, strict=True):
        at_rest = kinds_at(composed, "update")
        assert gpus * at_rest["weights"] >= SIZES.frozen
        assert gpus * at_rest["adapters"] >= SIZES.gradients
        assert gpus * at_rest["optimizer"] >= SIZES.optimizer


@pytest.mark.parametrize("strategy", ENGINES)
@pytest.mark.parametrize("offload", ["none", "optimizer", "parameters"])
def test_a_slower_network_is_never_faster(strategy: str, offload: str) -> None:
    parallel = ParallelConfig(strategy=strategy, offload=offload)
    if any(sharing_conflicts(MemoryStrategy(), parallel, 4, 4)):
        return
    composed = distribute(step(), parallel, 4, SIZES)
    items = (*composed.micro_batch * 3, *composed.update)
    slower = [replace(GPU, peer_bytes_per_second=rate) for rate in (4e11, 1e10, 1e9, 1e8)]
    seconds = [simulate(items, each).seconds for each in slower]
    assert seconds == sorted(seconds)
    assert seconds[-1] > seconds[0]


@pytest.mark.parametrize("strategy", ENGINES)
def test_each_event_is_awaited_after_it_was_listed_and_has_a_number_of_its_own(strategy: str) -> None:
    composed = ranked(strategy)
    known: list[int] = []
    for item in (*composed.micro_batch, *composed.update):
        if isinstance(item, Copy):
            assert set(item.after) <= set(known)
        if isinstance(item, Wait):
            assert item.event in known
        if isinstance(item, Copy | Reached):
            known.append(item.event)
    assert len(known) == len(set(known))
    assert min(known) > 2_000_000


def test_engines_of_a_lora_share_out_frozen_weights_or_nothing() -> None:
    found = engines(MemoryStrategy(), 4, "lora", 40)
    assert {each.strategy for each in found} == {"ddp", "fsdp2", "deepspeed_stage_3"}
    assert {each.sp for each in found} == {1, 2, 4}
    assert engines(MemoryStrategy(), 1, "lora", 40) == (ParallelConfig(strategy="single"),)
    assert {each.strategy for each in engines(MemoryStrategy(), 2, "full", 40)} == set(ENGINES)


@pytest.mark.parametrize("fields", [{"block_swap": 20}, {"quantization": "int8"}, {"optimizer_offload": True}])
def test_what_moves_or_changes_weights_itself_is_proposed_under_ddp_alone(fields: dict[str, Any]) -> None:
    assert {each.strategy for each in engines(MemoryStrategy(**fields), 4, "lora", 40)} == {"ddp"}


@pytest.mark.parametrize("lora", [LoraConfig(rank=8), None])
def test_sizes_are_those_of_the_composed_step(lora: LoraConfig | None) -> None:
    subject = Subject(variant("tiny-i2v"), lora, TrainingConfig(ema=0.9))
    model, strategy = build(subject), MemoryStrategy()
    update = record_update(model, strategy)
    recording = record(model, strategy, meta_batch(subject.spec, (9, 96, 96)), False)
    sizes = sizes_of(model, update)
    composed = compose(recording, update, structure_of(strategy), subject.blocks, False)
    at_rest = kinds_at(composed, "update")
    buffers = sum(-(-buffer.nbytes // 512) * 512 for buffer in nn.Module.buffers(model.transformer))
    assert at_rest["gradients"] == sizes.gradients
    assert at_rest["optimizer"] == sizes.optimizer + sizes.averages
    assert at_rest["weights"] + at_rest["adapters"] == sizes.frozen + sizes.gradients + buffers
    for gpus in (2, 3, 8):
        for parallel in engines(strategy, gpus, "full" if lora is None else "lora", 1):
            assert min(distribute(composed, parallel, gpus, sizes).peak) >= 0
