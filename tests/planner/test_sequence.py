from dataclasses import replace
from typing import Any

import pytest

from longtake.config.schema import LoraConfig, MemoryStrategy, ParallelConfig, TrainingConfig
from longtake.models.wan.variants import variant
from longtake.planner.composition import Composed, compose
from longtake.planner.events import KINDS, Compute, Copy
from longtake.planner.hardware import device
from longtake.planner.meta_model import Subject, batch_tensors, build, meta_batch
from longtake.planner.parallel import distribute
from longtake.planner.rank_items import Rank, rounded
from longtake.planner.recorded import structure_of
from longtake.planner.recording import record
from longtake.planner.sequence import Exchange, degrees, exchange_of, exchanged, rank_shape
from longtake.planner.sizes import sizes_of
from longtake.planner.timeline import simulate
from longtake.planner.update import record_update

BUCKET = (17, 96, 160)
"""In the tiny models 5 x 6 x 10 tokens."""
LORA = LoraConfig(rank=8)
KEPT = {"gradient_checkpointing": "block_keep_attention"}
STRATEGIES: dict[str, dict[str, Any]] = {
    "no checkpointing": {"gradient_checkpointing": "none"},
    "block": {},
    "attention kept": KEPT,
    "in slices": {"slices": 4, "attention_head_groups": 2},
    "in slices, attention kept and offloaded": {"slices": 4, "activation_offload": "host", **KEPT},
    "two blocks at a time": {"checkpoint_every": 2},
}


def composed_of(
    name: str,
    fields: dict[str, Any],
    sp: int,
    bucket: tuple[int, int, int] = BUCKET,
    lora: LoraConfig | None = LORA,
) -> Composed:
    """A rank's step as it is recorded; `sp` is that of its batch."""
    found = variant(name)
    subject = Subject(found, lora, TrainingConfig())
    strategy, model = MemoryStrategy(**fields), build(subject)
    recording = record(model, structure_of(strategy), meta_batch(subject.spec, bucket, 2, sp), False)
    return compose(recording, record_update(model, strategy), strategy, subject.blocks, False)


def rank_of(name: str, fields: dict[str, Any], sp: int) -> Composed:
    rank, composed = Rank(), composed_of(name, fields, sp)
    exchanged(composed.micro_batch, exchange_of(variant(name).spec, BUCKET, 2, sp), rank)
    return replace(composed, micro_batch=rank.taken())


def work(composed: Composed, field: str) -> int:
    return sum(getattr(each.work, field) for each in composed.micro_batch if isinstance(each, Compute))


@pytest.mark.parametrize("fields", STRATEGIES.values(), ids=STRATEGIES)
@pytest.mark.parametrize("name", ["tiny-t2v", "tiny-i2v", "tiny-ti2v"])
def test_ranks_together_do_the_attention_of_one(name: str, fields: dict[str, Any]) -> None:
    alone, shared = composed_of(name, fields, 1), rank_of(name, fields, 5)
    assert 5 * work(shared, "attention_flops") == work(alone, "attention_flops")
    assert 5 * work(shared, "attention_backward_flops") == work(alone, "attention_backward_flops")


@pytest.mark.parametrize(("name", "times"), [("block", 3), ("attention kept", 3), ("no checkpointing", 2)])
def test_four_tensors_are_exchanged_in_each_pass_of_each_block(name: str, times: int) -> None:
    found = variant("tiny-i2v")
    blocks, spec = int(found.transformer_config["num_layers"]), found.spec
    shared = rank_of("tiny-i2v", STRATEGIES[name], 5)
    tensor = 2 * 60 * spec.heads * spec.head_dim * 2  # clips, tokens, heads, head_dim, bytes
    sent = [each.nbytes for each in shared.micro_batch if isinstance(each, Copy) and each.queue == "network"]
    velocity = 2 * 300 * 64 * 2  # clips, all tokens, values of a patch, bytes
    assert sum(sent) == blocks * times * 4 * (tensor * 4 // 5) + velocity * 4 // 5


def more(name: str, fields: dict[str, Any], kind: str, lora: LoraConfig | None = LORA) -> dict[str, int]:
    """Most bytes of a kind, by part of the step, that a rank of five has beyond what is recorded."""
    composed, index, rank = composed_of(name, fields, 5, lora=lora), KINDS.index(kind), Rank()
    exchanged(composed.micro_batch, exchange_of(variant(name).spec, BUCKET, 2, 5), rank)
    recorded, shared = (
        [each for each in items if isinstance(each, Compute)] for items in (composed.micro_batch, rank.taken())
    )
    found: dict[str, int] = {}
    for before, after in zip(recorded, shared, strict=True):
        found[before.label] = max(found.get(before.label, 0), after.held[index] - before.held[index])
    return found


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("block", {"forward 1": 1, "forward 4": 1, "turn": 0, "backward 4": 1, "backward 1": 1}),
        ("attention kept", {"forward 1": 1, "forward 4": 1, "turn": 0, "backward 4": 1, "backward 1": 1}),
        ("no checkpointing", {"forward 1": 1, "forward 4": 4, "turn": 4, "backward 4": 4, "backward 1": 1}),
        ("two blocks at a time", {"turn": 0, "backward 4": 2, "backward 2": 2}),
    ],
)
def test_what_attention_gave_is_there_twice_until_backward(name: str, expected: dict[str, int]) -> None:
    spec = variant("tiny-i2v").spec
    output = rounded(2 * 60 * spec.heads * spec.head_dim * 2)  # clips, tokens, heads, head_dim, bytes
    found = more("tiny-i2v", STRATEGIES[name], "buffers")
    assert {label: found[label] for label in expected} == {label: times * output for label, times in expected.items()}


