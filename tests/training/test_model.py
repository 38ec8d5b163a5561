"""Which transformer a run trains, on which share of sigma, and which of its weights."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from longtake.config.schema import RunConfig
from longtake.errors import ConfigError
from longtake.memory.block_swap import swapped_blocks
from longtake.memory.extents import Extent, read
from longtake.memory.flattened import inner_tensors
from longtake.memory.quantization import QuantizedWeight, quantize
from longtake.models.wan.tiny import build_tiny
from longtake.models.wan.variants import variant
from longtake.models.wan.weights import ModelFiles
from longtake.training.model import Expert, TrainedModel, build_model, choose_experts, find_model
from runs import CPU, Scene


def config(**sections: Any) -> RunConfig:
    """As little as a config can be."""
    table = {"model": {"name": "tiny-t2v"}, "data": {"source": "clips"}, "output": {"run": "run"}}
    return RunConfig.model_validate(table | sections)


@pytest.mark.parametrize(("name", "boundary"), [("wan2.2-t2v-a14b", 0.875), ("wan2.2-i2v-a14b", 0.9)])
def test_an_expert_is_trained_on_its_side_of_the_boundary(name: str, boundary: float) -> None:
    spec = variant(name).spec
    high = choose_experts(config(model={"name": name, "expert": "high"}), spec)
    low = choose_experts(config(model={"name": name, "expert": "low"}), spec)
    assert high == (Expert("transformer", (boundary, 1.0), "high"),)
    assert low == (Expert("transformer_2", (0.0, boundary), "low"),)
    assert choose_experts(config(model={"name": name}), spec) == high + low


def test_one_transformer_is_trained_on_every_sigma() -> None:
    assert choose_experts(config(), variant("wan2.1-i2v-14b-480p").spec) == (Expert("transformer", (0.0, 1.0)),)


@pytest.mark.parametrize(
    ("name", "sections", "where"),
    [
        ("wan2.1-t2v-14b", {"model": {"name": "x", "expert": "high"}}, "model.expert"),
        (
            "wan2.2-t2v-a14b",
            {"model": {"name": "x", "expert": "low"}, "validation": {"samples": [{"prompt": "a"}]}},
            "validation.samples",
        ),
    ],
)
def test_an_expert_that_does_not_fit_the_model_is_refused(name: str, sections: dict[str, Any], where: str) -> None:
    with pytest.raises(ConfigError) as raised:
        choose_experts(config(**sections), variant(name).spec)
    (problem,) = raised.value.problems
    assert problem.where == where
    assert problem.remedy


def two_experts(tiny_root: Callable[[str], Path], folder: Path) -> ModelFiles:
    """Two tiny transformers of different weights as the experts of one model."""
    build_tiny("tiny-t2v", folder / "second", seed=1)
    tiny = variant("tiny-t2v")
    spec = replace(tiny.spec, experts=("transformer", "transformer_2"), boundary_ratio=0.875)
    roots = (tiny_root("tiny-t2v"), folder / "second")
    paths = {name: root / "transformer" for name, root in zip(spec.experts, roots, strict=True)}
    return ModelFiles(replace(tiny, spec=spec), paths, roots[0])


def test_the_chosen_expert_is_the_one_that_is_loaded(tiny_root: Callable[[str], Path], tmp_path: Path) -> None:
    files = two_experts(tiny_root, tmp_path)
    weights = {}
    for expert in ("high", "low"):
        chosen = config(model={"name": "tiny-t2v", "expert": expert}, lora={"rank": 2})
        model = build_model(chosen, files, CPU)
        assert model.expert.sigma_range == ((0.875, 1.0) if expert == "high" else (0.0, 0.875))
        weights[model.expert.component] = model.transformer.proj_out.weight
    assert not torch.equal(weights["transformer"], weights["transformer_2"])


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_lora_is_fp32_on_frozen_weights(scenes: Callable[[str], Scene], tmp_path: Path, dtype: str) -> None:
    chosen = scenes("tiny-i2v").config(tmp_path, model={"dtype": dtype})
    model = build_model(chosen, find_model(chosen, print), CPU)
    assert all(".lora_" in name for name in model.parameters)
    assert {parameter.dtype for parameter in model.parameters.values()} == {torch.float32}
    assert model.transformer.training
    frozen = model.transformer.blocks[0].attn1.to_q.base_layer.weight
    assert frozen.dtype == {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    assert not frozen.requires_grad


def test_without_a_lora_all_weights_are_trained_in_fp32(scenes: Callable[[str], Scene], tmp_path: Path) -> None:
    chosen = scenes("tiny-i2v").config(tmp_path, lora=None, model={"dtype": "bf16"})
    model = build_model(chosen, find_model(chosen, print), CPU)
    assert model.parameters.keys() == variant("tiny-i2v").parameter_shapes().keys()
    assert {parameter.dtype for parameter in model.parameters.values()} == {torch.float32}


def built(scene: Scene, tmp_path: Path, dtype: str = "fp32", **memory: Any) -> TrainedModel:
    """A LoRA's model under the [memory] section `memory`; the files of a tiny model are in fp32."""
    chosen = scene.config(tmp_path, model={"dtype": dtype}, memory=memory)
    return build_model(chosen, find_model(chosen, print), CPU)


