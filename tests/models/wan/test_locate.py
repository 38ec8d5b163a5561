"""Finding a model: by name, path or hub id, with its components and experts."""

from pathlib import Path

import pytest
import torch

from checkpoints import original_shapes, write_pipeline, write_sparse
from longtake.config.schema import ModelConfig
from longtake.errors import ModelError
from longtake.models.wan.variants import variant
from longtake.models.wan.weights import ModelFiles, load_transformer, locate

CPU = torch.device("cpu")
NAMES = ("tiny-t2v", "tiny-i2v", "tiny-flf2v", "tiny-ti2v", "tiny-t2v-a14b", "tiny-i2v-a14b")
every_variant = pytest.mark.parametrize("name", NAMES)


def no_bundle(name: str) -> Path:
    raise AssertionError(f"{name} is not bundled")


def ignore(line: str) -> None:
    """A report that goes nowhere."""


def test_a_tiny_name_gives_the_bundled_folder(tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    root = write_pipeline(tmp_path, "tiny-i2v")
    files = locate(ModelConfig(name="tiny-i2v"), lambda name: root, ignore)
    assert files == ModelFiles(variant("tiny-i2v"), {"transformer": root / "transformer"}, root)


def test_a_path_of_a_transformer_takes_its_components_from_elsewhere(tmp_path: Path) -> None:
    path = write_sparse(tmp_path / "model.safetensors", original_shapes("wan2.1-t2v-14b"))
    root = tmp_path / "root"
    (root / "vae").mkdir(parents=True)
    config = ModelConfig(path=str(path), name="wan2.1-t2v-14b", components=str(root))
    assert locate(config, no_bundle, ignore) == ModelFiles(variant("wan2.1-t2v-14b"), {"transformer": path}, root)
    alone = ModelConfig(path=str(path), name="wan2.1-t2v-14b")
    assert locate(alone, no_bundle, ignore).root is None


def test_the_components_of_a_tiny_variant_are_bundled(tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    path = write_sparse(tmp_path / "model.safetensors", original_shapes("tiny-t2v"))
    config = ModelConfig(path=str(path), components="tiny-t2v")
    assert locate(config, lambda name: tmp_path, ignore).root == tmp_path


@pytest.mark.parametrize(("expert", "component"), [("high", "transformer"), ("low", "transformer_2")])
def test_the_config_says_which_expert_a_single_file_is(tmp_path: Path, expert: str, component: str) -> None:
    path = write_sparse(tmp_path / "model.safetensors", original_shapes("wan2.2-i2v-a14b"))
    config = ModelConfig.model_validate({"path": str(path), "expert": expert})
    assert locate(config, no_bundle, ignore).transformers == {component: path}
    with pytest.raises(ModelError, match=r"does not tell which.*model\.expert"):
        locate(ModelConfig(path=str(path)), no_bundle, ignore)


def test_a_root_of_two_experts_gives_both(tmp_path: Path) -> None:
    root = write_pipeline(tmp_path, "wan2.2-i2v-a14b")
    files = locate(ModelConfig(path=str(root)), no_bundle, ignore)
    assert files.transformers == {name: root / name for name in ("transformer", "transformer_2")}
    assert files.root == root


def test_loading_an_expert_that_is_not_there_is_refused(tmp_path: Path) -> None:
    files = ModelFiles(variant("wan2.2-i2v-a14b"), {"transformer_2": tmp_path}, None)
    with pytest.raises(ModelError, match="has no transformer here, only transformer_2"):
        load_transformer(files, "transformer", torch.bfloat16, CPU)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"path": "/nowhere/model.safetensors"}, r"model\.path: there is no"),
        ({"name": "wan2.1-t2v"}, r"no model called 'wan2\.1-t2v'.*wan2\.1-t2v-1\.3b"),
        ({"name": "tests/models"}, r"is a path; write it as model\.path"),
        ({"path": "{file}", "components": "nowhere"}, r"model\.components: there is no"),
        ({"path": "{file}", "components": "{folder}"}, r"model\.components: .*has no folder vae"),
        ({"path": "{folder}/weights.pth"}, "pickle"),
    ],
)
def test_a_model_that_cannot_be_found_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, str], message: str
) -> None:
    monkeypatch.chdir(Path(__file__).parents[3])
    file = write_sparse(tmp_path / "model.safetensors", original_shapes("tiny-t2v"))
    (tmp_path / "weights.pth").write_bytes(b"PK\x03\x04" + bytes(100))
    filled = {key: value.format(file=file, folder=tmp_path) for key, value in config.items()}
    with pytest.raises(ModelError, match=message) as refused:
        locate(ModelConfig.model_validate(filled), no_bundle, ignore)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    "name", ["wan2.1-i2v-14b-480p", "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", "wan2.2-t2v-a14b", "someone/finetuned"]
)
def test_names_and_hub_ids_are_found_in_the_hubs_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    held = {"wan2.2-t2v-a14b": "wan2.2-t2v-a14b", "someone/finetuned": "wan2.1-t2v-1.3b"}.get(
        name, "wan2.1-i2v-14b-480p"
    )
    repository = tmp_path / f"models--{(name if '/' in name else variant(name).hub_id).replace('/', '--')}"
    (repository / "snapshots" / "abc" / "vae").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    root = write_pipeline(repository / "snapshots" / "abc", held)
    lines: list[str] = []
    files = locate(ModelConfig(name=name), no_bundle, lines.append)
    assert files == ModelFiles(variant(held), {part: root / part for part in variant(held).spec.experts}, root)
    assert lines == [f"{repository.name.removeprefix('models--').replace('--', '/')}: offline, using the cache"]


