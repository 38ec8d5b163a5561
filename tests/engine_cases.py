"""Short trainings that are the same whatever the engine and the ranks, and how far two of them end from each other.

Ranks run them (`distributed/engine_ranks.py`) and leave what came of each in a folder. Bounds hold for every engine: what
differs is the order of sums alone.
"""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file, save_file
from torch import Tensor

from longtake.config.schema import Precision, RunConfig

STEPS = 20
GLOBAL_BATCH = 4
BOUNDS = {"fp32": (2e-6, 1e-5), "bf16": (1e-3, 1e-3), "fp16": (1e-3, 1e-3)}
"""Greatest relative difference of a loss, and greatest difference of a trained value after the last step."""
SCRIPT = Path(__file__).parent / "distributed" / "engine_ranks.py"
PLAIN = {"gradient_checkpointing": "none"}
ENGINES: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "DDP": {"strategy": "ddp"},
        "FSDP2": {"strategy": "fsdp2"},
        "ZeRO-1": {"strategy": "deepspeed_stage_1"},
        "ZeRO-2": {"strategy": "deepspeed_stage_2"},
        "ZeRO-3": {"strategy": "deepspeed_stage_3"},
        "ZeRO-2, states in host memory": {"strategy": "deepspeed_stage_2", "offload": "optimizer"},
        "ZeRO-3, weights in host memory": {"strategy": "deepspeed_stage_3", "offload": "parameters"},
        "DDP, sp 2": {"strategy": "ddp", "sp": 2},
        "FSDP2, sp 2": {"strategy": "fsdp2", "sp": 2},
        "ZeRO-1, sp 2": {"strategy": "deepspeed_stage_1", "sp": 2},
        "ZeRO-2, sp 2": {"strategy": "deepspeed_stage_2", "sp": 2},
        "ZeRO-3, sp 2": {"strategy": "deepspeed_stage_3", "sp": 2},
    },
    4: {
        "DDP, sp 2": {"strategy": "ddp", "sp": 2},
        "FSDP2, sp 2": {"strategy": "fsdp2", "sp": 2},
        "FSDP2, 2 replicas": {"strategy": "fsdp2", "dp_replicate": 2},
        "FSDP2, 2 replicas, sp 2": {"strategy": "fsdp2", "dp_replicate": 2, "sp": 2},
        "ZeRO-2, sp 2": {"strategy": "deepspeed_stage_2", "sp": 2},
        "ZeRO-3, sp 2": {"strategy": "deepspeed_stage_3", "sp": 2},
    },
}
"""Ways to share the work by the number of ranks; each is a `[parallel]`."""


@dataclass(frozen=True)
class Case:
    """One training. `gradient_factor` above or below 1 is a mistake, planted: losses go backward times it."""

    parallel: dict[str, Any] = field(default_factory=lambda: {"strategy": "single"})
    lora: bool = True
    optimizer: Literal["sgd", "adamw"] = "sgd"
    precision: Precision = "fp32"
    clip_norm: float = 0.0
    memory: dict[str, Any] = field(default_factory=lambda: PLAIN)
    gradient_factor: float = 1.0

    @property
    def reference(self) -> "Case":
        """The same in one process, without a memory strategy or a mistake."""
        return replace(self, parallel={"strategy": "single"}, memory=PLAIN, gradient_factor=1.0)

    @property
    def key(self) -> str:
        """What tells it from others."""
        return json.dumps(asdict(self), sort_keys=True)

    def config(self) -> RunConfig:
        """A run's, with data and output that nobody reads."""
        sections: dict[str, Any] = {
            "model": {"name": "tiny-i2v", "dtype": self.precision},
            "lora": {"rank": 4, "alpha": 4.0, "targets": ["attention", "ffn", "image"]} if self.lora else None,
            "training": {
                "precision": self.precision,
                "global_batch_size": GLOBAL_BATCH,
                "steps": STEPS,
                "clip_norm": self.clip_norm,
                "weight_decay": 0.01,
            },
            "memory": self.memory,
            "parallel": self.parallel,
            "data": {"source": "none"},
            "output": {"run": "none"},
        }
        return RunConfig.model_validate(sections)


@dataclass(frozen=True)
class Outcome:
    """What came of a case: of each step the loss, the norm of the gradient and whether it was skipped, at the end the
    trained weights; `engine` is the class that was in force, over so many `ranks`."""

    losses: list[float]
    norms: list[float]
    skipped: list[bool]
    engine: str
    ranks: int
    seconds: float
    weights: dict[str, Tensor] = field(default_factory=dict)

    def write(self, folder: Path, case: Case) -> None:
        """Leaves it in `folder`."""
        path = _path(folder, case)
        save_file({name: weight.contiguous() for name, weight in self.weights.items()}, path)
        path.with_suffix(".json").write_text(json.dumps(asdict(replace(self, weights={}))))


def read(folder: Path, case: Case) -> Outcome:
    """What `write` left of `case`."""
    path = _path(folder, case)
    return Outcome(**json.loads(path.with_suffix(".json").read_text()) | {"weights": load_file(path)})


def _path(folder: Path, case: Case) -> Path:
    import hashlib
    return folder / f"{hashlib.sha256(case.key.encode()).hexdigest()[:16]}.safetensors"
