"""Two experts in one run: whose turn a step is, and that each learns as it would alone."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from longtake.config.schema import TrainingConfig
from longtake.errors import ModelError
from longtake.lora import read_adapter
from longtake.training.checkpoint import checkpoint_path, load_checkpoint
from longtake.training.experts import expert_of_step, share_of, turns_in_words
from longtake.training.flow_matching import draw
from longtake.training.metrics import FILE, read_metrics
from longtake.training.model import Expert
from longtake.training.results import adapters_of
from runs import Recorder, Scene, Stopper, learnt

Scenes = Callable[[str], Scene]
BOTH = (Expert("transformer", (0.875, 1.0), "high"), Expert("transformer_2", (0.0, 0.875), "low"))
FILES = ("adapter-high-noise.safetensors", "adapter-low-noise.safetensors")


@pytest.mark.parametrize("sigmas", ["uniform", "logit_normal"])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_each_expert_has_its_share_of_the_steps_after_any_number_of_them(sigmas: str, shift: float) -> None:
    training = TrainingConfig.model_validate({"sigmas": sigmas, "shift": shift})
    drawn = [draw(f"{index}", (1,), training, 0.0, (0.0, 1.0)).sigma for index in range(4000)]
    share = sum(sigma > 0.875 for sigma in drawn) / len(drawn)
    assert share_of(BOTH[0], training) == pytest.approx(share, abs=4 * math.sqrt(0.25 / 4000))
    assert sum(share_of(expert, training) for expert in BOTH) == pytest.approx(1)
    high = 0
    for step in range(1000):
        high += expert_of_step(step, BOTH, training) == 0
        assert abs(high - (step + 1) * share_of(BOTH[0], training)) <= 1 + 1e-6


def test_one_transformer_has_every_step() -> None:
    assert {expert_of_step(step, BOTH[:1], TrainingConfig()) for step in range(50)} == {0}


def config_of(scene: Scene, run: Path, **sections: Any) -> Any:
    """Eight steps, of which the high-noise expert has three."""
    training = {"steps": 8, "shift": 5.0, "ema": 0.5, **sections.pop("training", {})}
    output = {"save_every": 2, "keep": 9, **sections.pop("output", {})}
    return scene.config(run, training=training, output=output, **sections)


@pytest.mark.parametrize("name", ["tiny-t2v-a14b", "tiny-i2v-a14b"])
def test_a_run_trains_both_and_leaves_an_adapter_of_each(scenes: Scenes, tmp_path: Path, name: str) -> None:
    scene = scenes(name)
    run = scene.train(config_of(scene, tmp_path / "run", data={"validation": 0.25}))
    assert {path.name for path in run.glob("adapter*")} == {*FILES}
    for file, noise in zip(FILES, ("high", "low"), strict=True):
        adapter = read_adapter(run / file)
        assert adapter.metadata["longtake.expert"] == noise
        assert any(tensor.any() for key, tensor in adapter.state.items() if ".lora_B." in key)
    lines = [line for line in read_metrics(run / FILE) if "loss" in line]
    boundary = scene.spec.boundary_ratio
    experts = (Expert("transformer", (boundary, 1.0), "high"), Expert("transformer_2", (0.0, boundary), "low"))
    training = TrainingConfig(shift=5.0)
    assert [line["expert"] for line in lines] == [experts[expert_of_step(s, experts, training)].noise for s in range(8)]
    assert {line["expert"] for line in lines} == {"high", "low"}


def test_a_step_of_one_expert_leaves_the_other_alone(scenes: Scenes, tmp_path: Path) -> None:
    scene = scenes("tiny-t2v-a14b")
    run = scene.train(config_of(scene, tmp_path / "run", output={"save_every": 1, "keep": 9}))
    lines = [line for line in read_metrics(run / FILE) if "loss" in line]
    states = [load_checkpoint(checkpoint_path(run, step)) for step in range(1, 9)]
    for line, before, after in zip(lines[1:], states, states[1:], strict=False):
        changed = {"high": "transformer:", "low": "transformer_2:"}
        for noise, prefix in changed.items():
            for group in ("trained", "optimizer", "ema"):
                old, new = (each.of(group, prefix) for each in (before, after))
                same = all(torch.equal(old.whole(tensor), new.whole(tensor)) for tensor in old.names())
                assert old.names()
                assert same == (noise != line["expert"])


def test_an_expert_learns_as_in_a_run_of_its_own(scenes: Scenes, tmp_path: Path) -> None:
    """Its steps are those of a run of it alone that sees the same clips: here one clip, at a constant rate."""
    scene = scenes("tiny-t2v-a14b")
    training = {"schedule": "constant", "global_batch_size": 1}
    data = {"validation": 0.0, "caption_dropout": 0.0}
    both = scene.train(config_of(scene, tmp_path / "both", training=training, data=data))
    low = scene.train(config_of(scene, tmp_path / "low", training=training, data=data, model={"expert": "low"}))
    steps = [line for line in read_metrics(both / FILE) if line.get("expert") == "low"]
    alone = {line["step"]: line for line in read_metrics(low / FILE) if "loss" in line}
    assert steps[0]["loss"] == alone[steps[0]["step"]]["loss"], "the first low step starts from the same adapter"
    assert set(load_file(both / FILES[1])) == set(load_file(low / "adapter.safetensors"))


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(scenes: Scenes, tmp_path: Path) -> None:
    scene = scenes("tiny-i2v-a14b")
    whole = scene.train(config_of(scene, tmp_path / "whole"))
    config = config_of(scene, tmp_path / "stopped")
    with pytest.raises(Exception, match="after step 3"):
        scene.train(config, reporter=Stopper(3))
    stopped = scene.train(config, resume=True, reporter=Recorder())
    assert learnt(whole) == learnt(stopped)
    for file in FILES:
        assert (whole / file).read_bytes() == (stopped / file).read_bytes()
    for name in ("trained", "optimizer", "ema"):
        parts = [checkpoint_path(run, 8) / f"{name}.safetensors" for run in (whole, stopped)]
        assert parts[0].read_bytes() == parts[1].read_bytes()


@pytest.mark.parametrize(
    "memory",
    [
        {"block_swap": 3},
        {"block_swap": 3, "block_swap_from": "disk", "activation_offload": "disk"},
        {"block_swap_from": "disk", "activation_offload": "host"},
        {"gradient_checkpointing": "none"},
    ],
)
def test_where_the_idle_weights_wait_changes_no_value(scenes: Scenes, tmp_path: Path, memory: dict[str, Any]) -> None:
    scene = scenes("tiny-t2v-a14b")
    plain = scene.train(config_of(scene, tmp_path / "plain"))
    moved = scene.train(config_of(scene, tmp_path / "moved", memory=memory))
    for file in FILES:
        assert (plain / file).read_bytes() == (moved / file).read_bytes()
    assert learnt(plain) == learnt(moved)


def test_all_weights_of_both_can_be_trained(scenes: Scenes, tmp_path: Path) -> None:
    scene = scenes("tiny-t2v-a14b")
    run = scene.train(config_of(scene, tmp_path / "run", lora=None))
    for component in ("transformer", "transformer_2"):
        before, after = (
            load_file(root / component / "diffusion_pytorch_model.safetensors") for root in (scene.root, run)
        )
        assert before.keys() == after.keys()
        assert not torch.equal(before["proj_out.weight"], after["proj_out.weight"])


def test_samples_while_training_use_both(scenes: Scenes, tmp_path: Path) -> None:
    scene = scenes("tiny-t2v-a14b")
    validation = {"samples": [{"prompt": "a wall"}], "sample_steps": 4, "every": 8}
    run = scene.train(config_of(scene, tmp_path / "run", validation=validation))
    assert [path.name for path in sorted((run / "samples").glob("*.mp4"))] == [
        "step-00000000-0.mp4",
        "step-00000008-0.mp4",
    ]


def test_a_lora_is_for_the_expert_that_its_metadata_or_its_name_says(scenes: Scenes, tmp_path: Path) -> None:
    scene = scenes("tiny-t2v-a14b")
    run = scene.train(config_of(scene, tmp_path / "run", training={"steps": 4}))
    said: list[str] = []
    found = adapters_of([run / FILES[1], run / FILES[0]], scene.spec, said.append)
    assert said == []
    assert [*found] == ["transformer_2", "transformer"]
    plain = {noise: tmp_path / f"mine_{noise}_v2.safetensors" for noise in ("high", "low", "highlow", "other")}
    for path in plain.values():
        save_file(load_file(run / FILES[0]), path)
    assert [*adapters_of([plain["low"], plain["high"]], scene.spec, said.append)] == ["transformer_2", "transformer"]
    for noise in ("highlow", "other"):
        with pytest.raises(ModelError, match='put "high" or "low" into its name'):
            adapters_of([plain[noise]], scene.spec, said.append)
    with pytest.raises(ModelError, match="there is a LoRA for transformer already"):
        adapters_of([plain["high"], run / FILES[0]], scene.spec, said.append)


def test_a_run_says_how_many_steps_each_expert_has(scenes: Scenes, tmp_path: Path) -> None:
    short, long = (TrainingConfig(steps=steps, warmup_steps=0, shift=3.0) for steps in (4, 100))
    told = "4 steps: 0 of the high-noise one, 4 of the low-noise one; the high-noise one stays as it is"
    assert turns_in_words(BOTH, short) == f"{told}, and would have its first step in a run of 6"
    assert turns_in_words(BOTH, long) == "100 steps: 19 of the high-noise one, 81 of the low-noise one"
    scene, said = scenes("tiny-t2v-a14b"), Recorder()
    scene.train(config_of(scene, tmp_path / "run"), reporter=said)
    assert said.having("experts: 8 steps: ")
