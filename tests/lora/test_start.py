"""Going on from a LoRA in a file: what it computes is what training begins with, and what does not fit is told."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from longtake.config.schema import LoraConfig
from longtake.errors import ConfigError, ModelError
from longtake.lora import adapter_state, attach, begin_from, save_adapter, trained_adapter
from longtake.models.wan.keys import to_original
from longtake.models.wan.variants import variant

LORA = LoraConfig(rank=4, alpha=8.0, targets=("attention", "ffn"))


@pytest.fixture
def written(tmp_path, trained):
    """`written(lora, form)` is a file of a trained adapter, and the transformer that it was trained on."""

    def write(lora=LORA, form="comfyui", metadata=None):
        transformer = trained("tiny-t2v", lora)
        path = tmp_path / "start.safetensors"
        save_adapter(path, trained_adapter(adapter_state(transformer), lora, metadata or {}), form)
        return path, transformer

    return write


def begun(build, lora, path, **more):
    transformer = build("tiny-t2v")
    lora = lora.model_copy(update={"start_from": (str(path),)})
    attach(transformer, lora, seed=1)
    return transformer, begin_from(transformer, lora, **more)


@pytest.mark.parametrize("form", ["comfyui", "diffusers", "kohya"])
def test_training_goes_on_with_the_bits_of_the_file(build, written, velocity, form):
    path, before = written(form=form)
    transformer, told = begun(build, LORA, path)
    state = adapter_state(before)
    assert all(torch.equal(value, state[key]) for key, value in adapter_state(transformer).items())
    assert torch.equal(velocity(transformer), velocity(before))
    assert told == "starting from start.safetensors: 20 layers of rank 4"


@pytest.mark.parametrize("spelling", ["base_model.model.{module}.{half}.weight", "{original}.{half}.default.weight"])
def test_files_of_other_trainers_are_gone_on_from_with_a_scale_of_1(build, tmp_path, trained, velocity, spelling):
    lora = LORA.model_copy(update={"alpha": 4.0})
    before = trained("tiny-t2v", lora)
    tensors = {}
    for key, value in adapter_state(before).items():
        module, half = key.removesuffix(".weight").rsplit(".", 1)
        tensors[spelling.format(module=module, original=to_original(module), half=half)] = value
    save_file(tensors, tmp_path / "a.safetensors")
    transformer, _ = begun(build, lora, tmp_path / "a.safetensors")
    assert torch.equal(velocity(transformer), velocity(before))


@pytest.mark.parametrize(("alpha", "rslora"), [(16.0, False), (4.0, True), (3.3, False)])
def test_another_scale_is_folded_into_b(build, written, velocity, alpha, rslora):
    path, before = written()
    transformer, _ = begun(build, LORA.model_copy(update={"alpha": alpha, "rslora": rslora}), path)
    ours = alpha / (2.0 if rslora else 4)
    for key, value in adapter_state(transformer).items():
        expected = adapter_state(before)[key]
        if "lora_B" in key:
            expected = (expected.double() * (2.0 / ours)).float()
        assert torch.equal(value, expected), key
    torch.testing.assert_close(velocity(transformer), velocity(before), rtol=1e-4, atol=1e-5)


def test_a_lower_rank_is_padded_so_that_the_function_stays(build, written, velocity):
    path, before = written()
    higher = LORA.model_copy(update={"rank": 6, "alpha": 12.0})
    transformer, told = begun(build, higher, path)
    fresh = build("tiny-t2v")
    attach(fresh, higher, seed=1)
    drawn, found, old = (adapter_state(each) for each in (fresh, transformer, before))
    key = "blocks.0.attn1.to_q"
    assert torch.equal(found[f"{key}.lora_A.weight"][:4], old[f"{key}.lora_A.weight"])
    assert torch.equal(found[f"{key}.lora_A.weight"][4:], drawn[f"{key}.lora_A.weight"][4:])
    assert not found[f"{key}.lora_B.weight"][:, 4:].any()
    torch.testing.assert_close(velocity(transformer), velocity(before), rtol=1e-5, atol=1e-6)
    assert told.endswith("20 of them padded to the config's rank")


def test_layers_that_the_file_lacks_start_fresh(build, written, velocity):
    path, before = written(LORA.model_copy(update={"targets": ("ffn",)}))
    transformer, told = begun(build, LORA, path)
    assert torch.equal(velocity(transformer), velocity(before))
    assert told.endswith("4 layers of rank 4, 16 that it lacks start fresh")


def test_layers_that_are_not_trained_are_named(build, written):
    path, _ = written()
    with pytest.raises(ConfigError) as caught:
        begun(build, LORA.model_copy(update={"targets": ("ffn",)}), path)
    assert str(caught.value) == (
        "lora.start_from: 16 of 20 layers of start.safetensors are not trained, first blocks.0.attn1.to_k;"
        " add them to lora.targets, or start from another file [lora-layers-untrained]"
    )


def test_a_higher_rank_is_refused_with_the_rank_that_would_do(build, written):
    path, _ = written()
    with pytest.raises(ConfigError) as caught:
        begun(build, LORA.model_copy(update={"rank": 2}), path)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("lora.start_from: blocks.0.attn1.to_k has rank 4 in the file and 2 in the config")
    assert "set lora.rank = 4" in lines[0]
    assert len(lines) == 4


def test_a_higher_rank_in_a_block_with_a_rank_of_its_own_names_that_key(build, written):
    path, _ = written()
    with pytest.raises(ConfigError) as caught:
        begun(build, LORA.model_copy(update={"rank": 3, "block_ranks": ((1, 1, 2),)}), path)
    assert "set lora.rank = 4, or lower it" in str(caught.value).splitlines()[0]
    with pytest.raises(ConfigError) as caught:
        begun(build, LORA.model_copy(update={"block_ranks": ((0, 0, 2),)}), path)
    line = str(caught.value).splitlines()[0]
    assert line.startswith("lora.start_from: blocks.0.attn1.to_k has rank 4 in the file and 2 in the config;")
    assert "give block 0 rank 4 in lora.block_ranks, or lower it" in line


def test_different_ranks_are_told_as_a_range(build, written):
    lora = LORA.model_copy(update={"block_ranks": ((1, 1, 2),)})
    path, _ = written(lora)
    _, told = begun(build, lora, path)
    assert told == "starting from start.safetensors: 20 layers of ranks 2 to 4"


def test_a_lora_of_another_task_is_refused_and_one_of_another_model_is_said(build, written):
    path, _ = written(metadata={"longtake.model": "wan2.1-t2v-1.3b"})
    _, told = begun(build, LORA, path, spec=variant("tiny-t2v").spec)
    assert told == (
        "starting from start.safetensors: 20 layers of rank 4;"
        " start.safetensors is a LoRA of wan2.1-t2v-1.3b, the model is tiny-t2v"
    )
    with pytest.raises(ModelError, match=r"this is a LoRA of wan2\.1-t2v-1\.3b \(t2v\), the model is tiny-i2v \(i2v\)"):
        begun(build, LORA, path, spec=variant("tiny-i2v").spec)


def test_a_file_of_another_kind_is_told_from_a_damaged_one(build, tmp_path, written):
    image = tmp_path / "image.png"
    image.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(64))
    with pytest.raises(ModelError, match=r"image\.png: this is not a safetensors file \["):
        begun(build, LORA, image)
    path, _ = written()
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(ModelError, match="the safetensors file is damaged"):
        begun(build, LORA, path)


def test_a_dora_goes_on_as_a_dora_alone(build, written, velocity):
    dora = LORA.model_copy(update={"dora": True})
    path, before = written(dora)
    with pytest.raises(ConfigError, match=r"start\.safetensors is a DoRA; set lora\.dora = true"):
        begun(build, LORA, path)
    transformer, _ = begun(build, dora, path)
    assert torch.equal(velocity(transformer), velocity(before))


def test_a_dora_that_goes_on_from_a_plain_lora_computes_what_that_does(build, written, velocity):
    path, before = written()
    transformer, _ = begun(build, LORA.model_copy(update={"dora": True}), path)
    torch.testing.assert_close(velocity(transformer), velocity(before), rtol=1e-4, atol=1e-5)


def test_there_is_one_file_for_each_expert(build, written):
    path, before = written()
    lora = LORA.model_copy(update={"start_from": ("nowhere.safetensors", str(path))})
    transformer = build("tiny-t2v")
    attach(transformer, lora, seed=1)
    begin_from(transformer, lora, (1, 2))
    state = adapter_state(before)
    assert all(torch.equal(value, state[key]) for key, value in adapter_state(transformer).items())
    with pytest.raises(ConfigError, match=r"lora\.start_from: 2 files for 1 trained transformer; give one for each"):
        begin_from(transformer, lora, (0, 1))
    with pytest.raises(ModelError, match=r"nowhere\.safetensors: there is no such file"):
        begin_from(transformer, lora, (0, 2))
    neither = LORA.model_copy(update={"start_from": ("nowhere.safetensors", "neither.safetensors")})
    with pytest.raises(ModelError) as caught:
        begin_from(transformer, neither, (0, 2))
    assert str(caught.value).splitlines() == [
        f"lora.start_from: {name}.safetensors: there is no such file [lora-file-missing]"
        for name in ("nowhere", "neither")
    ]


@pytest.mark.parametrize(("expert", "place"), [("low", (0, 2)), ("high", (1, 2))])
def test_files_in_the_wrong_order_are_noticed(build, tmp_path, trained, expert, place):
    path = tmp_path / "a.safetensors"
    adapter = trained_adapter(adapter_state(trained("tiny-t2v", LORA)), LORA, {"longtake.expert": expert})
    save_adapter(path, adapter, "comfyui")
    lora = LORA.model_copy(update={"start_from": (str(path), str(path))})
    transformer = build("tiny-t2v")
    attach(transformer, lora, seed=1)
    begin_from(transformer, lora, (1 - place[0], 2))
    with pytest.raises(ConfigError, match=rf"a\.safetensors is of the {expert}-noise expert"):
        begin_from(transformer, lora, place)


def test_a_lora_of_a_wider_model_is_refused(build, written):
    path, _ = written()
    tensors = load_file(path)
    save_file({key: torch.zeros(4, 512) if "lora_A" in key else value for key, value in tensors.items()}, path)
    with pytest.raises(ModelError, match="made for a layer of 160x512, the model's has 160x160"):
        begun(build, LORA, path)


def test_without_files_nothing_is_done(build):
    transformer = build("tiny-t2v")
    attach(transformer, LORA, seed=1)
    before = adapter_state(transformer)
    assert begin_from(transformer, LORA) == ""
    assert all(torch.equal(value, before[key]) for key, value in adapter_state(transformer).items())
