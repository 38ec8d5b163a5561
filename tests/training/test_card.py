"""The model card: what it tells of a run, and the hub's own metadata in it."""

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from longtake.config.schema import RunConfig
from longtake.models.wan.variants import variant
from longtake.training.card import FILE, MADE, Card, is_foreign, write_card, write_card_beside, written


def card(model: str = "wan2.1-i2v-14b-480p", lora: dict[str, Any] | None = None, **more: Any) -> Card:
    config = RunConfig.model_validate(
        {
            "model": {"name": model, "expert": more.pop("expert", "both")},
            "data": {"source": "clips", "num_frames": 129, "size": (832, 480)},
            "lora": {"rank": 16, "alpha": 8.0} if lora is None else lora,
            "training": {"steps": 300, "shift": 5.0},
            "validation": {"samples": [{"prompt": "A red kite\nover a beach"}, {"prompt": "zxc style"}]},
            "output": {"run": "runs/kites"},
            **more.pop("sections", {}),
        }
    )
    known = variant(model)
    return Card(config, known, more.pop("files", ("adapter.safetensors",)), more.pop("whole", False), **more)


def metadata(of: Card) -> dict[str, Any]:
    return ModelCard(written(of)).data.to_dict()


def test_the_hub_reads_what_the_adapter_is_for() -> None:
    samples = (("samples/step-00000300-0.mp4", "A red kite\nover a beach"),)
    assert metadata(card(samples=samples)) == {
        "base_model": "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
        "base_model_relation": "adapter",
        "library_name": "diffusers",
        "license": "apache-2.0",
        "pipeline_tag": "image-to-video",
        "tags": ["wan", "i2v", "lora", "longtake"],
        "widget": [{"text": "A red kite\nover a beach", "output": {"url": "samples/step-00000300-0.mp4"}}],
    }
    assert metadata(card("wan2.1-t2v-1.3b"))["pipeline_tag"] == "text-to-video"


def test_a_model_of_nobody_s_has_no_base() -> None:
    found = metadata(card("tiny-i2v"))
    assert "base_model" not in found
    assert "base_model_relation" not in found


def test_settings_prompts_and_hints_are_told() -> None:
    text = written(card(lora={"rank": 16, "alpha": 8.0, "rslora": True, "block_ranks": [[0, 3, 4]]}))
    assert MADE in text
    for line in (
        "# kites",
        "| rank | 16, 4 in blocks 0 to 3 |",
        "| alpha | 8, rsLoRA |",
        "| adapter | LoRA |",
        "| steps | 300 steps, 4 clips each |",
        "| resolution | 832x480 |",
        "| frames | 129 at 16 a second |",
        "> A red kite over a beach",
        "> zxc style",
        "Sample with a shift of 5, 30 steps and a guidance of 5, at 832x480 and 129 frames.",
        'pipeline.load_lora_weights(".", weight_name="adapter.safetensors")',
    ):
        assert line in text.splitlines(), line
    assert "LoraLoaderModelOnly" in text


def test_of_two_experts_each_has_its_file() -> None:
    files = ("adapter-high-noise.safetensors", "adapter-low-noise.safetensors")
    text = written(card("wan2.2-t2v-a14b", files=files))
    assert (
        "put them into `models/loras` and load them with the node LoraLoaderModelOnly; attach"
        " `adapter-high-noise.safetensors` to the high-noise model, `adapter-low-noise.safetensors` to the low-noise"
        " model."
    ) in text
    assert "one alone" not in text
    assert 'weight_name="adapter-high-noise.safetensors")' in text
    assert 'weight_name="adapter-low-noise.safetensors", load_into_transformer_2=True)' in text


@pytest.mark.parametrize(("expert", "second"), [("high", False), ("low", True)])
def test_of_one_expert_the_adapter_is_loaded_into_it(expert: str, second: bool) -> None:
    text = written(card("wan2.2-t2v-a14b", expert=expert))
    assert ("load_into_transformer_2=True" in text) is second
    component = "transformer_2" if second else "transformer"
    assert f"The model has two transformers; this is for the {expert}-noise one alone (`{component}`, ComfyUI's" in text
    assert f" {expert}-noise model)." in text
    assert f"load it with the node LoraLoaderModelOnly; attach it to the {expert}-noise model." in text


