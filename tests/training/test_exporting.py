"""What one takes from a run for other programs: adapters in each format and rank, full weights in one file or many."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file
from torch import Tensor

from longtake.errors import ConfigError, RunError
from longtake.lora import merge, read_adapter
from longtake.models.wan.keys import to_original
from longtake.models.wan.variants import variant
from longtake.models.wan.weights import ModelFiles, load_transformer
from longtake.training.card import FILE, MADE
from longtake.training.checkpoint import checkpoint_path
from longtake.training.exporting import ExportWish, export
from runs import CPU, Recorder, Scene, Stopper
from saved import read

Scenes = Callable[[str], Scene]
LAYER = "blocks.0.attn1.to_q"
ADAPTERS = {
    "plain": {},
    "dora": {"dora": True, "rslora": True, "block_ranks": [[1, 2, 3]]},
}


@pytest.fixture(scope="module")
def finished(scenes: Scenes, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A run of each kind of adapter, to be read only."""
    scene, folder = scenes("tiny-i2v"), tmp_path_factory.mktemp("runs")
    found: dict[str, Path] = {}

    def of(kind: str) -> Path:
        if kind not in found:
            training = {"learning_rate": 0.01, "lora_plus_ratio": 2.0}
            found[kind] = scene.train(scene.config(folder / kind, lora=ADAPTERS[kind], training=training))
        return found[kind]

    return of


def wish(form: str, out: Path, **more: Any) -> ExportWish:
    return ExportWish(form, out, **more)  # type: ignore[arg-type]


def state_of(path: Path) -> dict[str, Tensor]:
    """Of the transformer of tiny-i2v at `path`, in either layout."""
    files = ModelFiles(variant("tiny-i2v"), {"transformer": path}, None)
    return load_transformer(files, "transformer", torch.float32, CPU).state_dict()


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("form", ["comfyui", "diffusers", "kohya"])
def test_the_adapter_comes_out_in_each_format(
    finished: Callable[[str], Path], tmp_path: Path, form: str, kind: str
) -> None:
    out = tmp_path / "adapter.safetensors"
    assert export(finished(kind), wish(form, out), Recorder()) == [out]
    exported, own = read_adapter(out), read_adapter(finished(kind) / "adapter.safetensors")
    assert exported.scales == pytest.approx(own.scales)
    assert exported.is_dora == (kind == "dora")
    assert exported.state.keys() == own.state.keys()
    assert all(torch.equal(tensor, own.state[name]) for name, tensor in exported.state.items())
    assert exported.metadata["longtake.model"] == "tiny-i2v"


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("form", ["comfyui", "diffusers"])
def test_merged_weights_have_the_adapter_in_them(
    finished: Callable[[str], Path], scenes: Scenes, tmp_path: Path, form: str, kind: str
) -> None:
    out = tmp_path / ("merged" if form == "diffusers" else "merged.safetensors")
    export(finished(kind), wish(form, out, merged=True), Recorder())
    base = scenes("tiny-i2v").root / "transformer"
    files = ModelFiles(variant("tiny-i2v"), {"transformer": base}, None)
    expected = load_transformer(files, "transformer", torch.float32, CPU)
    merge(expected, read_adapter(finished(kind) / "adapter.safetensors"))
    found = state_of(out)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.state_dict().items())
    assert not torch.equal(found[f"{LAYER}.weight"], state_of(base)[f"{LAYER}.weight"])


def test_merged_weights_have_the_type_that_the_run_computed_from(scenes: Scenes, tmp_path: Path) -> None:
    scene = scenes("tiny-t2v")
    types = {"model": {"dtype": "bf16"}, "training": {"precision": "bf16", "steps": 1}}
    run = scene.train(scene.config(tmp_path / "run", **types))
    export(run, wish("comfyui", tmp_path / "m.safetensors", merged=True), Recorder())
    export(run, wish("diffusers", tmp_path / "m", merged=True), Recorder())
    single = load_file(tmp_path / "m.safetensors")
    component = WanTransformer3DModel.from_pretrained(tmp_path / "m").state_dict()
    assert single["blocks.0.self_attn.q.weight"].dtype == torch.bfloat16
    assert single["blocks.0.modulation"].dtype == torch.float32
    assert single.keys() == {to_original(name) for name in component}
    for name, tensor in component.items():
        assert torch.equal(tensor, single[to_original(name)].to(tensor.dtype)), name


