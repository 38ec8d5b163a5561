"""Whole runs of DoRA, rsLoRA, ranks of single blocks and LoRA+: moved, stopped, and begun from a file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longtake.config.schema import MemoryStrategy, RunConfig
from longtake.errors import ConfigError, RunError
from longtake.lora import read_adapter
from longtake.training.metrics import FILE, read_metrics
from longtake.training.outputs import ADAPTER
from runs import Scene, Stopper, assert_same_run, learnt

Scenes = Callable[[str], Scene]
ADAPTERS: dict[str, Any] = {"dora": True, "rslora": True, "block_ranks": [[1, 2, 3]], "targets": ["attention", "ffn"]}
TRAINING: dict[str, Any] = {"steps": 4, "learning_rate": 1e-3, "lora_plus_ratio": 8.0, "ema": 0.5}
MOVED = MemoryStrategy(activation_offload="disk", block_swap=4, block_swap_from="disk", optimizer_offload=True)


def config(scene: Scene, run: Path, **sections: dict[str, Any]) -> RunConfig:
    sections = {"lora": ADAPTERS, "training": TRAINING, **sections}
    return scene.config(run, **sections)


def test_weights_that_are_moved_give_the_adapter_of_the_plain_run_to_the_bit(scenes: Scenes, tmp_path: Path) -> None:
    scene = scenes("tiny-i2v")
    plain = {"gradient_checkpointing": "none"}
    moved = MOVED.model_dump(exclude_defaults=True)
    one, other = (
        scene.train(config(scene, tmp_path / name, memory=memory))
        for name, memory in (("plain", plain), ("moved", moved))
    )
    assert (one / ADAPTER).read_bytes() == (other / ADAPTER).read_bytes()
    assert learnt(one) == learnt(other)
    lengths = [value for key, value in read_adapter(one / ADAPTER).state.items() if "magnitude" in key]
    assert len(lengths) == 40


def test_a_dora_trains_on_quantised_weights_from_what_they_compute(scenes: Scenes, tmp_path: Path) -> None:
    scene = scenes("tiny-i2v")
    shared = {"model": {"dtype": "bf16"}, "memory": {"quantization": "int8", "block_swap": 4}}
    training = TRAINING | {"precision": "bf16", "steps": 2}
    dora, plain = (
        scene.train(config(scene, tmp_path / name, lora=lora, training=training, **shared))
        for name, lora in (("dora", ADAPTERS), ("plain", ADAPTERS | {"dora": False}))
    )
    losses = [[line["loss"] for line in read_metrics(run / FILE) if "loss" in line] for run in (dora, plain)]
    assert losses[0][0] == losses[1][0]
    assert losses[0][1:] != losses[1][1:]


def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(scenes: Scenes, tmp_path: Path) -> None:
    scene = scenes("tiny-i2v")
    whole = scene.train(config(scene, tmp_path / "whole"))
    with pytest.raises(RunError, match="after step 2"):
        scene.train(config(scene, tmp_path / "halves"), reporter=Stopper(2))
    halves = scene.train(config(scene, tmp_path / "halves"), resume=True)
    assert_same_run(whole, halves, 4)


def test_the_learning_rate_in_the_log_is_that_of_a(scenes: Scenes, tmp_path: Path) -> None:
    scene = scenes("tiny-t2v")
    run = scene.train(config(scene, tmp_path / "run", training=TRAINING | {"schedule": "constant"}))
    assert {line["learning_rate"] for line in read_metrics(run / FILE) if "loss" in line} == {1e-3}


def validations(run: Path) -> list[float]:
    return [line["validation_loss"] for line in read_metrics(run / FILE) if "validation_loss" in line]


@pytest.mark.parametrize("adapters", [ADAPTERS, {"rank": 3}], ids=["dora", "lora"])
@pytest.mark.parametrize("memory", [{}, {"block_swap": 4, "block_swap_from": "disk"}], ids=["resident", "disk"])
def test_a_run_goes_on_from_the_file_of_another(
    scenes: Scenes, tmp_path: Path, adapters: dict[str, Any], memory: dict[str, Any]
) -> None:
    scene = scenes("tiny-i2v")
    shared: dict[str, Any] = {"data": {"validation": 0.5}, "memory": memory}
    training = TRAINING | {"ema": 0.0}
    first = scene.train(config(scene, tmp_path / "first", lora=adapters, training=training, **shared))
    again = adapters | {"start_from": [str(first / ADAPTER)]}
    second = scene.train(config(scene, tmp_path / "second", lora=again, training=training, **shared))
    assert validations(second)[0] == pytest.approx(validations(first)[-1], rel=1e-6)
    assert validations(second)[0] != validations(first)[0]


def test_a_file_that_does_not_fit_ends_the_run_before_anything_is_written(scenes: Scenes, tmp_path: Path) -> None:
    scene = scenes("tiny-i2v")
    first = scene.train(config(scene, tmp_path / "first"))
    lora = {"rank": 1, "start_from": [str(first / ADAPTER)]}
    with pytest.raises(ConfigError, match=r"is a DoRA; set lora\.dora = true"):
        scene.train(config(scene, tmp_path / "second", lora=lora))
    assert not (tmp_path / "second" / "config.toml").exists()
