"""Two experts on two ranks: every engine trains both as one process does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from launched import launched
from longtake.config.dump import to_toml
from longtake.config.schema import RunConfig
from longtake.progress import Reporter
from longtake.training.metrics import FILE, read_metrics
from longtake.training.run import train
from runs import Scene, scene

SCRIPT = Path(__file__).with_name("resumed_run.py")
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"strategy": "ddp"},
    "sp": {"strategy": "ddp", "sp": 2},
    "fsdp2": {"strategy": "fsdp2"},
    "zero-1": {"strategy": "deepspeed_stage_1"},
    "zero-2": {"strategy": "deepspeed_stage_2"},
    "zero-3": {"strategy": "deepspeed_stage_3"},
}


def config_of(where: Scene, run: Path, parallel: dict[str, Any], method: str) -> RunConfig:
    """Six steps, of which the high-noise expert has two."""
    sections: dict[str, Any] = {"lora": None} if method == "full" else {}
    training = {"steps": 6, "global_batch_size": 2, "shift": 5.0, "ema": 0.5 if method == "lora" else 0.0}
    data = {"validation": 0.3}
    return where.config(run, training=training, parallel=parallel, data=data, output={"save_every": 6}, **sections)


@pytest.mark.long
def test_every_engine_trains_both_experts_as_one_process_does(tiny_root: Callable[[str], Path], tmp_path: Path) -> None:
    where = scene("tiny-t2v-a14b", tiny_root("tiny-t2v-a14b"), tmp_path / "scene", count=6)
    cases = [(name, "lora") for name in ENGINES] + [("fsdp2", "full"), ("zero-2", "full")]
    wholes = {method: config_of(where, tmp_path / f"one-{method}", {}, method) for method in ("lora", "full")}
    where.prepare(wholes["lora"])
    for config in wholes.values():
        train(config, False, Reporter(quiet=True))
    files = []
    for name, method in cases:
        folder = tmp_path / f"{name}-{method}"
        folder.mkdir()
        files.append(folder / "run.toml")
        files[-1].write_text(to_toml(config_of(where, folder / "run", ENGINES[name], method)))
    done = launched(2, SCRIPT, *(f"{path},0,0" for path in files))
    assert done.stdout.splitlines() == [f"{name}-{method}: done" for name, method in cases], done.stderr
    for name, method in cases:
        assert_alike(tmp_path / f"{name}-{method}" / "run", Path(wholes[method].output.run), f"{name} {method}")


def assert_alike(run: Path, whole: Path, label: str) -> None:
    """The same experts in the same order, losses and results that differ by rounding."""
    logs = [read_metrics(each / FILE) for each in (run, whole)]
    assert [line.get("expert") for line in logs[0]] == [line.get("expert") for line in logs[1]], label
    assert {"high", "low"} <= {line.get("expert") for line in logs[0]}
    for one, other in zip(*logs, strict=True):
        for key in one.keys() & {"loss", "validation_loss"}:
            assert one[key] == pytest.approx(other[key], rel=2e-6), (label, key)
    results = [*whole.glob("adapter-*.safetensors"), *whole.glob("transformer*/*.safetensors")]
    assert len(results) == 2, label
    for path in results:
        mine, its = load_file(run / path.relative_to(whole)), load_file(path)
        assert mine.keys() == its.keys(), label
        for key, tensor in its.items():
            assert float((mine[key] - tensor).abs().max()) <= 1e-5, (label, key)
