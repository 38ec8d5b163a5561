"""Short trainings under an engine of several ranks, and how far each ends from the same training in one process.

`distributed/engine_ranks.py` runs them, on tiny-i2v's trained weights. Engines differ in the order of sums alone, so
one set of bounds holds for all. Plain SGD without clipping shows a gradient of the wrong size, which AdamW divides
away; AdamW shows states and decay that go astray. It makes much of what is small, too: a value whose gradient is hardly
more than its rounding error moves by up to the learning rate in a step, either way. So the rate is one that users have,
and warms up; adapters begin with both halves filled, so that no parameter is without a gradient.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from launched import launched
from longtake.config.schema import Precision, RunConfig

GLOBAL_BATCH = 4
RATES = {"sgd": 0.1, "adamw": 1e-4}
BOUNDS = {"fp32": (2e-6, 1e-5, 1e-5), "bf16": (1e-3, 1e-2, 1e-3), "fp16": (1e-3, 1e-2, 1e-3)}
"""Of the relative difference of a loss and of a gradient's norm, and of the difference of a weight."""
RANKS = Path(__file__).parent / "distributed" / "engine_ranks.py"
PLAIN = {"gradient_checkpointing": "none"}
ENGINES: dict[int, list[dict[str, Any]]] = {
    2: [
        *({"strategy": name} for name in ("ddp", "fsdp2", *(f"deepspeed_stage_{stage}" for stage in (1, 2, 3)))),
        {"strategy": "deepspeed_stage_2", "offload": "optimizer"},
        {"strategy": "deepspeed_stage_3", "offload": "parameters"},
        *({"strategy": name, "sp": 2} for name in ("ddp", "fsdp2", "deepspeed_stage_2", "deepspeed_stage_3")),
    ],
    4: [
        *({"strategy": name, "sp": 2} for name in ("ddp", "fsdp2", "deepspeed_stage_2", "deepspeed_stage_3")),
        {"strategy": "fsdp2", "dp_replicate": 2},
        {"strategy": "fsdp2", "dp_replicate": 2, "sp": 2},
    ],
}
"""Ways to share the work, each a `[parallel]`, by the number of ranks."""


@dataclass(frozen=True)
class Case:
    """One training under `parallel`, that of a config, and `memory`.

    `adapters` are further keys of [lora]; with some, B learns faster than A. A `gradient_factor` other than 1 is a
    mistake: losses go backward times it.
    """

    parallel: dict[str, Any] = field(default_factory=lambda: {"strategy": "single"})
    lora: bool = True
    optimizer: Literal["sgd", "adamw"] = "sgd"
    precision: Precision = "fp32"
    clip_norm: float = 0.0
    steps: int = 20
    memory: dict[str, Any] = field(default_factory=lambda: PLAIN)
    gradient_factor: float = 1.0
    adapters: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def reference(self) -> "Case":
        """The same in one process, without a memory strategy or a mistake."""
        return replace(self, parallel={"strategy": "single"}, memory=PLAIN, gradient_factor=1.0)

    @cached_property
    def file(self) -> str:
        """A name that no other case has."""
        return sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    @property
    def engine(self) -> str:
        """In words."""
        settings = [f"{key} = {value}" for key, value in self.parallel.items() if key != "strategy"]
        return ", ".join([self.parallel["strategy"], *settings])

    def __str__(self) -> str:
        told = [
            self.engine,
            "LoRA" if self.lora else "full",
            {"sgd": "SGD", "adamw": "AdamW"}[self.optimizer],
            self.precision,
            *(f"{key} = {value}" for key, value in self.memory.items() if value != "none"),
            *(f"{key} = {value}" for key, value in self.adapters.items()),
            *([f"gradients x {self.gradient_factor}"] if self.gradient_factor != 1 else []),
        ]
        return ", ".join(told)

    def config(self) -> RunConfig:
        """A run's, with data and output that nobody looks at."""
        lora = {"rank": 4, "alpha": 4.0, "targets": ["attention", "ffn", "image"], **self.adapters}
        sections: dict[str, Any] = {
            "model": {"name": "tiny-i2v", "dtype": self.precision},
            "lora": lora if self.lora else None,
            "training": {
                "steps": self.steps,
                "global_batch_size": GLOBAL_BATCH,
                "precision": self.precision,
                "learning_rate": RATES[self.optimizer],
                "schedule": "constant",
                "warmup_steps": 4,
                "weight_decay": 0.1,
                "clip_norm": self.clip_norm,
                "lora_plus_ratio": 4.0 if self.adapters else 1.0,
            },
            "memory": self.memory,
            "parallel": self.parallel,
            "data": {"source": "none"},
            "output": {"run": "none"},
        }
        return RunConfig.model_validate(sections)


