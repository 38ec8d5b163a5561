"""What a LoRA file is."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from longtake.errors import ModelError
from longtake.models.wan.detection import inspect
from longtake.models.wan.keys import to_original
from longtake.models.wan.variants import VARIANTS

MODULES = ("blocks.0.attn1.to_q", "blocks.1.ffn.net.0.proj", "blocks.1.attn2.to_out.0")
FORMS = ("comfyui", "kohya", "diffusers")
IMAGE = ("blocks.0.attn2.add_k_proj",)


def write_adapter(path: Path, form: str, modules: tuple[str, ...], rank: int = 4, base: str = "tiny-i2v") -> Path:
    shapes = VARIANTS[base].parameter_shapes()
    tensors: dict[str, torch.Tensor] = {}
    for module in modules:
        outputs, inputs = shapes[f"{module}.weight"]
        name, down, up = {
            "comfyui": (f"diffusion_model.{to_original(module)}", "lora_A", "lora_B"),
            "kohya": ("lora_unet_" + to_original(module).replace(".", "_"), "lora_down", "lora_up"),
            "diffusers": (f"transformer.{module}", "lora_A", "lora_B"),
        }[form]
        tensors[f"{name}.{down}.weight"] = torch.zeros(rank, inputs)
        tensors[f"{name}.{up}.weight"] = torch.zeros(outputs, rank)
        if form != "diffusers":
            tensors[f"{name}.alpha"] = torch.tensor(2.5, dtype=torch.bfloat16 if form == "kohya" else torch.float32)
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("form", ["comfyui", "kohya", "diffusers"])
def test_format_rank_alpha_and_targets_are_told(tmp_path: Path, form: str) -> None:
    facts = inspect(write_adapter(tmp_path / "lora.safetensors", form, MODULES + IMAGE))
    assert facts["kind"] == "lora"
    assert facts["format"] == form
    assert facts["ranks"] == [4]
    assert facts["alphas"] == ([] if form == "diffusers" else [2.5])
    assert facts["targets"] == 4
    assert facts["unknown_targets"] == []


@pytest.mark.parametrize("form", ["comfyui", "kohya", "diffusers"])
def test_bases_are_those_that_have_every_target_in_its_size(tmp_path: Path, form: str) -> None:
    tiny = inspect(write_adapter(tmp_path / "t.safetensors", form, MODULES))["candidates"]
    assert tiny == [name for name in VARIANTS if name.startswith("tiny-")]
    image = inspect(write_adapter(tmp_path / "i.safetensors", form, MODULES + IMAGE))["candidates"]
    assert image == ["tiny-i2v", "tiny-flf2v"]
    small = inspect(write_adapter(tmp_path / "s.safetensors", form, MODULES, base="wan2.1-t2v-1.3b"))
    assert small["variant"] == "wan2.1-t2v-1.3b"


def test_a_lora_of_another_model_has_no_base(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    name = "diffusion_model.double_blocks.0.img_attn.qkv"
    save_file({f"{name}.lora_A.weight": torch.zeros(2, 8), f"{name}.lora_B.weight": torch.zeros(8, 2)}, path)
    facts = inspect(path)
    assert facts["candidates"] == []
    assert facts["unknown_targets"] == [name]


def test_half_a_pair_and_misshapen_pairs_count_as_unknown(tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    name = "diffusion_model.blocks.{}.self_attn.q"
    tensors = {name.format(0) + ".lora_A.weight": torch.zeros(2, 160)}
    tensors |= {
        name.format(1) + ".lora_A.weight": torch.zeros(2, 160),
        name.format(1) + ".lora_B.weight": torch.zeros(()),
    }
    save_file(tensors, path)
    assert inspect(path)["unknown_targets"] == [name.format(0), name.format(1)]


def test_what_the_file_says_of_itself_is_told_and_its_model_comes_first(tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "lora.safetensors", "comfyui", MODULES)
    facts = inspect(path)
    assert facts.keys().isdisjoint({"model", "expert", "steps", "num_frames"})
    assert (facts["variant"], facts["task"]) == (None, None)
    metadata = {"longtake.model": "tiny-flf2v", "longtake.steps": "300", "longtake.num_frames": "81"}
    save_file(load_file(path), path, metadata)
    told = inspect(path)
    assert [told.get(key) for key in ("model", "expert", "steps", "num_frames")] == ["tiny-flf2v", None, 300, 81]
    assert (told["variant"], told["task"]) == ("tiny-flf2v", "flf2v")
    assert isinstance(told["candidates"], list)
    assert isinstance(facts["candidates"], list)
    assert told["candidates"][0] == "tiny-flf2v"
    assert sorted(told["candidates"]) == sorted(facts["candidates"])
    save_file(load_file(path), path, {"longtake.model": "wan2.1-t2v-14b", "longtake.expert": "high"})
    other = inspect(path)
    assert (other["model"], other["expert"], other["variant"]) == ("wan2.1-t2v-14b", "high", None)
    assert other["candidates"] == facts["candidates"]


def test_alphas_count_as_no_parameters(tmp_path: Path) -> None:
    counts = {inspect(write_adapter(tmp_path / f"{form}.safetensors", form, MODULES))["parameters"] for form in FORMS}
    assert counts == {sum(4 * (a + b) for a, b in ((160, 160), (640, 160), (160, 160)))}


def test_alphas_of_diffusers_files_are_in_their_metadata(tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "lora.safetensors", "diffusers", MODULES)
    config = {"r": 4, "lora_alpha": 8, "alpha_pattern": {f"^{MODULES[0]}": 2}}
    told = {f"transformer.{key}": value for key, value in config.items()}
    save_file(load_file(path), path, {"lora_adapter_metadata": json.dumps(told)})
    assert inspect(path)["alphas"] == [2.0, 8.0]
    save_file(load_file(path), path, {"lora_adapter_metadata": "[]"})
    with pytest.raises(ModelError, match="cannot read the LoRA's alpha: lora_adapter_metadata is no table"):
        inspect(path)


def test_a_folder_of_several_lora_files_names_them(tmp_path: Path) -> None:
    names = [f"adapter-{noise}-noise.safetensors" for noise in ("high", "low")]
    for name in names:
        write_adapter(tmp_path / name, "comfyui", MODULES)
    with pytest.raises(ModelError) as caught:
        inspect(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: holds 2 LoRA files: {', '.join(names)};"
        f" inspect one of them: {tmp_path / names[0]} [lora-several-files]"
    )
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match="holds 3 models"):
        inspect(tmp_path)


def test_a_folder_whose_sub_folders_have_weights_names_three_of_them(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no safetensors file in this folder; give the path of the weights \["):
        inspect(tmp_path)
    for name in ("d", "c", "b", "a"):
        (tmp_path / name).mkdir()
        save_file({"weight": torch.zeros(1)}, tmp_path / name / "x.safetensors")
    with pytest.raises(ModelError, match=r"this folder; give the path of one with some: a, b, c and 1 more \["):
        inspect(tmp_path)