@pytest.mark.parametrize("form", ["comfyui", "diffusers"])
def test_full_weights_are_split_into_files_of_the_size_that_is_wanted(
    finished: Callable[[str], Path], tmp_path: Path, form: str
) -> None:
    out, size = tmp_path / "merged", 2_000_000
    export(finished("plain"), wish(form, out, merged=True, max_shard_bytes=size), Recorder())
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 2
    assert all(sum(tensor.nbytes for tensor in load_file(shard).values()) <= size for shard in shards)
    index = json.loads((out / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert {out / name for name in index["weight_map"].values()} == set(shards)
    export(finished("plain"), wish("comfyui", tmp_path / "one.safetensors", merged=True), Recorder())
    found, expected = state_of(out), state_of(tmp_path / "one.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    if form == "comfyui":
        with pytest.raises(ConfigError, match="is there already; give a new folder"):
            export(finished("plain"), wish(form, out, merged=True, max_shard_bytes=size), Recorder())


def test_a_lower_rank_says_what_is_lost(finished: Callable[[str], Path], tmp_path: Path) -> None:
    said, out = Recorder(), tmp_path / "low.safetensors"
    export(finished("dora"), wish("kohya", out, rank=1), said)
    adapter = read_adapter(out)
    assert (set(adapter.ranks.values()), set(adapter.scales.values())) == ({1}, {1.0})
    assert adapter.metadata["longtake.model"] == "tiny-i2v"
    (line,) = said.having("relative error")
    assert line.startswith("rank 3 to 1: relative error ")
    assert " at worst " in line
    assert "blocks." in line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"form": "kohya", "merged": True}, "--format: kohya's format is for adapters"),
        ({"rank": 2}, "--rank: the adapter's rank is 2 already; give less than 2, or leave it out"),
        ({"rank": 0}, "--rank: a rank is at least 1; give more"),
        ({"max_shard_bytes": 5}, "--max-shard-size: an adapter is one file; leave it out, or add --merge"),
        ({"max_shard_bytes": 0, "merged": True}, "--max-shard-size: a file of no bytes holds nothing"),
    ],
)
def test_a_wish_that_cannot_be_is_named_and_nothing_is_written(
    finished: Callable[[str], Path], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        export(finished("plain"), ExportWish(**{"form": "comfyui", "out": tmp_path / "out", **changes}), Recorder())
    assert message in str(caught.value)
    assert [*tmp_path.iterdir()] == []


def test_full_weights_of_a_run_are_exported_whole(scenes: Scenes, tmp_path: Path) -> None:
    scene = scenes("tiny-t2v")
    run = scene.train(scene.config(tmp_path / "run", lora=None, model={"dtype": "fp32"}))
    out = tmp_path / "full.safetensors"
    export(run, wish("comfyui", out), Recorder())
    trained = read(checkpoint_path(run, 2)).trained
    exported = load_file(out)
    assert torch.equal(exported["blocks.0.self_attn.q.weight"], trained["blocks.0.attn1.to_q.weight"])
    assert len(exported) == len(trained)
    with pytest.raises(ConfigError, match="--rank: the run trained all weights"):
        export(run, wish("comfyui", out, rank=2), Recorder())
    assert "base_model_relation" not in (tmp_path / FILE).read_text()


def test_an_unfinished_full_run_says_how_to_finish_it(scenes: Scenes, tmp_path: Path) -> None:
    scene = scenes("tiny-t2v")
    config = scene.config(tmp_path / "run", lora=None, training={"steps": 3})
    with pytest.raises(RunError):
        scene.train(config, reporter=Stopper(1))
    with pytest.raises(ConfigError, match="the run is not finished; continue it with --resume"):
        export(tmp_path / "run", wish("comfyui", tmp_path / "out.safetensors"), Recorder())


def test_a_card_is_written_beside_it_but_not_over_another_readme(
    finished: Callable[[str], Path], tmp_path: Path
) -> None:
    said = Recorder()
    export(finished("plain"), wish("kohya", tmp_path / "mine.safetensors"), said)
    assert MADE in (tmp_path / FILE).read_text()
    assert "`mine.safetensors`" in (tmp_path / FILE).read_text()
    (tmp_path / FILE).write_text("my own words")
    export(finished("plain"), wish("kohya", tmp_path / "mine.safetensors"), said)
    assert (tmp_path / FILE).read_text() == "my own words"
    assert len(said.having("no model card is written")) == 1


def test_of_two_experts_there_are_two_files_and_a_run_goes_on_from_both(scenes: Scenes, tmp_path: Path) -> None:
    scene = scenes("tiny-t2v-a14b")
    training = {"steps": 4, "shift": 5.0, "learning_rate": 0.01}
    run = scene.train(scene.config(tmp_path / "run", training=training))
    made = export(run, wish("kohya", tmp_path / "mine.safetensors"), Recorder())
    assert [path.name for path in made] == ["mine-high-noise.safetensors", "mine-low-noise.safetensors"]
    assert [read_adapter(path).metadata["longtake.expert"] for path in made] == ["high", "low"]
    text = (tmp_path / FILE).read_text()
    assert 'weight_name="mine-low-noise.safetensors", load_into_transformer_2=True' in text
    merged = export(run, wish("comfyui", tmp_path / "merged.safetensors", merged=True), Recorder())
    for path, adapter, component in zip(merged, made, ("transformer", "transformer_2"), strict=True):
        files = ModelFiles(variant("tiny-t2v-a14b"), {component: scene.root / component}, None)
        expected = load_transformer(files, component, torch.float32, CPU)
        merge(expected, read_adapter(adapter))
        written = load_file(path)
        assert all(torch.equal(written[to_original(name)], own) for name, own in expected.state_dict().items())
    lora = {"start_from": [str(path) for path in made]}
    again = scene.config(tmp_path / "again", lora=lora, training=training | {"steps": 1, "learning_rate": 1e-30})
    for path, own in zip(made, sorted(scene.train(again).glob("adapter-*-noise.safetensors")), strict=True):
        before, after = read_adapter(path).state, read_adapter(own).state
        assert all(torch.equal(after[key], value) for key, value in before.items())
