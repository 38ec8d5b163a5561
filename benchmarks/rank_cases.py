"""What `rank_bytes.py` measures, and what is planned for it: a model under each engine, and ranks that share a clip."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from accuracy_cases import Case

from longtake.config.schema import ParallelConfig
from longtake.planner.events import KINDS, Compute, Item
from longtake.planner.load import Load
from longtake.planner.meta_model import batch_tensors, build, meta_batch
from longtake.planner.rank_items import rounded
from longtake.planner.shards import zero_bucket
from longtake.planner.sizes import sizes_of
from longtake.planner.tracer import Tracer
from longtake.planner.update import record_update

KEEP = "block_keep_attention"
ACTIVATIONS = ("checkpoints", "block", "buffers", "workspace")


@dataclass(frozen=True)
class RankCase:
    """A step of `case` on one of `ranks` ranks under `parallel`; measured are its `activations`, or all else."""

    case: Case
    parallel: Mapping[str, Any] = field(default_factory=lambda: {"strategy": "single"})
    ranks: int = 2
    activations: bool = False

    @property
    def sharing(self) -> ParallelConfig:
        """`parallel`, checked."""
        return ParallelConfig.model_validate(self.parallel)


def planned(each: RankCase) -> dict[str, int]:
    """Bytes of a rank, by the names that `rank_bytes.py` measures."""
    case, parallel = each.case, each.sharing
    step = Tracer(case.subject).distributed(
        case.memory, Load(case.bucket, case.clips, False, parallel.sp), parallel, each.ranks
    )
    if each.activations:
        return {"activations": _most(step.micro_batch, ACTIVATIONS) - _batch_bytes(case)}
    kinds = dict(zip(KINDS, _first(step.update, "update").held, strict=True))
    found = {
        "parameters": kinds["weights"] + kinds["adapters"],
        "gradients": kinds["gradients"],
        "optimizer": kinds["optimizer"],
    }
    if parallel.strategy == "deepspeed_stage_3":
        model = build(case.subject)
        bucket = zero_bucket(sizes_of(model, record_update(model, case.memory)))
        buffers = _first(step.micro_batch, "forward 2").held[KINDS.index("buffers")]
        found["gathered"] = buffers - bucket
    return found


def _first(items: Iterable[Item], label: str) -> Compute:
    return next(item for item in items if isinstance(item, Compute) and item.label == label)


def _most(items: Iterable[Item], kinds: Iterable[str]) -> int:
    places = [KINDS.index(kind) for kind in kinds]
    return max(sum(item.held[place] for place in places) for item in items if isinstance(item, Compute))


def _batch_bytes(case: Case) -> int:
    return sum(
        rounded(tensor.nbytes) for tensor in batch_tensors(meta_batch(case.subject.spec, case.bucket, case.clips))
    )


_MODEL = Case("tiny-t2v", heads=8, blocks=4, bucket=(9, 96, 96))
"""20 million parameters; 108 tokens, as activations are not what is looked at."""
_METHODS = {"full": {"rank": 0}, "lora": {"rank": 4, "precision": "bf16"}}
_CLIP = Case("tiny-t2v", heads=2, blocks=2, bucket=(81, 256, 256))
"""5,376 tokens, ten times those of the text."""
_STRATEGIES: dict[str, dict[str, Any]] = {
    "block": {},
    "4 slices": {"slices": 4},
    "no checkpointing": {"gradient_checkpointing": "none"},
}


def _cases() -> dict[str, RankCase]:
    found = {
        f"{method}, {strategy}": RankCase(replace(_MODEL, **fields), {"strategy": strategy})
        for method, fields in _METHODS.items()
        for strategy in ("ddp", "fsdp2", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3")
    }
    for method, fields in _METHODS.items():
        for strategy, own in (("ddp", {}), ("fsdp2", {}), ("fsdp2", {"dp_replicate": 2})):
            name = f"{method}, {strategy}, {'2 x 2' if own else '4'} ranks"
            found[name] = RankCase(replace(_MODEL, **fields), {"strategy": strategy} | own, 4)
    for name, memory in _STRATEGIES.items():
        for sp in (1, 2):
            parallel = {"strategy": "ddp", "sp": sp} if sp > 1 else {"strategy": "single"}
            found[f"{name}, sp={sp}"] = RankCase(replace(_CLIP, strategy=memory), parallel, sp, activations=True)
    for name, fields, sp in (
        ("3 heads, sp=2", {"heads": 3}, 2),
        ("4 heads, sp=4", {"heads": 4}, 4),
        ("i2v, sp=2", {"tiny": "tiny-i2v"}, 2),
        ("ti2v, sp=2", {"tiny": "tiny-ti2v", "bucket": (41, 512, 512)}, 2),
        ("full, sp=2", {"rank": 0}, 2),
        ("attention kept, 16 slices, sp=2", {"strategy": {"slices": 16, "gradient_checkpointing": KEEP}}, 2),
    ):
        parallel = {"strategy": "ddp", "sp": sp}
        found[name] = RankCase(replace(_CLIP, **fields), parallel, sp, activations=True)
    return found


CASES = _cases()
