"""A run that goes from engine to engine and from one number of ranks to another ends as one that was never stopped."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from launched import launched
from longtake.config.dump import to_toml
from longtake.config.schema import RunConfig
from longtake.distributed.ranks import joined
from longtake.errors import RunError
from longtake.progress import Reporter
from longtake.training.checkpoint import checkpoint_path
from longtake.training.run import train
from runs import Recorder, Scene, Stopper, learnt, scene
from saved import GROUPS, read

STEPS = 6
SCRIPT = Path(__file__).with_name("resumed_run.py")
METHODS: dict[str, dict[str, Any]] = {"lora": {"training": {"ema": 0.5}}, "full": {"lora": None}}


def config_of(where: Scene, folder: Path, method: str, strategy: str = "auto") -> RunConfig:
    """Of a run with a schedule, clips held out, and a batch that four ranks share."""
    sections = METHODS[method]
    training = {"steps": STEPS, "global_batch_size": 4, "warmup_steps": 2, **sections.get("training", {})}
    changes = {**sections, "training": training, "parallel": {"strategy": strategy}, "data": {"validation": 0.3}}
    return where.config(folder / method / "run", **changes, output={"save_every": 2, "keep": 9})


def written(config: RunConfig) -> Path:
    path = Path(config.output.run).parent / f"{config.parallel.strategy}.toml"
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(to_toml(config))
    return path


@pytest.mark.long
def test_zero_3_on_two_ranks_then_one_process_then_fsdp2_on_four(
    tiny_root: Callable[[str], Path], tmp_path: Path
) -> None:
    where = scene("tiny-i2v", tiny_root("tiny-i2v"), tmp_path / "scene", count=7)
    for method in METHODS:
        where.prepare(config_of(where, tmp_path / "whole", method))
        train(config_of(where, tmp_path / "whole", method), False, Reporter(quiet=True))

    configs = [written(config_of(where, tmp_path / "chain", method, "deepspeed_stage_3")) for method in METHODS]
    first = launched(2, SCRIPT, *(f"{path},0,2" for path in configs))
    assert first.stdout.splitlines() == [f"{name}: {_stopped(tmp_path, name, 2)}" for name in METHODS], first.stderr
    for method in METHODS:
        with pytest.raises(RunError, match="stopped by SIGTERM after step 4"):
            train(config_of(where, tmp_path / "chain", method, "single"), True, Stopper(4))
    configs = [written(config_of(where, tmp_path / "chain", method, "fsdp2")) for method in METHODS]
    last = launched(4, SCRIPT, *(f"{path},1,0" for path in configs))
    assert last.stdout.splitlines() == [f"{name}: done" for name in METHODS], last.stderr

    for method in METHODS:
        assert_alike(*(tmp_path / which / method / "run" for which in ("chain", "whole")))
    assert_sharded(tmp_path / "chain" / "lora" / "run")


def _stopped(folder: Path, method: str, step: int) -> str:
    run = folder / "chain" / method / "run"
    return f"{run}: stopped by SIGTERM after step {step}, which is saved; continue with --resume [run-stopped]"


def assert_alike(chain: Path, whole: Path) -> None:
    """The same steps on the same samples at the same rates, and weights, states and results that differ by rounding."""
    logs = [learnt(run) for run in (chain, whole)]
    assert [line["step"] for line in logs[0]] == [line["step"] for line in logs[1]]
    for one, other in zip(*logs, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            assert one[key] == pytest.approx(other[key], rel=2e-6 if "loss" in key else 1e-5), key
        assert one.get("learning_rate") == other.get("learning_rate")
    ends = [read(checkpoint_path(run, STEPS)) for run in (chain, whole)]
    for group in GROUPS:
        assert_near(*(getattr(end, group) for end in ends))
    results = [run / "adapter.safetensors" for run in (chain, whole)]
    if results[0].exists():
        assert_near(*map(load_file, results))
    else:
        name = "transformer/diffusion_pytorch_model.safetensors"
        assert_near(*(load_file(run / name) for run in (chain, whole)))


def assert_near(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert float((tensor - other[name]).abs().max()) <= 1e-5, name


def assert_sharded(run: Path) -> None:
    """Each of several ranks wrote a file of its own; one process wrote one."""
    names = {step: {path.name for path in checkpoint_path(run, step).iterdir()} for step in (2, 4, 6)}
    assert {f"trained-{rank:05d}-of-00002.safetensors" for rank in (1, 2)} <= names[2]
    assert {"trained.safetensors", "optimizer.safetensors", "ema.safetensors"} <= names[4]
    assert {f"optimizer-{rank:05d}-of-00004.safetensors" for rank in (1, 2, 3, 4)} <= names[6]


def test_a_run_goes_on_under_another_engine_only_where_nothing_else_has_changed(
    tiny_root: Callable[[str], Path], tmp_path: Path
) -> None:
    where = scene("tiny-t2v", tiny_root("tiny-t2v"), tmp_path / "scene")
    config = config_of(where, tmp_path, "lora")
    where.prepare(config)
    with pytest.raises(RunError, match="after step 1"):
        train(config, False, Stopper(1))
    said = Recorder()
    other = config.model_copy(update={"parallel": config.parallel.model_copy(update={"strategy": "fsdp2"})})
    with joined() as ranks:
        train(other, True, said, ranks=ranks)
    assert said.having("resumed with another parallel.strategy: 'fsdp2' instead of 'auto'")
    assert said.having("resumed after step 1")