@pytest.mark.parametrize(
    ("name", "held"),
    [
        ("Wan-AI/Wan2.1-I2V-14B-480P", "wan2.1-i2v-14b-480p"),
        ("Wan-AI/Wan2.1-FLF2V-14B-720P", "wan2.1-flf2v-14b-720p"),
        ("Wan-AI/Wan2.2-T2V-A14B", "wan2.2-t2v-a14b"),
    ],
)
def test_the_authors_own_releases_are_found_in_the_hubs_cache_with_their_components(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, held: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / f"models--{name.replace('/', '--')}"
    root = repository / "snapshots" / "abc"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    experts = variant(held).spec.experts
    folders = {"transformer": "high_noise_model", "transformer_2": "low_noise_model"} if len(experts) == 2 else {}
    for component in experts:
        write_sparse(root / folders.get(component, "") / "diffusion_pytorch_model.safetensors", original_shapes(held))
    shapes = {"conv1.weight": (32, 32), "encoder.conv1.weight": (96, 3), "decoder.conv1.weight": (384, 16)}
    torch.save({key: torch.zeros(shape) for key, shape in shapes.items()}, root / "Wan2.1_VAE.pth")
    files = locate(ModelConfig(name=name), no_bundle, ignore)
    places = {component: root / folders[component] if folders else root for component in experts}
    assert files == ModelFiles(variant(held), places, root)


def test_two_files_are_the_two_experts_of_a_model(tmp_path: Path) -> None:
    comfyui = original_shapes("wan2.2-t2v-a14b", "model.diffusion_model.")
    high = write_sparse(tmp_path / "one.safetensors", comfyui)
    low = write_sparse(tmp_path / "two.safetensors", original_shapes("wan2.2-t2v-a14b"), "F16")
    files = locate(ModelConfig(path=str(high), low_noise_path=str(low)), no_bundle, ignore)
    assert files == ModelFiles(variant("wan2.2-t2v-a14b"), {"transformer": high, "transformer_2": low}, None)
    other = write_sparse(tmp_path / "three.safetensors", original_shapes("wan2.2-i2v-a14b"))
    with pytest.raises(ModelError, match="the parts do not make one model"):
        locate(ModelConfig(path=str(high), low_noise_path=str(other)), no_bundle, ignore)
    with pytest.raises(ModelError, match=r"there is no .*four\.safetensors") as raised:
        locate(ModelConfig(path=str(high), low_noise_path=str(tmp_path / "four.safetensors")), no_bundle, ignore)
    assert raised.value.problems[0].where == "model.low_noise_path"
    with pytest.raises(ValueError, match="give path, the high-noise transformer's"):
        ModelConfig(name="wan2.2-t2v-a14b", low_noise_path=str(low))
