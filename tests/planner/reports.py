"""Reports made by hand, with roughly simulated steps: a 14B LoRA on a GPU, one where nothing fits, a hostile one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from longtake.config.schema import MemoryStrategy, ParallelConfig
from longtake.planner.events import Counts, Span, Timeline
from longtake.planner.plans import Advice, BucketNeeds, Plan, Report, StagePeak
from longtake.planner.words import PARTS

GIB = 2**30
BUCKET = (129, 480, 832)
SINGLE = ParallelConfig(strategy="single")
HOSTILE = "<script>alert('x')</script> & \"quotes\" </style> [red]\x1b[31m"


@dataclass
class Drawn:
    """A step of `blocks` blocks, forward and then backward, each in `parts` pieces; all sizes in GiB, times in seconds.

    A block that is not resident waits for its weights, which are copied one block ahead of their use.
    """

    resident: float
    kept: float
    recomputed: float
    ring: float
    forward: float = 0.21
    backward: float = 0.54
    weights_in: float = 0.032
    kept_out: float = 0.041
    blocks: int = 40
    parts: int = 3
    now: float = 0.0
    waited: float = 0.0
    inward: float = 0.0
    begun: float = 0.0
    spans: list[Span] = field(default_factory=list)
    memory: list[tuple[float, Counts]] = field(default_factory=list)

    def timeline(self, bound_by: str) -> Timeline:
        self._compute("embeddings", 0.12, 0, 0.4, 0.0)
        for block in range(self.blocks):
            self._weights(block)
            self._block(block, "forward", self.forward, block * self.kept, 0.6 * self.recomputed, 0.0)
            if self.kept_out:
                self.spans.append(Span("outward", self.now, self.now + self.kept_out, f"block {block} kept"))
        self._compute("loss", 0.05, self.blocks * self.kept, 0.8, 0.0)
        for block in reversed(range(self.blocks)):
            gradients = 0.54 * (1 - block / self.blocks)
            self._weights(block)
            self._block(block, "backward", self.backward, block * self.kept, self.recomputed, gradients)
        self._compute("update", 0.1, 0, 0.0, 0.54)
        return Timeline(self.now, self.waited, bound_by, tuple(self.spans), tuple(self.memory))

    def _weights(self, block: int) -> None:
        """The copy of a block's weights began when the block before it did."""
        if not self.weights_in:
            return
        start = max(self.inward, self.begun)
        self.inward = start + self.weights_in
        self.spans.append(Span("inward", start, self.inward, f"block {block} weights"))
        if self.inward > self.now:
            self.spans.append(Span("stall", self.now, self.inward, f"waits for block {block} weights"))
            self.waited += self.inward - self.now
            self.now = self.inward

    def _block(self, block: int, name: str, seconds: float, kept: float, most: float, gradients: float) -> None:
        self.begun = self.now
        for part in range(self.parts):
            share = (0.55, 1.0, 0.8)[part % 3]
            label = f"block {block} {name} {part + 1}/{self.parts}"
            self._compute(label, seconds / self.parts, kept, share * most, gradients, workspace=share == 1.0)

    def _compute(
        self, label: str, seconds: float, kept: float, block: float, gradients: float, workspace: bool = False
    ) -> None:
        held = (self.resident, 0.57, gradients, 1.14, kept, block, self.ring, 0.5 if workspace else 0.0)
        self.memory.append((self.now, tuple(int(gib * GIB) for gib in held)))
        self.spans.append(Span("compute", self.now, self.now + seconds, label))
        self.now += seconds