@dataclass(frozen=True)
class Outcome:
    """What came of a case: loss, norm of the gradient and whether it was skipped of each step, and the weights then.

    `engine` and `module` are the classes that were in force, over so many `ranks`, which `held` so many trained values.
    """

    losses: list[float]
    norms: list[float]
    skipped: list[bool]
    engine: str
    module: str
    ranks: int
    held: list[int]
    weights: dict[str, Tensor] = field(default_factory=dict)

    def write(self, folder: Path, case: Case) -> None:
        """Leaves it in `folder`."""
        save_file(self.weights, folder / f"{case.file}.safetensors")
        (folder / f"{case.file}.json").write_text(json.dumps(asdict(replace(self, weights={}))))

    @classmethod
    def read(cls, folder: Path, case: Case) -> "Outcome":
        """What `write` left."""
        told = json.loads((folder / f"{case.file}.json").read_text())
        return cls(**told | {"weights": load_file(folder / f"{case.file}.safetensors")})


@dataclass(frozen=True)
class Compared:
    """The greatest differences of a case to its reference; `outcome` and `expected` are without weights."""

    case: Case
    outcome: Outcome
    expected: Outcome
    loss: float
    norm: float
    weight: float

    @property
    def agrees(self) -> bool:
        """Whether the same steps were skipped and all differences are within their bounds."""
        found = zip((self.loss, self.norm, self.weight), BOUNDS[self.case.precision], strict=True)
        return self.outcome.skipped == self.expected.skipped and all(value <= bound for value, bound in found)

    def __str__(self) -> str:
        return f"loss {self.loss:.1e}, norm {self.norm:.1e}, weight {self.weight:.1e}"


def matrix(ranks: int) -> list[Case]:
    """Every way to share the work among so many ranks with every way to train."""
    ways = product((True, False), ("sgd", "adamw"), ("fp32", "bf16"))
    return [Case(parallel, *way) for way in ways for parallel in ENGINES[ranks]]


def compared(ranks: int, cases: Sequence[Case], seconds: float) -> list[Compared]:
    """What comes of `cases` in one group of so many ranks, which may take so many seconds."""
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "cases.json").write_text(json.dumps([asdict(case) for case in cases]))
        ended = launched(ranks, RANKS, folder, seconds=seconds)
        assert ended.returncode == 0, ended.stderr[-8000:]
        return [_compared(case, folder) for case in cases]


def _compared(case: Case, folder: Path) -> Compared:
    found, expected = (Outcome.read(folder, each) for each in (case, case.reference))
    assert found.weights.keys() == expected.weights.keys()
    weight = torch.stack([(found.weights[name] - value).abs().max() for name, value in expected.weights.items()])
    updates = [step for step, skipped in enumerate(expected.skipped) if not skipped]
    loss, norm = (
        torch.tensor([[outcome[step] for step in updates] for outcome in pair], dtype=torch.float64)
        for pair in ((found.losses, expected.losses), (found.norms, expected.norms))
    )
    plain = [replace(outcome, weights={}) for outcome in (found, expected)]
    return Compared(case, *plain, _relative(*loss), _relative(*norm), float(weight.max()))


def _relative(found: Tensor, expected: Tensor) -> float:
    """nan, which is within no bound, where one of them is."""
    return float(((found - expected) / expected).abs().max())