def linear_weights(model: TrainedModel) -> dict[str, nn.Parameter]:
    """The frozen weights of the blocks' linear layers."""
    layers = {name: module for name, module in model.transformer.named_modules() if isinstance(module, nn.Linear)}
    chosen = {name: layer.weight for name, layer in layers.items() if name.startswith("blocks.") and "lora" not in name}
    assert len(chosen) == 4 * 12
    return chosen


@pytest.mark.parametrize("kind", ["int8", "fp8", "nf4"])
def test_weights_are_quantised_as_they_are_read(scenes: Callable[[str], Scene], tmp_path: Path, kind: Any) -> None:
    plain, model = built(scenes("tiny-i2v"), tmp_path), built(scenes("tiny-i2v"), tmp_path, quantization=kind)
    for name, weight in linear_weights(model).items():
        assert isinstance(weight, QuantizedWeight)
        expected = inner_tensors(quantize(linear_weights(plain)[name].detach(), kind))
        assert all(torch.equal(one, two) for one, two in zip(inner_tensors(weight), expected, strict=True))
    others = [parameter for parameter in model.transformer.parameters() if not isinstance(parameter, QuantizedWeight)]
    assert len(others) == len([*model.transformer.parameters()]) - 48
    assert model.parameters.keys() == plain.parameters.keys()
    assert all(torch.equal(parameter, plain.parameters[name]) for name, parameter in model.parameters.items())
    quantised = [name for name, parameter in model.transformer.named_parameters() if parameter not in set(others)]
    assert not model.weight_files.keys() & set(quantised), "their bytes are not those of the file"


def test_swapped_weights_that_the_file_has_as_they_are_stay_there(
    scenes: Callable[[str], Scene], tmp_path: Path
) -> None:
    model = built(scenes("tiny-i2v"), tmp_path, block_swap=3, block_swap_from="disk")
    plain = dict(built(scenes("tiny-i2v"), tmp_path).transformer.named_parameters())
    away = {f"blocks.{index}." for index in swapped_blocks(4, 3)}
    for name, parameter in model.transformer.named_parameters():
        left = any(name.startswith(prefix) for prefix in away) and not parameter.requires_grad
        assert parameter.is_meta == left, name
        assert parameter.dtype == plain[name].dtype
        assert left or torch.equal(parameter, plain[name])
        if left:
            file = model.weight_files[name]
            values = torch.empty_like(plain[name])
            descriptor = os.open(file.path, os.O_RDONLY)
            extent = Extent(descriptor, str(file.path), file.start, file.nbytes)
            read(values.view(-1).view(torch.uint8), (extent,))
            os.close(descriptor)
            assert torch.equal(values, plain[name]), name
    assert all(parameter.device == CPU for parameter in model.parameters.values())


def test_swapped_weights_of_another_type_than_the_files_are_read(
    scenes: Callable[[str], Scene], tmp_path: Path
) -> None:
    model = built(scenes("tiny-i2v"), tmp_path, "bf16", block_swap=4, block_swap_from="disk")
    frozen = {
        name: parameter for name, parameter in model.transformer.named_parameters() if not parameter.requires_grad
    }
    blocks = {name: parameter for name, parameter in frozen.items() if name.startswith("blocks.")}
    assert all(parameter.is_meta == (parameter.dtype == torch.float32) for parameter in blocks.values())
    assert {name for name in blocks if blocks[name].is_meta} <= model.weight_files.keys()
    assert all(frozen[name].dtype == file.dtype for name, file in model.weight_files.items())


@pytest.mark.parametrize(
    "memory", [{"block_swap": 4}, {"block_swap": 4, "block_swap_from": "disk", "quantization": "nf4"}]
)
def test_other_swapped_weights_are_in_host_memory(
    scenes: Callable[[str], Scene], tmp_path: Path, memory: dict[str, Any]
) -> None:
    model = built(scenes("tiny-i2v"), tmp_path, **memory)
    inners = [inner for parameter in model.transformer.parameters() for inner in inner_tensors(parameter)]
    assert {inner.device for inner in inners} == {CPU}


def test_without_a_lora_nothing_is_left_in_a_file(scenes: Callable[[str], Scene], tmp_path: Path) -> None:
    chosen = scenes("tiny-i2v").config(tmp_path, lora=None)
    assert not build_model(chosen, find_model(chosen, print), CPU).weight_files
