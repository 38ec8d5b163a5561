"""The steps that `plan_accuracy.py` plans and runs: small models of every task, under every kind of memory strategy."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from longtake.config.schema import LoraConfig, MemoryStrategy, TrainingConfig
from longtake.models.wan.variants import variant
from longtake.planner.meta_model import Subject
from longtake.planner.plans import Bucket

HEAD_DIM = 64


@dataclass(frozen=True)
class Case:
    """A model of `blocks` blocks of `heads` heads, a batch of `clips` clips, `micro_batches` of which make a step.

    `tiny` names the tiny variant whose task, channels and conditioning the model has; `rank` 0 trains all weights.
    """

    tiny: str
    heads: int
    blocks: int
    bucket: Bucket
    clips: int = 1
    micro_batches: int = 1
    rank: int = 8
    precision: Literal["bf16", "fp32"] = "fp32"
    strategy: Mapping[str, Any] = field(default_factory=dict)

    @property
    def memory(self) -> MemoryStrategy:
        """The strategy, checked."""
        return MemoryStrategy(**self.strategy)

    @property
    def subject(self) -> Subject:
        """What is planned, and what is run."""
        found, dim = variant(self.tiny), self.heads * HEAD_DIM
        wide: dict[str, Any] = {"num_attention_heads": self.heads, "attention_head_dim": HEAD_DIM, "ffn_dim": 4 * dim}
        wide |= {"num_layers": self.blocks}
        if found.transformer_config["added_kv_proj_dim"]:
            wide |= {"added_kv_proj_dim": dim}
        spec = replace(found.spec, heads=self.heads, head_dim=HEAD_DIM)
        training = TrainingConfig(
            precision=self.precision,
            micro_batch_size=self.clips,
            global_batch_size=self.clips * self.micro_batches,
        )
        return Subject(
            replace(found, spec=spec, transformer_config=found.transformer_config | wide),
            LoraConfig(rank=self.rank) if self.rank else None,
            training,
            dtype=self.precision,
            device_type="cpu",
        )

    @property
    def tokens(self) -> int:
        """Of a clip."""
        return self.subject.spec.tokens(*self.bucket)

    @property
    def warm_up(self) -> "Case":
        """A block of it: at the first call with operands of a shape libraries make code and buffers and keep them.

        Three where weights are streamed, which fewer blocks refuse.
        """
        if "block_swap" in self.strategy:
            return replace(self, blocks=3, micro_batches=1, strategy={**self.strategy, "block_swap": 3})
        return replace(self, blocks=1, micro_batches=1)


_T2V, _I2V, _TI2V = "tiny-t2v", "tiny-i2v", "tiny-ti2v"
_KEEP = {"gradient_checkpointing": "block_keep_attention"}
_NONE = {"gradient_checkpointing": "none"}
_DISK, _HOST = {"activation_offload": "disk"}, {"activation_offload": "host"}
_HALF: dict[str, Any] = {"activation_offload_fraction": 0.5}
_SLICED = {"slices": 4, "attention_head_groups": 2}
_LONG, _SHORT, _STILL = (17, 256, 256), (9, 192, 192), (1, 256, 256)
"""1,280, 432 and 256 tokens at stride 8."""
_TI_LONG = (17, 512, 512)
"""1,280 at stride 16."""


def _swap(blocks: int, place: str) -> dict[str, Any]:
    return {"block_swap": blocks, "block_swap_from": place}


def _cases() -> dict[str, Case]:
    full, bf16 = 0, "bf16"
    mixed: dict[str, Any] = {"precision": "bf16"}
    states8: dict[str, Any] = {"optimizer": "adamw8bit"}
    states_away: dict[str, Any] = {"optimizer_offload": True}
    return {
        "t2v, none": Case(_T2V, 4, 5, _LONG, 2, strategy=_NONE),
        "t2v, none, larger": Case(_T2V, 6, 6, _LONG, 4, strategy=_NONE),
        "t2v, none, short clips": Case(_T2V, 8, 4, _SHORT, 4, 2, strategy=_NONE),
        "t2v, block": Case(_T2V, 6, 4, _LONG, 4),
        "t2v, block, stills": Case(_T2V, 16, 5, _STILL, 1, 2),
        "t2v, every 2 blocks": Case(_T2V, 5, 6, _LONG, 3, strategy={"checkpoint_every": 2}),
        "t2v, attention kept": Case(_T2V, 6, 4, _LONG, 4, strategy=_KEEP),
        "t2v, inputs to disk": Case(_T2V, 6, 4, _LONG, 4, strategy=_DISK),
        "t2v, inputs to host": Case(_T2V, 6, 4, _LONG, 4, 2, strategy=_HOST),
        "t2v, attention kept, all to disk": Case(_T2V, 6, 5, _LONG, 4, strategy=_KEEP | _DISK),
        "t2v, attention kept, half to host": Case(_T2V, 6, 4, _LONG, 4, strategy=_KEEP | _HOST | _HALF),
        "t2v, inputs and weights on disk": Case(_T2V, 16, 5, _SHORT, 2, strategy=_DISK | _swap(5, "disk")),
        "t2v, weights on disk, some": Case(_T2V, 16, 6, _STILL, 2, strategy=_swap(4, "disk")),
        "t2v, slices": Case(_T2V, 12, 4, _LONG, 2, strategy=_SLICED),
        "i2v, none": Case(_I2V, 6, 4, _LONG, 3, strategy=_NONE),
        "i2v, block": Case(_I2V, 6, 4, _LONG, 4),
        "i2v, inputs and weights to host": Case(_I2V, 12, 5, _SHORT, 3, strategy=_HOST | _swap(4, "host")),
        "i2v, slices, all on disk": Case(_I2V, 16, 4, _SHORT, 3, strategy=_DISK | _SLICED | _swap(4, "disk")),
        "ti2v, block": Case(_TI2V, 6, 4, _TI_LONG, 4),
        "ti2v, attention kept, slices, disk": Case(_TI2V, 12, 4, _TI_LONG, 2, strategy=_SLICED | _KEEP | _DISK),
        "t2v full, block": Case(_T2V, 12, 6, _SHORT, 1, rank=full),
        "t2v full, none": Case(_T2V, 8, 5, _SHORT, 4, rank=full, strategy=_NONE),
        "t2v full, block, larger": Case(_T2V, 24, 6, _STILL, 1, rank=full),
        "t2v full, 8-bit states": Case(_T2V, 12, 5, _STILL, 1, 2, full, strategy=states8),
        "t2v full, states in host memory": Case(_T2V, 16, 5, _STILL, 2, rank=full, strategy=states_away),
        "i2v full, inputs to disk": Case(_I2V, 12, 5, _SHORT, 1, 2, full, strategy=_DISK),
        "ti2v full, slices": Case(_TI2V, 12, 5, (9, 384, 384), 2, rank=full, strategy=_SLICED),
        "t2v bf16, none": Case(_T2V, 6, 5, _LONG, 3, **mixed, strategy=_NONE),
        "t2v bf16, block": Case(_T2V, 10, 4, _LONG, 4, **mixed),
        "t2v bf16, block, 16 heads": Case(_T2V, 16, 4, _SHORT, 4, 2, **mixed),
        "t2v bf16, attention kept, disk": Case(_T2V, 10, 4, _LONG, 4, **mixed, strategy=_KEEP | _DISK),
        "i2v bf16, block": Case(_I2V, 9, 4, _LONG, 4, **mixed),
        "i2v bf16, slices, weights on disk": Case(_I2V, 16, 4, _LONG, 4, **mixed, strategy=_SLICED | _swap(4, "disk")),
        "ti2v bf16, inputs to host": Case(_TI2V, 8, 4, _TI_LONG, 4, **mixed, strategy=_HOST),
        "t2v bf16 full": Case(_T2V, 12, 6, _SHORT, 2, rank=full, precision=bf16),
        "i2v bf16 full, attention kept": Case(_I2V, 12, 5, _SHORT, 2, 2, full, bf16, _KEEP),
        "ti2v bf16 full, 8-bit states": Case(_TI2V, 12, 5, (9, 384, 384), 1, rank=full, **mixed, strategy=states8),
    }


CASES = _cases()
