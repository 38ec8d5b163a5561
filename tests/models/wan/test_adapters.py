"""What a LoRA file is."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from longtake.models.wan.detection import inspect
from longtake.models.wan.keys import to_original
from longtake.models.wan.variants import VARIANTS

MODULES = ("blocks.0.attn1.to_q", "blocks.1.ffn.net.0.proj", "blocks.1.attn2.to_out.0")
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
