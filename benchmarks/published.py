"""What other trainers published of Wan 14B, beside what the planner says of the same steps: memory and seconds.

    python benchmarks/published.py

No GPU is needed. Each row has its conditions: those that were published, and those that are assumed. Where they cannot
be known, the row says why, and is held to nothing.

Steps are traced by `planner.direct`, which runs this trainer's own step; `Trainer` puts in what others do otherwise.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any
from unittest.mock import patch

from torch import nn

from longtake.config.schema import LoraConfig, MemoryStrategy, TrainingConfig
from longtake.models.wan.variants import variant
from longtake.planner import direct, meta_model, step
from longtake.planner.composition import Composed
from longtake.planner.events import Copy
from longtake.planner.hardware import DEVICES, GIB, GIGA, PCIE_5, POWER_LIMITED, TERA, Device
from longtake.planner.operators import operators_of
from longtake.planner.timeline import simulate
from longtake.training.precision import compute_in

MEMORY_BOUND, SECONDS_BOUND = 0.06, 0.20
"""How far a prediction may be from a published number whose conditions are known, as a share of it."""
T2V, I2V = "wan2.1-t2v-14b", "wan2.1-i2v-14b-480p"
ATTENTION, ALL = ("attention",), ("attention", "ffn")
FLASH_3 = replace(
    DEVICES["h100-sxm"],
    attention_efficiency=POWER_LIMITED * 648 * TERA / DEVICES["h100-sxm"].tensor_flops,
    attention_backward_efficiency=POWER_LIMITED * 561 * TERA / DEVICES["h100-sxm"].tensor_flops,
)
"""An H100 with FlashAttention-3, as fast as in https://arxiv.org/abs/2407.08608, figures 5 and 6."""
AS_THEY_COME = (
    "Assumed: peft and RMSNorm as they come, so adapters' inputs copied to fp32, and the norm elementwise in fp32; "
    "Bytes are tensors'"
)
STREAMED = (
    "T2V-14B, LoRA r16 on attention, batch 1, bf16, all block weights streamed from pinned memory, checkpointing; {}",
    "Assumed: 640x352x81, 18,480 tokens; the page says 832x480, but its clips were resized to an area of 480^2",
)
DIFFSYNTH = (
    "DiffSynth-Studio, {}-14B, LoRA, 832x480x81, one {}, checkpointing",
    "Assumed: its usual targets (q, k, v, o, ffn) at r32, AdamW, no encoder on the device",
)


@dataclass(frozen=True)
class Row:
    """A published number, the planner's, and what both are of; `known` if it is held to the bounds above."""

    name: str
    unit: str
    published: float
    predicted: float
    conditions: tuple[str, ...]
    known: bool = True

    @property
    def ratio(self) -> float:
        """Predicted over published."""
        return self.predicted / self.published


@dataclass(frozen=True)
class Trainer:
    """What a trainer does otherwise than this one.

    `peft_casts`: the input of each adapter is copied to the adapter's fp32, peft's default, and kept for the backward
    pass. `elementwise_norms`: RMSNorm as the model's authors wrote it, in fp32 operator by operator
    (https://github.com/Wan-Video/Wan2.1, wan/modules/model.py), not CUDA's one kernel.
    """

    peft_casts: bool = False
    elementwise_norms: bool = False


OURS, AS_IT_COMES = Trainer(), Trainer(peft_casts=True, elementwise_norms=True)


def rows() -> Iterator[Row]:
    """All published numbers, some thirty seconds of tracing."""
    yield from streamed()
    yield from diffsynth()
    yield from tokens()
    yield transfer()


def streamed() -> Iterator[Row]:
    """Steps of the T2V-14B with all block weights streamed from pinned memory."""
    lora, bucket = LoraConfig(rank=16, targets=ATTENTION), (81, 352, 640)
    single = traced(T2V, bucket, lora, AS_IT_COMES, block_swap=40)
    double = traced(T2V, bucket, lora, AS_IT_COMES, block_swap=40, checkpoint_every=2)
    block = max(item.nbytes for item in double.micro_batch if isinstance(item, Copy))
    fa3 = (STREAMED[0].format("FlashAttention-3"), STREAMED[1], AS_THEY_COME)
    fa2 = (STREAMED[0].format("FlashAttention-2"), *fa3[1:])
    pairs = (*fa3, "Segments of two blocks are streamed: a ring of two segments has a block more than this trainer's")
    yield Row("H100, streamed", "GiB", 16.28, single.peak_bytes / GIB, fa3)
    yield Row("H100, streamed", "s", 7.162, seconds(single, FLASH_3), (*fa3, "POWER_LIMITED is fitted to it"))
    yield Row("L40S, streamed", "GiB", 16.23, single.peak_bytes / GIB, fa2)
    yield Row("L40S, streamed", "s", 21.77, seconds(single, DEVICES["l40s"]), (*fa2, "The L40S's row is fitted to it"))
    yield Row("H100, streamed by two", "GiB", 19.62, (double.peak_bytes + block) / GIB, pairs)
    yield Row("H100, streamed by two", "s", 7.172, seconds(double, FLASH_3), pairs)
    ours = traced(T2V, bucket, lora, OURS, block_swap=40)
    same = (*fa3[:2], "For comparison: as this trainer does it, with FlashAttention-2 as torch has it")
    yield Row("H100, streamed, this trainer", "GiB", 16.28, ours.peak_bytes / GIB, same, known=False)
    yield Row("H100, streamed, this trainer", "s", 7.162, seconds(ours, DEVICES["h100-sxm"]), same, known=False)


