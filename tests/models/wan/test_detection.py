"""Every model told from headers of its full size, without data."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoints import original_shapes, write_pipeline, write_sparse, write_sparse_shards
from longtake.config.schema import ModelConfig
from longtake.errors import ModelError
from longtake.models.wan.detection import detect, identify, inspect, variant_of
from longtake.models.wan.variants import VARIANTS

SAME = {
    "wan2.1-t2v-14b": ("wan2.1-t2v-14b", "wan2.2-t2v-a14b"),
    "wan2.2-t2v-a14b": ("wan2.1-t2v-14b", "wan2.2-t2v-a14b"),
    "wan2.1-i2v-14b-480p": ("wan2.1-i2v-14b-480p", "wan2.1-i2v-14b-720p"),
    "wan2.1-i2v-14b-720p": ("wan2.1-i2v-14b-480p", "wan2.1-i2v-14b-720p"),
}
every_variant = pytest.mark.parametrize("name", list(VARIANTS))


@every_variant
@pytest.mark.parametrize(
    ("layout", "prefix"),
    [("original", ""), ("comfyui", "model.diffusion_model."), ("comfyui", "diffusion_model."), ("diffusers", None)],
)
def test_every_variant_is_told_from_one_header(tmp_path: Path, name: str, layout: str, prefix: str | None) -> None:
    shapes = VARIANTS[name].parameter_shapes() if prefix is None else original_shapes(name, prefix)
    found = detect(write_sparse(tmp_path / "model.safetensors", shapes))
    assert found.candidates == SAME.get(name, (name,))
    assert (found.variant is None) == (name in SAME)
    assert (found.layout, found.kind, found.dtype) == (layout, "transformer", "bf16")
    assert (found.parameters, found.prefix) == (VARIANTS[name].parameters, prefix or "")


@every_variant
def test_a_diffusers_root_decides_by_its_index(tmp_path: Path, name: str) -> None:
    found = detect(write_pipeline(tmp_path / "misleading-720P", name))
    undecided = SAME[name] if "i2v-14b" in name and name in SAME else (name,)
    assert found.candidates == undecided
    assert tuple(found.experts) == VARIANTS[name].spec.experts
    assert identify(tmp_path / "misleading-720P", name).spec == VARIANTS[name].spec


@pytest.mark.parametrize("name", ["wan2.2-t2v-a14b", "wan2.2-i2v-a14b"])
def test_the_original_release_of_two_experts_is_one_model(tmp_path: Path, name: str) -> None:
    for folder in ("high_noise_model", "low_noise_model"):
        write_sparse_shards(tmp_path / folder, "diffusion_pytorch_model", original_shapes(name), 3)
    found = detect(tmp_path)
    assert found.candidates == (name,)
    assert found.experts == {
        "transformer": tmp_path / "high_noise_model",
        "transformer_2": tmp_path / "low_noise_model",
    }
    assert len(found.files) == 6


def test_a_file_of_one_of_two_experts_does_not_say_which(tmp_path: Path) -> None:
    path = write_sparse(tmp_path / "high_noise.safetensors", original_shapes("wan2.2-i2v-a14b"))
    assert detect(path).experts == {}
    assert inspect(path)["experts"] == []


def test_the_boundary_of_a_roots_index_is_kept(tmp_path: Path) -> None:
    write_pipeline(tmp_path, "wan2.2-t2v-a14b")
    change_index(tmp_path, boundary_ratio=0.8)
    assert identify(tmp_path).spec.boundary_ratio == 0.8
    change_index(tmp_path, boundary_ratio=None)
    with pytest.raises(ModelError, match="boundary_ratio"):
        detect(tmp_path)


def test_one_downloaded_expert_of_two_is_enough(tmp_path: Path) -> None:
    write_pipeline(tmp_path, "wan2.2-t2v-a14b")
    (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    (tmp_path / "transformer").rmdir()
    assert list(detect(tmp_path).experts) == ["transformer_2"]


def test_where_the_file_cannot_tell_the_error_lists_candidates_and_the_key(tmp_path: Path) -> None:
    path = write_sparse(tmp_path / "wan2.1_i2v_720p.safetensors", original_shapes("wan2.1-i2v-14b-720p"))
    with pytest.raises(ModelError, match=r"wan2\.1-i2v-14b-480p or wan2\.1-i2v-14b-720p.*model\.name"):
        identify(path)
    assert identify(path, "wan2.1-i2v-14b-720p").name == "wan2.1-i2v-14b-720p"
    assert identify(path, "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers").name == "wan2.1-i2v-14b-720p"
    with pytest.raises(ModelError, match=r"not wan2\.2-i2v-a14b"):
        identify(path, "wan2.2-i2v-a14b")
    with pytest.raises(ModelError, match="no model called 'wan3'"):
        identify(path, "wan3")


@pytest.mark.parametrize(
    ("key", "model"),
    [
        ("vace_blocks.0.self_attn.q.weight", "VACE"),
        ("vace_patch_embedding.weight", "VACE"),
        ("face_adapter.fuser_blocks.0.k_norm.weight", "Animate"),
        ("motion_encoder.enc.fc.0.weight", "Animate"),
        ("pose_patch_embedding.weight", "Animate"),
        ("casual_audio_encoder.encoder.final_linear.weight", "speech-to-video"),
        ("control_adapter.conv.weight", "Control-Camera"),
        ("ref_conv.weight", "Fun Control"),
        ("trainable_cond_mask.weight", "speech-to-video"),
        ("blocks.0.audio_cross_attn.q_linear.weight", "audio-driven"),
        ("blocks.0.cam_encoder.weight", "camera-controlled"),
        ("fps_embedding.weight", "SkyReels"),
        ("blocks.0.some_new_part.weight", "not a Wan transformer's: blocks.0.some_new_part.weight"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_other_models_are_refused_by_the_key_that_tells(tmp_path: Path, key: str, model: str, prefix: str) -> None:
    shapes = original_shapes("wan2.1-t2v-14b", prefix) | {prefix + key: (8, 8)}
    with pytest.raises(ModelError, match=model) as refused:
        detect(write_sparse(tmp_path / "model.safetensors", shapes))
    assert key in str(refused.value)


def test_a_pipeline_of_another_class_is_refused(tmp_path: Path) -> None:
    write_pipeline(tmp_path, "wan2.1-t2v-14b")
    change_index(tmp_path, transformer=["diffusers", "WanVACETransformer3DModel"])
    with pytest.raises(ModelError, match="WanVACETransformer3DModel"):
        detect(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", '{"transformer": 3}', '{"transformer": ["diffusers"]}', "{}"])
def test_a_damaged_pipeline_index_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "model_index.json").write_text(text)
    with pytest.raises(ModelError, match="index"):
        detect(tmp_path)


def test_experts_of_two_models_do_not_make_one(tmp_path: Path) -> None:
    write_pipeline(tmp_path, "wan2.2-t2v-a14b")
    weights = tmp_path / "transformer_2" / "diffusion_pytorch_model.safetensors"
    write_sparse(weights, VARIANTS["wan2.2-i2v-a14b"].parameter_shapes())
    with pytest.raises(ModelError, match=r"do not make one model.*transformer_2: wan2\.2-i2v-a14b"):
        detect(tmp_path)


def test_a_wan_of_unknown_size_is_refused_with_its_shapes(tmp_path: Path) -> None:
    shapes = original_shapes("tiny-t2v") | {"patch_embedding.weight": (160, 20, 1, 2, 2)}
    with pytest.raises(ModelError, match=r"no Wan model has in_channels 20, out_channels 16, dim 160, num_layers \d"):
        detect(write_sparse(tmp_path / "model.safetensors", shapes))


def test_missing_and_misshapen_parameters_are_listed_together(tmp_path: Path) -> None:
    shapes = original_shapes("tiny-t2v") | {"blocks.2.norm3.bias": (161,)}
    del shapes["blocks.1.self_attn.q.weight"], shapes["blocks.1.self_attn.k.weight"]
    with pytest.raises(ModelError) as refused:
        detect(write_sparse(tmp_path / "model.safetensors", shapes))
    missing, misshapen = map(str, refused.value.problems)
    assert "2 parameters are missing: blocks.1.attn1.to_q.weight, blocks.1.attn1.to_k.weight" in missing
    assert "blocks.2.norm2.bias [161] instead of [160]" in misshapen


@pytest.mark.parametrize(("channels", "model"), [(48, "Wan2.1 Fun Control"), (52, "Wan2.2 Fun Control")])
def test_control_models_are_told_by_their_input_channels(tmp_path: Path, channels: int, model: str) -> None:
    shapes = original_shapes("wan2.2-i2v-a14b") | {"patch_embedding.weight": (5120, channels, 1, 2, 2)}
    with pytest.raises(ModelError, match=rf"this is a {model} model \(it has in_channels {channels}"):
        detect(write_sparse(tmp_path / "model.safetensors", shapes))


@pytest.mark.parametrize("layout", ["original", "comfyui", "diffusers"])
@pytest.mark.parametrize("change", ["renamed", "missing", "extra", "misshapen", "extra block", "one block less"])
def test_a_near_miss_is_refused_with_its_reason_in_one_line(tmp_path: Path, change: str, layout: str) -> None:
    prefix = "model.diffusion_model." if layout == "comfyui" else ""
    shapes = (
        VARIANTS["wan2.1-t2v-1.3b"].parameter_shapes() if layout == "diffusers" else original_shapes("wan2.1-t2v-1.3b")
    )
    name = "blocks.7.attn1.to_q.weight" if layout == "diffusers" else "blocks.7.self_attn.q.weight"
    if change in ("renamed", "missing"):
        del shapes[name]
    if change in ("renamed", "extra"):
        shapes[name.replace("to_q", "to_query").replace(".q.", ".query.")] = (1536, 1536)
    if change == "misshapen":
        shapes[name] = (1536, 1500)
    if change == "extra block":
        shapes |= {key.replace(".7.", ".30."): shape for key, shape in shapes.items() if key.startswith("blocks.7.")}
    if change == "one block less":
        shapes = {key: shape for key, shape in shapes.items() if not key.startswith("blocks.29.")}
    path = write_sparse(tmp_path / "model.safetensors", {prefix + key: shape for key, shape in shapes.items()})
    with pytest.raises(ModelError) as refused:
        inspect(path)
    (problem,) = refused.value.problems
    assert len(str(problem).splitlines()) == 1
    told = {
        "renamed": "query",
        "missing": "1 parameters are missing: blocks.7.attn1.to_q.weight",
        "extra": "query",
        "misshapen": "blocks.7.attn1.to_q.weight [1536, 1500] instead of [1536, 1536]",
        "extra block": "num_layers 31",
        "one block less": "num_layers 29",
    }
    assert told[change] in problem.what


@pytest.mark.parametrize(
    "name",
    ["wan2.1-t2v-1.3b", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "wan-ai/wan2.1-t2v-1.3b", "ms://Wan-AI/Wan2.1-T2V-1.3B"],
)
def test_the_variant_of_a_published_name_is_told_without_fetching_it(name: str) -> None:
    assert variant_of(ModelConfig(name=name)).name == "wan2.1-t2v-1.3b"


def test_a_hub_id_that_nobody_knows_cannot_be_told() -> None:
    with pytest.raises(ModelError, match="there is no model called 'somebody/model'"):
        variant_of(ModelConfig(name="somebody/model"))


def test_a_model_that_is_no_wan_is_refused(tmp_path: Path) -> None:
    path = write_sparse(tmp_path / "flux.safetensors", {"double_blocks.0.img_attn.qkv.weight": (8, 8)})
    with pytest.raises(ModelError, match="not a Wan model"):
        detect(path)
    with pytest.raises(ModelError, match="holds no tensors"):
        detect(write_sparse(tmp_path / "empty.safetensors", {}))


def test_the_type_is_that_of_most_values_and_scales_are_told(tmp_path: Path) -> None:
    shapes = original_shapes("tiny-t2v", "model.diffusion_model.")
    mixed = write_sparse(
        tmp_path / "mixed.safetensors", shapes, "F16", **{"model.diffusion_model.head.modulation": "F32"}
    )
    assert detect(mixed).dtype == "fp16"
    shapes |= {
        "model.diffusion_model.scaled_fp8": (2,),
        "model.diffusion_model.blocks.0.self_attn.q.scale_weight": (1,),
    }
    scaled = detect(write_sparse(tmp_path / "scaled.safetensors", shapes, "F8_E4M3"))
    assert (scaled.dtype, scaled.candidates) == ("fp8_e4m3 with scales", ("tiny-t2v",))


@pytest.mark.parametrize(
    ("shapes", "kind", "user"),
    [
        (
            {"quant_conv.weight": (32, 32, 1, 1, 1), "encoder.conv_in.weight": (96, 3, 3, 3, 3)},
            "vae",
            "wan2.1-t2v-1.3b",
        ),
        (
            {
                "conv1.weight": (96, 96, 1, 1, 1),
                "encoder.conv1.weight": (160, 12, 3, 3, 3),
                "decoder.conv1.weight": (1024, 48, 3, 3, 3),
            },
            "vae",
            "wan2.2-ti2v-5b",
        ),
        (
            {"shared.weight": (256384, 4096), "encoder.block.0.layer.0.SelfAttention.q.weight": (4096, 4096)},
            "text_encoder",
            "wan2.1-t2v-14b",
        ),
        ({"vision_model.embeddings.class_embedding": (1280,)}, "image_encoder", "wan2.1-i2v-14b-480p"),
        ({"embeddings.class_embedding": (1280,)}, "image_encoder", "wan2.1-i2v-14b-480p"),
        ({"visual.cls_embedding": (1, 1, 1280)}, "image_encoder", "wan2.1-flf2v-14b-720p"),
    ],
)
def test_other_components_are_told_and_are_no_transformers(
    tmp_path: Path, shapes: dict[str, tuple[int, ...]], kind: str, user: str
) -> None:
    path = write_sparse(tmp_path / "model.safetensors", shapes)
    facts = inspect(path)
    candidates = facts["candidates"]
    assert facts["kind"] == kind
    assert isinstance(candidates, list)
    assert user in candidates
    assert not any(name.startswith("tiny") for name in candidates)
    with pytest.raises(ModelError, match=f"this is a {kind}, not a transformer"):
        identify(path)


def test_inspect_tells_what_json_can_hold(tmp_path: Path) -> None:
    facts = json.loads(json.dumps(inspect(write_pipeline(tmp_path, "wan2.2-t2v-a14b"))))
    assert (facts["kind"], facts["variant"], facts["task"]) == ("transformer", "wan2.2-t2v-a14b", "t2v")
    assert (facts["parameters"], facts["layout"], facts["dtype"]) == (14_288_491_584, "diffusers", "bf16")
    assert facts["experts"] == ["transformer", "transformer_2"]
    assert len(facts["files"]) == 2


def test_detection_needs_no_torch() -> None:
    code = "import sys; from longtake.models.wan import detection; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def change_index(root: Path, **changes: object) -> None:
    path = root / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
