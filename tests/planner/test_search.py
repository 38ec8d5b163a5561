from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longtake.config.conflicts import memory_conflicts
from longtake.config.schema import LoraConfig, MemoryStrategy, TrainingConfig
from longtake.models.wan.variants import variant
from longtake.planner.advice import most_frames
from longtake.planner.candidates import Freedom
from longtake.planner.direct import trace
from longtake.planner.hardware import DEVICES
from longtake.planner.load import Load
from longtake.planner.machine import Machine
from longtake.planner.meta_model import Subject, build, meta_batch
from longtake.planner.plans import Bucket
from longtake.planner.search import Candidate, Question, Search
from longtake.planner.tracer import Tracer

GIB = 2**30
CASE: Bucket = (129, 480, 832)
pytestmark = pytest.mark.long
I2V = "wan2.1-i2v-14b-480p"
SMALL = "wan2.1-t2v-1.3b"
ANY = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@cache
def tracer(name: str, rank: int = 32) -> Tracer:
    """One for all tests: what it has recorded is used again."""
    return Tracer(Subject(variant(name), LoraConfig(rank=rank), TrainingConfig()))


def machine(gpu: str = "h100-sxm", budget: float | None = None, host: int = 128) -> Machine:
    device = DEVICES[gpu]
    return Machine(device, 1, device.memory_bytes if budget is None else int(budget * GIB), host * GIB, 512 * GIB)


def search(name: str, bucket: Bucket, own: Machine, clips: int = 4, **pinned: Any) -> Search:
    return Search(tracer(name), Question(own, bucket, clips, Freedom(pinned)))


def fastest(found: Search) -> Candidate:
    return next(each for each in found.found() if found.fits(each))


def test_the_reference_case_fits_sixteen_gibibytes_without_rounding_and_within_a_tenth_of_the_fastest() -> None:
    whole = fastest(search(I2V, CASE, machine()))
    small = fastest(search(I2V, CASE, machine(budget=16, host=96)))
    assert small.device_bytes <= 16 * GIB
    assert small.host_bytes <= 96 * GIB
    assert (small.strategy.quantization, small.strategy.optimizer) == ("none", "adamw")
    assert small.seconds <= 1.10 * whole.seconds


def test_high_definition_fits_twenty_four_gibibytes() -> None:
    found = fastest(search(I2V, (81, 720, 1280), machine(budget=24)))
    assert found.device_bytes <= 24 * GIB


def test_only_what_the_user_leaves_open_is_searched() -> None:
    pinned = {"gradient_checkpointing": "block", "slices": 16, "activation_offload": "host"}
    for each in search(SMALL, (81, 480, 832), machine("rtx-4090", 12), **pinned).found():
        assert {name: getattr(each.strategy, name) for name in pinned} == pinned
    for frames in (5, 81):  # at five frames a step without checkpointing would fit, whose weights cannot be streamed
        fixed = search(SMALL, (frames, 480, 832), machine("rtx-4090"), block_swap=12).found()
        assert {each.strategy.block_swap for each in fixed} == {12}


def test_weights_are_rounded_only_where_nothing_exact_fits() -> None:
    """Without a host to stream from and with a slow disk forbidden, 16 GiB hold the weights in four bits alone."""
    pinned = {"block_swap": 0}
    roomy = search(I2V, (17, 480, 832), machine("a100-80gb"), clips=1, **pinned)
    assert all(each.strategy.quantization == "none" for each in roomy.found())
    tight = search(I2V, (17, 480, 832), machine("a100-80gb", 20), clips=1, **pinned)
    assert {each.strategy.quantization for each in tight.found()} <= {"int8", "nf4"}
    assert tight.fits(tight.found()[0])


def test_a_small_host_is_respected() -> None:
    found = fastest(search(I2V, CASE, machine(budget=24, host=24)))
    assert found.host_bytes <= 24 * GIB


def test_candidates_are_sorted_and_none_is_beaten_in_everything() -> None:
    found = search(SMALL, (81, 480, 832), machine("rtx-4090")).found()
    assert [each.seconds for each in found] == sorted(each.seconds for each in found)
    assert not any(
        other.seconds <= each.seconds
        and other.device_bytes <= each.device_bytes
        and other.host_bytes <= each.host_bytes
        for each in found
        for other in found
        if other is not each
    )


def test_what_cannot_fit_is_told_from_the_nearest_on() -> None:
    own = search(SMALL, (81, 480, 832), machine("rtx-4090", 1))
    found = own.found()
    assert found
    assert not any(own.fits(each) for each in found)
    assert [own.excess(each) for each in found] == sorted(own.excess(each) for each in found)


@ANY
@given(st.floats(3, 24), st.floats(0, 8), st.sampled_from([5, 17, 49, 81]))
def test_a_larger_budget_never_gives_a_slower_choice(budget: float, more: float, frames: int) -> None:
    bucket = (frames, 480, 832)
    small, large = (search(SMALL, bucket, machine("rtx-4090", min(23.5, budget + each))) for each in (0, more))
    first = small.found()[0]
    if small.fits(first):
        assert fastest(large).seconds <= first.seconds * 1.0001


