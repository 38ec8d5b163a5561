from dataclasses import replace
from typing import Any

import pytest

from longtake.config.schema import LoraConfig, MemoryStrategy, TrainingConfig
from longtake.models.wan.variants import variant
from longtake.planner.composition import Composed, compose
from longtake.planner.direct import trace
from longtake.planner.events import KINDS
from longtake.planner.meta_model import Subject, build, meta_batch
from longtake.planner.plans import Bucket
from longtake.planner.recorded import structure_of
from longtake.planner.recording import record
from longtake.planner.update import record_update

LORA = LoraConfig(rank=8)
KEPT = {"gradient_checkpointing": "block_keep_attention"}
HOST, DISK = {"activation_offload": "host"}, {"activation_offload": "disk"}
SLICED = {"slices": 4, "attention_head_groups": 2}
STRATEGIES: dict[str, dict[str, Any]] = {
    "none": {"gradient_checkpointing": "none"},
    "block": {},
    "attention kept": KEPT,
    "half to host": {**HOST, "activation_offload_fraction": 0.5},
    "all to disk, attention too": {**DISK, **KEPT},
    "part swapped": {**HOST, "block_swap": 5},
    "swapped from disk": {"block_swap": 7, "block_swap_from": "disk"},
    "slices": SLICED,
    "slices, all away": {**SLICED, **KEPT, **HOST, "block_swap": 7},
    "8-bit states": {"optimizer": "adamw8bit"},
    "states in host memory": {"optimizer_offload": True},
    "int8": {**HOST, "quantization": "int8", "block_swap": 6},
}
TRAINABLE = {name: fields for name, fields in STRATEGIES.items() if "block_swap" not in fields}
"""Without frozen weights."""


def subject(name: str, lora: LoraConfig | None, precision: str = "bf16", layers: int = 7) -> Subject:
    """A tiny variant with `layers` blocks."""
    found = variant(name)
    deep = replace(found, transformer_config=found.transformer_config | {"num_layers": layers})
    return Subject(deep, lora, TrainingConfig(precision=precision), dtype="fp32" if precision == "fp32" else "bf16")  # type: ignore[arg-type]


def both(given: Subject, fields: dict[str, Any], bucket: Bucket, clips: int, micro_batches: int) -> list[Composed]:
    """A step from a recording of three blocks, and the step of all of them."""
    strategy = MemoryStrategy(**fields)
    batch, accumulating = meta_batch(given.spec, bucket, clips), micro_batches > 1
    few, whole = build(given, 3), build(given)
    recording = record(few, structure_of(strategy), batch, accumulating)
    update = record_update(few, strategy)
    composed = compose(recording, update, strategy, given.blocks, accumulating)
    return [composed, trace(whole, strategy, batch, micro_batches)]


def assert_equal(composed: Composed, whole: Composed) -> None:
    """All but the name of what blocks keep, which a trace of the whole does not know."""
    assert composed.peak_bytes == whole.peak_bytes
    unnamed = ("checkpoints", "block", "buffers")
    for kind, mine, its in zip(KINDS, composed.peak, whole.peak, strict=True):
        assert kind in unnamed or mine == its, kind
    assert composed.host_bytes == whole.host_bytes
    assert composed.disk_bytes in (whole.disk_bytes, 0)  # 0: the weights are in the model's own file, of which a trace
    # of the whole knows nothing


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_three_recorded_blocks_give_the_peak_of_all_under_every_strategy(name: str, micro_batches: int) -> None:
    assert_equal(*both(subject("tiny-i2v", LORA), STRATEGIES[name], (17, 96, 160), 1, micro_batches))


@pytest.mark.parametrize("name", TRAINABLE)
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_full_fine_tuning_is_composed_as_it_is(name: str, micro_batches: int) -> None:
    if TRAINABLE[name].get("quantization"):
        pytest.skip("weights that are trained are not quantised")
    assert_equal(*both(subject("tiny-t2v", None), TRAINABLE[name], (17, 96, 160), 1, micro_batches))


@pytest.mark.parametrize("device_type", ["cuda", "cpu"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("model", ["tiny-t2v", "tiny-i2v", "tiny-ti2v"])
def test_every_task_type_and_device_is_composed_as_it_is(model: str, precision: str, device_type: Any) -> None:
    given = replace(subject(model, LORA, precision), device_type=device_type)
    for name in ("block", "slices, all away"):
        assert_equal(*both(given, STRATEGIES[name], (9, 96, 96), 3, 2))


def test_a_model_of_forty_blocks_is_composed_as_it_is() -> None:
    given = Subject(variant("wan2.1-i2v-14b-480p"), LoraConfig(rank=32), TrainingConfig())
    assert given.blocks == 40
    for fields in ({}, {**HOST, **KEPT, "activation_offload_fraction": 0.6, "block_swap": 33}):
        assert_equal(*both(given, fields, (129, 480, 832), 1, 2))


def test_a_recording_of_all_blocks_stands_for_itself() -> None:
    given = subject("tiny-i2v", LORA, layers=5)
    strategy = MemoryStrategy(**HOST, checkpoint_every=2)
    batch, model = meta_batch(given.spec, (17, 96, 160)), build(given)
    recording = record(model, structure_of(strategy), batch, False)
    composed = compose(recording, record_update(model, strategy), strategy, given.blocks, False)
    assert_equal(composed, trace(model, strategy, batch))


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
@pytest.mark.parametrize("fields", [STRATEGIES["none"], {}, SLICED], ids=str)
def test_a_given_first_frame_takes_hardly_more_than_none(fields: dict[str, Any], lora: LoraConfig | None) -> None:
    model = build(subject("wan2.2-ti2v-5b", lora, layers=3))
    given = meta_batch(model.spec, (121, 704, 1280))
    none = replace(given, conditioning=replace(given.conditioning, first_latents=None))
    first, without = (trace(model, MemoryStrategy(**fields), batch).peak_bytes for batch in (given, none))
    # a slice that has tokens of both is put together of two parts: one fp32 copy of a quarter of the tokens more
    assert abs(first - without) < 100 * 2**20, "where the modulation of every token would take 1.9 GiB a block"