def test_full_weights_are_loaded_as_a_transformer() -> None:
    full = card(files=("transformer",), whole=True, form="diffusers")
    assert metadata(full)["base_model_relation"] == "finetune"
    assert 'transformer = WanTransformer3DModel.from_pretrained("transformer"' in written(full)
    assert "load_lora_weights" not in written(full)
    assert "models/diffusion_models" not in written(full)
    original = written(card(files=("merged.safetensors",), whole=True))
    assert "from_pretrained" not in original
    assert "ComfyUI: put it into `models/diffusion_models`." in original


def test_a_lowered_rank_is_told() -> None:
    assert "| rank | 16, brought down to 4 |" in written(card(rank=4)).splitlines()


def test_one_of_a_thing_is_told_as_one() -> None:
    training = {"steps": 1, "global_batch_size": 1, "lora_plus_ratio": 16.0}
    lines = written(card(lora={"rank": 16, "block_ranks": [[2, 2, 4]]}, sections={"training": training})).splitlines()
    assert "| steps | 1 step, 1 clip each |" in lines
    assert "| rank | 16, 4 in block 2 |" in lines
    assert "| lora_plus_ratio | 16 |" in lines
    assert "lora_plus_ratio" not in written(card())


@pytest.mark.parametrize("form", ["comfyui", "kohya"])
def test_a_dora_is_told_as_one_and_not_given_to_what_reads_it_wrongly(form: str) -> None:
    text = written(card(lora={"dora": True}, form=form))
    assert "# kites (DoRA)" in text.splitlines()
    assert "| adapter | DoRA |" in text.splitlines()
    assert "diffusers reads a DoRA in its own format alone: `longtake export --format diffusers`" in text
    assert "`longtake export --format comfyui --merge` writes full weights" in text
    for other in ("models/loras", "load_lora_weights"):
        assert other not in text
    assert "DoRA" not in written(card())


def test_adapters_in_other_formats_are_listed_and_diffusers_is_given_its_own(tmp_path: Path) -> None:
    for name in ("adapter-diffusers.safetensors", "adapter-kohya.safetensors", "another-diffusers.safetensors"):
        (tmp_path / name).touch()
    listed = "| files | `adapter.safetensors`, `adapter-diffusers.safetensors`, `adapter-kohya.safetensors` |"
    text = write_card(tmp_path, card(lora={"dora": True})).read_text()
    assert listed in text.splitlines()
    assert 'load_lora_weights(".", weight_name="adapter-diffusers.safetensors")' in text
    assert "models/loras" not in text
    plain = write_card(tmp_path, card()).read_text()
    assert listed in plain.splitlines()
    assert 'load_lora_weights(".", weight_name="adapter.safetensors")' in plain


def test_what_does_not_load_an_export_is_not_told_to() -> None:
    assert "load_lora_weights" in written(card(form="kohya"))
    kohya = written(card(form="kohya", lora={"targets": ["attention"]}))
    assert "load_lora_weights" not in kohya
    assert "`longtake export --format diffusers` writes its file" in kohya
    assert "models/loras" in kohya
    diffusers = written(card(form="diffusers"))
    assert "models/loras" not in diffusers
    assert "load_lora_weights" in diffusers
    assert "ComfyUI: `longtake export --format comfyui` writes its file of the same adapter." in diffusers


def test_weights_in_shards_are_not_for_comfyui(tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    text = write_card(tmp_path, card(files=("merged",), whole=True)).read_text()
    assert "ComfyUI loads one file, not shards" in text
    assert "models/diffusion_models" not in text


def test_another_readme_stays_where_it_is(tmp_path: Path) -> None:
    said: list[str] = []
    assert not is_foreign(tmp_path / FILE)
    for _ in range(2):
        write_card_beside(tmp_path, card(), said.append)
    assert said == []
    (tmp_path / FILE).write_text("mine")
    write_card_beside(tmp_path, card(), said.append)
    assert (tmp_path / FILE).read_text() == "mine"
    assert len(said) == 1
    write_card(tmp_path, card())
    assert MADE in (tmp_path / FILE).read_text()