@pytest.mark.parametrize(
    ("name", "inputs"),
    [("tiny-t2v", ("latents",)), ("tiny-i2v", ("latents", "latents", "condition")), ("tiny-ti2v", ("latents",) * 2)],
)
@pytest.mark.parametrize("lora", [LORA, None])
def test_whole_clips_are_there_in_the_batch_and_before_and_after_the_blocks(
    name: str, inputs: tuple[str, ...], lora: LoraConfig | None
) -> None:
    spec = variant(name).spec
    whole, own = (meta_batch(spec, BUCKET, 2, sp) for sp in (1, 5))
    missing = {
        key: its.nbytes - mine.nbytes
        for key, its, mine in (
            ("latents", whole.latents, own.latents),
            ("condition", whole.conditioning.condition, own.conditioning.condition),
        )
        if its is not None and mine is not None
    }
    batch = sum(its.nbytes - mine.nbytes for its, mine in zip(batch_tensors(whole), batch_tensors(own), strict=True))
    given = sum(missing[key] for key in inputs)
    embedded = 4 * exchange_of(spec, BUCKET, 2, 5).unit  # by the other ranks
    found = more(name, {}, "block", lora)
    assert found["forward 1"] == batch + given
    assert found["prologue"] == batch + given + embedded
    assert found["turn"] == batch + given + 3 * missing["latents"]
    trained = 0 if lora else (given - (missing["latents"] if len(inputs) > 1 else 0)) // 2  # in bf16
    assert found["backward 1"] == batch + trained


def test_of_heads_that_do_not_come_out_even_a_rank_has_one_more() -> None:
    even, odd = Exchange(2, 1, 64, 4, 32, 512), Exchange(2, 1, 64, 5, 32, 512)
    assert (even.own_heads, odd.own_heads) == (2, 3)
    assert even.own_flops == 2 * even.attention_flops(64)
    assert odd.own_flops == 4 * odd.attention_flops(64) * 3 // 5
    head = 128 * 32 * 2  # all tokens, head_dim, bytes
    assert (odd.unit, odd.own_unit) == (5 * head // 2, 3 * head)
    assert even.kept == even.unit
    assert odd.kept == odd.unit + 4 * head // 2 + 4 * 128 // 2  # four tensors, and a sum for each row


def test_exchanges_are_waited_for() -> None:
    shared = rank_of("tiny-i2v", {}, 5)
    slow = replace(device("h100-sxm"), peer_bytes_per_second=1e6)
    timeline = simulate(shared.micro_batch, slow)
    copied = sum(each.nbytes for each in shared.micro_batch if isinstance(each, Copy))
    assert timeline.stalled_seconds == pytest.approx(copied / 1e6)
    assert timeline.bound_by == "network"


def test_a_rank_of_two_has_half_the_activations() -> None:
    bucket, index = (81, 480, 832), KINDS.index("checkpoints")
    peaks = [composed_of("tiny-t2v", {}, sp, bucket).peak[index] for sp in (1, 2, 4)]
    assert peaks[1] == pytest.approx(peaks[0] / 2, rel=0.01)
    assert peaks[2] == pytest.approx(peaks[0] / 4, rel=0.01)


@pytest.mark.parametrize("name", ["wan2.1-i2v-14b-480p", "wan2.2-ti2v-5b"])
@pytest.mark.parametrize("bucket", [(129, 480, 832), (81, 704, 1280), (1, 512, 512), (17, 96, 160)])
@pytest.mark.parametrize("sp", [1, 2, 3, 5, 8])
def test_a_rank_has_its_tokens_and_hardly_more(name: str, bucket: tuple[int, int, int], sp: int) -> None:
    spec = variant(name).spec
    whole = spec.latent_shape(*bucket)
    shape = rank_shape(spec, bucket, sp)
    tokens = exchange_of(spec, bucket, 1, sp).tokens
    assert 0 <= tokens - -(-spec.tokens(*bucket) // sp) <= 0.005 * tokens + 2
    assert all(mine <= its for mine, its in zip(shape, whole, strict=True))
    assert shape[1] >= min(2, whole[1])
    assert all(side % patch == 0 for side, patch in zip(shape[1:], spec.patch_size, strict=True))
    if sp == 1:
        assert shape == whole


def test_degrees_share_out_whole_heads() -> None:
    assert degrees(40, 8) == (1, 2, 4, 8)
    assert degrees(12, 8) == (1, 2, 4)
    assert degrees(5, 4) == (1,)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "deepspeed_stage_2", "deepspeed_stage_3"])
def test_every_engine_takes_a_shared_clip(strategy: Any) -> None:
    found = variant("tiny-i2v")
    model = build(Subject(found, LoraConfig(rank=8), TrainingConfig()))
    sizes = sizes_of(model, record_update(model, MemoryStrategy()))
    exchange = exchange_of(found.spec, BUCKET, 2, 5)
    composed = distribute(composed_of("tiny-i2v", {}, 5), ParallelConfig(strategy=strategy, sp=5), 10, sizes, exchange)
    labels = [each.label for each in composed.micro_batch if isinstance(each, Copy)]
    assert labels.count("all-to-all") == 3 * int(found.transformer_config["num_layers"])
    assert simulate((*composed.micro_batch, *composed.update), device("h100-sxm")).seconds > 0