@ANY
@given(
    st.sampled_from([{}, {"activation_offload": "host"}, {"gradient_checkpointing": "none"}, {"block_swap": 10}]),
    st.sampled_from([(5, 240, 416), (9, 240, 416), (17, 240, 416), (17, 480, 416), (17, 480, 832)]),
    st.integers(1, 3),
)
def test_more_frames_size_rank_or_clips_never_allocate_less(fields: dict[str, Any], bucket: Bucket, clips: int) -> None:
    strategy = MemoryStrategy(**fields)
    frames, height, width = bucket

    def peak(rank: int, load: Load) -> int:
        return tracer(SMALL, rank).composed(strategy, load).peak_bytes

    own = peak(8, Load(bucket, clips, True))
    assert peak(8, Load((frames + 4, height, width), clips, True)) >= own
    assert peak(8, Load((frames, height, width + 16), clips, True)) >= own
    assert peak(8, Load(bucket, clips + 1, True)) >= own
    assert peak(16, Load(bucket, clips, True)) >= own
    assert peak(8, Load(bucket, clips, False)) <= own


@settings(ANY, max_examples=4)
@given(st.floats(4, 23), st.sampled_from([(17, 480, 832), (33, 480, 832)]))
def test_a_candidates_peak_is_that_of_a_trace_of_the_whole_model(budget: float, bucket: Bucket) -> None:
    own = search(SMALL, bucket, machine("rtx-4090", budget), clips=1)
    found = own.found()[0]
    assert not [*memory_conflicts(found.strategy)]
    whole = trace(_whole(), found.strategy, meta_batch(variant(SMALL).spec, bucket), 1)
    assert whole.peak_bytes == found.composed.peak_bytes
    assert sum(found.composed.peak) == found.composed.peak_bytes


@cache
def _whole() -> Any:
    return build(tracer(SMALL).subject)


@pytest.mark.parametrize("gpu", ["h100-sxm", "rtx-3090"])
def test_the_slack_of_twelve_blocks_is_nearly_that_of_forty(gpu: str) -> None:
    from longtake.planner.allocator import replay
    from longtake.planner.storages import Storages

    own, load = tracer(I2V), Load(CASE, 1, True)
    for fields in ({"activation_offload": "host"}, {"gradient_checkpointing": "block_keep_attention"}):
        strategy = MemoryStrategy(**fields)
        storages = Storages(own.recording(strategy, load), own.blocks)
        composed = own.composed(strategy, load, storages)
        reserved = replay(storages.events, expandable=True).reserved_bytes
        slack = own.slack_bytes(strategy, load, DEVICES[gpu].generation, expandable=True)
        assert abs(composed.peak_bytes + slack - reserved) < 0.02 * reserved


def test_on_a_cpu_host_memory_is_the_devices() -> None:
    own = replace(machine(budget=8), device=DEVICES["cpu"])
    subject = Subject(variant("tiny-t2v"), LoraConfig(rank=8), TrainingConfig(precision="fp32"), "fp32", "cpu")
    parts = Tracer(subject)
    found = Search(parts, Question(own, (17, 96, 160), 2, Freedom({"activation_offload": "host"})))
    moved, kept = (
        found.candidate(MemoryStrategy(activation_offload=place), Load((17, 96, 160), 1, True), 0)
        for place in ("host", "none")
    )
    assert moved.device_bytes >= kept.device_bytes


def test_ranks_share_no_clip_where_adapters_draw_dropout() -> None:
    drawing = Tracer(Subject(variant(SMALL), LoraConfig(dropout=0.1), TrainingConfig()))
    own = replace(machine(), gpus=4)
    asked = (Search(parts, Question(own, CASE, 4, Freedom())) for parts in (tracer(SMALL), drawing))
    assert [{each.sp for each in found.sharings()} for found in asked] == [{1, 2, 4}, {1}]


def test_ranks_of_a_machine_have_its_disk_together() -> None:
    """Copies that a step waits for take so many times as long, and nothing else does."""
    strategy = MemoryStrategy(activation_offload="disk")
    one, eight = (search(SMALL, (17, 480, 832), replace(machine("rtx-4090"), gpus=gpus), 8) for gpus in (1, 8))
    alone, shared = (found.candidate(strategy, Load((17, 480, 832), 1, True), 0).device for found in (one, eight))
    assert shared == replace(alone, disk_bytes_per_second=alone.disk_bytes_per_second / 8)


def test_the_longest_clip_of_several_ranks_is_one_that_they_share() -> None:
    subject = Subject(variant("tiny-t2v"), LoraConfig(rank=8), TrainingConfig(precision="fp32"), "fp32", "cpu")
    parts, own = Tracer(subject), replace(machine(budget=0.15), device=DEVICES["cpu"])
    asked = (Question(replace(own, gpus=ranks), (17, 96, 160), 4, Freedom()) for ranks in (1, 4))
    alone, shared = (most_frames(parts, question) for question in asked)
    assert alone is not None
    assert shared is not None
    assert shared > alone