def plan(name: str, strategy: MemoryStrategy, drawn: Drawn, host: float, disk: float = 0.0, **changes: object) -> Plan:
    """What a drawn step needs; 24 GiB are there. `changes` are the plan's fields."""
    timeline = drawn.timeline(str(changes.get("bound_by", "compute")))
    peak = max((counts for _, counts in timeline.memory), key=sum)
    breakdown = dict(zip(PARTS, (*peak, int(0.61 * GIB), int(0.53 * GIB)), strict=True))
    device = sum(breakdown.values())
    made = Plan(
        name=name,
        strategy=strategy,
        parallel=SINGLE,
        micro_batch_size=1,
        fits=device <= 24 * GIB,
        stage="train",
        bucket=BUCKET,
        peak_bytes={"device": device, "host": int(host * GIB), "disk": int(disk * GIB)},
        allocated_bytes=sum(peak),
        step_seconds=timeline.seconds,
        stalled_seconds=timeline.stalled_seconds,
        bound_by=timeline.bound_by,
        breakdown_bytes=breakdown,
        stages=tuple(stages(device)),
        buckets=tuple(buckets(device, timeline.seconds)),
        timeline=timeline,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def stages(device_bytes: int) -> Iterator[StagePeak]:
    yield StagePeak("prepare", "UMT5 text encoder, 512 tokens", int(0.51 * device_bytes), int(1.2 * GIB))
    yield StagePeak("validation", "loss of held-out clips", int(0.43 * device_bytes))
    yield StagePeak("sampling", "30 steps at 129 frames, VAE decode", int(0.69 * device_bytes), int(30.6 * GIB))
    yield StagePeak("save", "adapter and AdamW's states", int(0.2 * device_bytes), int(1.7 * GIB))


def buckets(device_bytes: int, seconds: float) -> Iterator[BucketNeeds]:
    for frames, share in ((17, 0.09), (49, 0.3), (81, 0.53), (129, 1.0)):
        yield BucketNeeds((frames, 480, 832), int((0.3 + 0.7 * share) * device_bytes), share * seconds)


STREAMED = MemoryStrategy(
    gradient_checkpointing="block_keep_attention",
    activation_offload="host",
    block_swap=26,
    slices=16,
    attention_head_groups=4,
)
RECOMPUTING = STREAMED.model_copy(update={"gradient_checkpointing": "block"})
FRUGAL = RECOMPUTING.model_copy(update={"block_swap": 40, "optimizer_offload": True})
ON_DISK = FRUGAL.model_copy(update={"activation_offload": "disk", "block_swap_from": "disk"})


def chosen_plan() -> Plan:
    name = "attention kept and offloaded, 26 of 40 blocks streamed, 16 slices"
    return plan(name, STREAMED, Drawn(11.2, 0.0, 3.6, 3.5), 58.9)


def realistic_report() -> Report:
    """I2V-14B-480P, LoRA, 129 frames of 832x480, 24 GiB of an H100: four plans that fit, one that does not."""
    plans = (
        chosen_plan(),
        plan("26 of 40 blocks streamed, 16 slices", RECOMPUTING, Drawn(11.2, 0.0, 4.4, 2.5, backward=0.63), 39.4),
        plan(
            "all blocks streamed, 16 slices, AdamW in host memory",
            FRUGAL,
            Drawn(0.5, 0.0, 4.4, 2.5, backward=0.64, weights_in=0.2, kept_out=0.1),
            50.9,
        ),
        plan(
            "all blocks streamed from the disk, inputs on the disk, 16 slices",
            ON_DISK,
            Drawn(0.5, 0.0, 4.4, 2.5, backward=0.64, weights_in=0.46, kept_out=0.24),
            3.1,
            50.9,
            bound_by="disk",
        ),
        plan(
            "checkpointing by block",
            MemoryStrategy(),
            Drawn(30.6, 0.49, 17.1, 0.0, backward=0.62, weights_in=0.0, kept_out=0.0),
            0.0,
        ),
    )
    resident = replace(plans[4], name="plain checkpointing, encoders resident", timeline=None)
    resident = replace(resident, peak_bytes={"device": int(84.2 * GIB), "host": 0, "disk": 0})
    return Report(
        model="wan2.1-i2v-14b-480p",
        task="i2v",
        method="lora",
        tokens=51_480,
        bucket=BUCKET,
        budget_bytes=24 * GIB,
        host_budget_bytes=96 * GIB,
        disk_budget_bytes=200 * GIB,
        gpu="h100-sxm",
        gpus=1,
        chosen=0,
        plans=plans,
        references=(resident,),
        notes=("times are computed for an H100 SXM at 58 % of its bf16 rate, not measured",),
        command="longtake train planned.toml",
        seconds=3.4,
    )


def nothing_fits_report() -> Report:
    """The same with 8 GiB: the nearest plan, and what would make it fit."""
    report = realistic_report()
    plans = [replace(each, fits=False) for each in report.plans[2:]]
    advice = (
        Advice("num_frames = 81", int(7.7 * GIB), 18.9),
        Advice("size = [640, 368]", int(7.1 * GIB), 17.2),
        Advice('quantization = "nf4"', int(7.9 * GIB), 36.0),
        Advice("gpus = 2", int(6.8 * GIB), 19.4),
    )
    return replace(report, budget_bytes=8 * GIB, chosen=None, plans=tuple(plans), advice=advice, command="")


def hostile_report(text: str = HOSTILE) -> Report:
    """`text` in every place that has one: it would be markup, or commands to a terminal."""
    report = realistic_report()
    plans = tuple(_named(each, text) for each in report.plans)
    texts = {"model": text, "task": text, "gpu": text, "command": f"longtake train '{text}'"}
    return replace(report, plans=plans, references=plans[:1], notes=(text,), advice=(Advice(text, GIB, 1.0),), **texts)


def _named(each: Plan, text: str) -> Plan:
    timeline, stage = each.timeline, StagePeak("prepare", text, GIB)
    if timeline is not None:
        timeline = replace(timeline, spans=tuple(replace(span, label=text) for span in timeline.spans))
    return replace(each, name=text, bound_by=text, why_not=text, timeline=timeline, stages=(stage,))