def diffsynth() -> Iterator[Row]:
    """DiffSynth-Studio's README, and an issue there."""
    lora, bucket = LoraConfig(rank=32, targets=ALL), (81, 480, 832)
    plain = traced(T2V, bucket, lora, AS_IT_COMES)
    offloaded = traced(T2V, bucket, lora, AS_IT_COMES, activation_offload="host")
    image = traced(I2V, bucket, lora, AS_IT_COMES)
    t2v = (DIFFSYNTH[0].format("T2V", "A100"), DIFFSYNTH[1], AS_THEY_COME)
    yield Row("A100, checkpointing", "GB", 60, plain.peak_bytes / GIGA, t2v)
    saved = 100 * (1 - offloaded.peak_bytes / plain.peak_bytes)
    yield Row("A100, checkpoints offloaded: saved", "%", 25, saved, (*t2v, "Published as 20 to 30 %"))
    a800 = (
        DIFFSYNTH[0].format("I2V", "A800"),
        *t2v[1:],
        "https://github.com/modelscope/DiffSynth-Studio/issues/658: forward 9 s, backward two or three times that, and "
        "encoding for the rest of about 40 s, which is not predicted here",
    )
    yield Row("A800, checkpointing", "s", 40, seconds(image, DEVICES["a100-80gb"]), a800)


def tokens() -> Iterator[Row]:
    """What a token takes under plain checkpointing, from two lengths of clip."""
    lora = LoraConfig(rank=32, targets=ALL)
    short, long = (traced(T2V, (frames, 512, 512), lora, OURS) for frames in (21, 41))
    page = (
        "diffusion-pipe, T2V-14B, 12.2 GB at 512x512x21 and 15.7 at 41 frames, in tenths: "
        "https://github.com/tdrussell/diffusion-pipe/issues/153"
    )
    swapped = (page, 'Measured "with some block swapping": how many weights are resident is not told. Here all are')
    yield Row("14B, 21 frames", "GB", 12.2, short.peak_bytes / GIGA, swapped, known=False)
    yield Row("14B, 41 frames", "GB", 15.7, long.peak_bytes / GIGA, swapped, known=False)
    patched = (
        page,
        "Its model computes norms and modulation in bf16, from when on is not told; diffusers' does in fp32",
    )
    a_token = (long.peak_bytes - short.peak_bytes) / (11_264 - 6_144)
    yield Row("14B, a token more", "MB", 3500 / 5120, a_token / 1e6, patched, known=False)


def transfer() -> Row:
    """The weights of a 22B model over the bus of an H100."""
    why = (
        "A 22B model at 1280x720x121 on an H100, all weights streamed, 175 ms of transfer, a stall of about 5 %",
        "44 GB in 175 ms are four times what PCIe 5.0 x16 has in theory: either it is what was not hidden of a step of "
        "3.5 s, or the link is another; neither is told. Here: all weights once over the bus",
    )
    return Row("H100, 22B streamed: transfer", "s", 0.175, 22e9 * 2 / PCIE_5, why, known=False)


def traced(model: str, bucket: meta_model.Bucket, lora: LoraConfig, trainer: Trainer, **fields: Any) -> Composed:
    """A step of one clip under the strategy of these `fields`; `bucket` is (frames, height, width)."""
    built = _built(model, lora)
    with _in_the_way_of(trainer):
        return direct.trace(built, MemoryStrategy(**fields), meta_model.meta_batch(built.spec, bucket))


@cache
def _built(model: str, lora: LoraConfig) -> meta_model.MetaModel:
    return meta_model.build(meta_model.Subject(variant(model), lora, TrainingConfig(global_batch_size=1)))


def seconds(step_: Composed, device: Device) -> float:
    """Of the whole step."""
    return simulate((*step_.micro_batch, *step_.update), device).seconds


@contextmanager
def _in_the_way_of(trainer: Trainer) -> Iterator[None]:
    """Traces inside the context are of steps as `trainer` makes them."""

    @contextmanager
    def computing(transformer: nn.Module, *rest: Any) -> Iterator[None]:
        with compute_in(transformer, *rest):
            for module in transformer.modules():
                if trainer.peft_casts and hasattr(module, "cast_input_dtype_enabled"):
                    module.cast_input_dtype_enabled = True
            yield

    operators = partial(operators_of, fused_rms_norm=not trainer.elementwise_norms)
    with patch.object(step, "compute_in", computing), patch.object(direct, "operators_of", operators):
        yield


def table(found: Sequence[Row]) -> Iterator[str]:
    """The rows, and under them their conditions."""
    numbers: dict[str, int] = {}
    yield "| | | predicted | published | ratio | conditions |"
    yield "|---|---|--:|--:|--:|---|"
    for row in found:
        own = ", ".join(str(numbers.setdefault(condition, len(numbers) + 1)) for condition in row.conditions)
        known = own if row.known else f"{own}; not held to"
        yield f"| {row.name} | {row.unit} | {row.predicted:.4g} | {row.published:.4g} | {row.ratio:.2f} | {known} |"
    yield ""
    yield from (f"{number}. {condition}." for condition, number in numbers.items())


if __name__ == "__main__":
    print("\n".join(table([*rows()])))
