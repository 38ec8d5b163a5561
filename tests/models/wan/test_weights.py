"""Loading and saving of the transformer: equal to diffusers' own, streamed, and refused where it cannot work."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file
from torch import Tensor

from checkpoints import original_shapes, write_sparse
from longtake.errors import ModelError
from longtake.models.wan.keys import to_original
from longtake.models.wan.variants import KEEP_FP32, variant
from longtake.models.wan.weights import Loading, ModelFiles, load_transformer, save_transformer, weight_files

CPU = torch.device("cpu")
NAMES = ("tiny-t2v", "tiny-i2v", "tiny-flf2v", "tiny-ti2v")
every_variant = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def random_transformer() -> Callable[[str], WanTransformer3DModel]:
    """Diffusers' class with every parameter random, those that start as zeros or ones too; made once a variant."""
    made: dict[str, WanTransformer3DModel] = {}

    def make(name: str) -> WanTransformer3DModel:
        if name not in made:
            torch.manual_seed(NAMES.index(name))
            made[name] = WanTransformer3DModel(**variant(name).transformer_config).eval()
            for parameter in made[name].parameters():
                torch.nn.init.normal_(parameter, std=0.1)
        return made[name]

    return make


def write_original(path: Path, model: WanTransformer3DModel, prefix: str = "", shards: int = 1) -> Path:
    state = {prefix + to_original(name): tensor for name, tensor in model.state_dict().items()}
    if shards == 1:
        save_file(state, path / "model.safetensors")
        return path / "model.safetensors"
    names = list(state)
    for shard in range(shards):
        part = {name: state[name] for name in names[shard::shards]}
        save_file(part, path / f"diffusion_pytorch_model-{shard + 1:05}-of-{shards:05}.safetensors")
    return path


def velocity(model: WanTransformer3DModel, name: str) -> Tensor:
    """Of two clips of 3 x 4 x 4 latents, with the inputs that the variant has; one timestep a token for ti2v."""
    config, spec = variant(name).transformer_config, variant(name).spec
    draw = torch.Generator().manual_seed(1)
    dtype = model.proj_out.weight.dtype
    latents = torch.randn(2, config["in_channels"], 3, 4, 4, generator=draw).to(dtype)
    text = torch.randn(2, 512, spec.text_dim, generator=draw).to(dtype)
    timestep = torch.tensor([[0.0] * 4 + [500.0] * 8, [0.0] * 4 + [20.0] * 8]) if spec.expand_timesteps else None
    image = torch.randn(2, spec.image_tokens, spec.image_dim, generator=draw).to(dtype) if spec.image_tokens else None
    if spec.task == "flf2v" and image is not None:
        image = image.reshape(4, spec.image_tokens // 2, spec.image_dim)
    with torch.no_grad():
        moments = timestep if timestep is not None else torch.tensor([900.0, 20.0])
        return model(latents, moments, text, image, return_dict=False)[0]


def load(path: Path, name: str, dtype: torch.dtype = torch.float32) -> WanTransformer3DModel:
    return load_transformer(ModelFiles(variant(name), {"transformer": path}, None), "transformer", dtype, CPU)


@every_variant
@pytest.mark.parametrize(("prefix", "shards"), [("", 1), ("", 3), ("model.diffusion_model.", 1)])
def test_the_velocity_of_an_original_file_is_bitwise_that_of_diffusers(
    tmp_path: Path, random_transformer: Callable[[str], WanTransformer3DModel], name: str, prefix: str, shards: int
) -> None:
    model = random_transformer(name)
    loaded = load(write_original(tmp_path, model, prefix, shards), name)
    assert type(loaded) is WanTransformer3DModel
    assert torch.equal(velocity(loaded, name), velocity(model, name))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_variant
def test_in_half_precision_it_is_bitwise_what_from_pretrained_gives(
    tmp_path: Path, random_transformer: Callable[[str], WanTransformer3DModel], name: str, dtype: torch.dtype
) -> None:
    model = random_transformer(name)
    model.save_pretrained(tmp_path / "transformer", max_shard_size="4MB")
    theirs = WanTransformer3DModel.from_pretrained(tmp_path / "transformer", torch_dtype=dtype)
    (tmp_path / "original").mkdir()
    for path in (tmp_path / "transformer", write_original(tmp_path / "original", model)):
        ours = load(path, name, dtype)
        expected = theirs.state_dict()
        for key, tensor in ours.state_dict().items():
            assert tensor.dtype == expected[key].dtype == (torch.float32 if is_kept(key) else dtype), key
            assert torch.equal(tensor, expected[key]), key
        for (key, tensor), (_, other) in zip(ours.named_buffers(), theirs.named_buffers(), strict=True):
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, other), key
        assert torch.equal(velocity(ours, name), velocity(theirs.eval(), name))


def is_kept(key: str) -> bool:
    return any(part in KEEP_FP32 for part in key.split("."))


def test_the_loaded_weights_are_frozen_and_nothing_is_left_on_meta(
    tmp_path: Path, random_transformer: Callable[[str], WanTransformer3DModel]
) -> None:
    loaded = load(write_original(tmp_path, random_transformer("tiny-t2v")), "tiny-t2v")
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert {tensor.device.type for tensor in (*loaded.parameters(), *loaded.buffers())} == {"cpu"}


def test_a_tensor_larger_than_the_staging_buffer_is_converted_whole(
    tmp_path: Path, random_transformer: Callable[[str], WanTransformer3DModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_transformer("tiny-t2v")
    path = write_original(tmp_path, model)
    monkeypatch.setattr("longtake.models.weight_files.STAGING_BYTES", 1000)
    loaded = load(path, "tiny-t2v", torch.bfloat16)
    assert torch.equal(loaded.proj_out.weight, model.proj_out.weight.bfloat16())


def test_plain_fp8_is_read(tmp_path: Path, random_transformer: Callable[[str], WanTransformer3DModel]) -> None:
    model = random_transformer("tiny-t2v")
    state = {to_original(name): tensor.to(torch.float8_e4m3fn) for name, tensor in model.state_dict().items()}
    save_file(state, tmp_path / "plain.safetensors")
    loaded = load(tmp_path / "plain.safetensors", "tiny-t2v", torch.bfloat16)
    assert torch.equal(loaded.proj_out.weight, model.proj_out.weight.to(torch.float8_e4m3fn).bfloat16())


@pytest.mark.parametrize(("prefix", "shards"), [("", 1), ("", 3), ("model.diffusion_model.", 1)])
@every_variant
def test_a_parameters_bytes_lie_in_the_file_where_it_is_said(
    tmp_path: Path, random_transformer: Callable[[str], WanTransformer3DModel], name: str, prefix: str, shards: int
) -> None:
    model = random_transformer(name)
    path = write_original(tmp_path, model, prefix, shards)
    found = weight_files(ModelFiles(variant(name), {"transformer": path}, None), "transformer")
    assert found.keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        place = found[key]
        with place.path.open("rb") as file:
            file.seek(place.start)
            values = torch.frombuffer(bytearray(file.read(place.nbytes)), dtype=place.dtype)
        assert torch.equal(values.view(tensor.shape), tensor), key


def test_parameters_are_read_where_they_belong_or_not_at_all(
    tmp_path: Path, random_transformer: Callable[[str], WanTransformer3DModel]
) -> None:
    model, converted = random_transformer("tiny-t2v"), []
    files = ModelFiles(variant("tiny-t2v"), {"transformer": write_original(tmp_path, model)}, None)

    def convert(name: str, tensor: Tensor) -> Tensor:
        converted.append(name)
        assert tensor.device == CPU
        return -tensor if name.endswith("to_q.weight") else tensor

    loading = Loading(lambda name: None if name.startswith("blocks.2.") else CPU, convert)
    loaded = load_transformer(files, "transformer", torch.bfloat16, CPU, loading).state_dict()
    for key, tensor in model.state_dict().items():
        dtype = torch.float32 if is_kept(key) else torch.bfloat16
        assert (loaded[key].is_meta, loaded[key].dtype) == (key.startswith("blocks.2."), dtype), key
        assert loaded[key].shape == tensor.shape
        expected = -tensor.to(dtype) if key.endswith("to_q.weight") else tensor.to(dtype)
        assert loaded[key].is_meta or torch.equal(loaded[key], expected)
    assert set(converted) == {key for key in loaded if not loaded[key].is_meta}


def test_integers_in_place_of_weights_are_refused(tmp_path: Path) -> None:
    path = write_sparse(tmp_path / "model.safetensors", original_shapes("tiny-t2v"), "I8")
    with pytest.raises(ModelError, match="of type I8"):
        load(path, "tiny-t2v")


def test_a_file_of_another_variant_lists_what_differs(
    tmp_path: Path, random_transformer: Callable[[str], WanTransformer3DModel]
) -> None:
    path = write_original(tmp_path, random_transformer("tiny-i2v"))
    with pytest.raises(ModelError) as refused:
        load(path, "tiny-t2v")
    superfluous, misshapen = map(str, refused.value.problems)
    extra = variant("tiny-i2v").parameter_shapes().keys() - variant("tiny-t2v").parameter_shapes().keys()
    assert f"{len(extra)} tensors are not this transformer's" in superfluous
    assert "patch_embedding.weight [160, 36, 1, 2, 2] instead of [160, 16, 1, 2, 2]" in misshapen


def test_a_folders_config_must_agree_with_the_weights(
    tmp_path: Path, random_transformer: Callable[[str], WanTransformer3DModel]
) -> None:
    random_transformer("tiny-t2v").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"eps": 1e-5}))
    assert load(tmp_path, "tiny-t2v").config.eps == 1e-5
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_attention_heads": 10, "attention_head_dim": 16}))
    with pytest.raises(ModelError, match="num_attention_heads = 10, attention_head_dim = 16 does not agree"):
        load(tmp_path, "tiny-t2v")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        load(tmp_path, "tiny-t2v")


@pytest.mark.parametrize("layout", ["diffusers", "original"])
@every_variant
def test_what_is_saved_loads_bitwise_and_replaces_what_was_there(
    tmp_path: Path, random_transformer: Callable[[str], WanTransformer3DModel], name: str, layout: str
) -> None:
    model = random_transformer(name)
    path = tmp_path / ("transformer" if layout == "diffusers" else "merged.safetensors")
    for _ in range(2):
        save_transformer(model, path, layout)  # type: ignore[arg-type]
    loaded = load(path, name)
    assert all(torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in model.state_dict().items())
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


def test_saving_over_a_folder_that_is_no_transformer_is_refused(
    tmp_path: Path, random_transformer: Callable[[str], WanTransformer3DModel]
) -> None:
    (tmp_path / "keep.txt").write_text("mine")
    with pytest.raises(ModelError, match="no transformer"):
        save_transformer(random_transformer("tiny-t2v"), tmp_path, "diffusers")
    assert (tmp_path / "keep.txt").read_text() == "mine"


BEYOND_FOUR = re.compile(r"blocks\.(?:[4-9]|\d\d)\.")
CHILD = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
from longtake.memory.flattened import inner_tensors
from longtake.models.wan import weights
from longtake.models.wan.variants import VARIANTS, variant

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

real = variant("wan2.1-t2v-1.3b")
shallow = replace(real, name="shallow", transformer_config=real.transformer_config | {"num_layers": 4})
VARIANTS["shallow"] = shallow
files = weights.ModelFiles(shallow, {"transformer": Path(sys.argv[1])}, None)
loading = weights.ALL_AS_THEY_ARE
if sys.argv[2] != "none":
    import torchao.quantization
    from longtake.memory.quantization import quantizable, quantize
    def convert(name, tensor):
        return quantize(tensor, sys.argv[2]) if quantizable(name, tensor, real.spec) else tensor
    loading = weights.Loading(convert=convert)
before = peak()
model = weights.load_transformer(files, "transformer", torch.bfloat16, torch.device("cpu"), loading)
final = sum(inner.nbytes for parameter in model.parameters() for inner in inner_tensors(parameter))
print(final, peak() - before - final)
"""


@pytest.mark.parametrize(("dtype", "kind"), [("BF16", "none"), ("F32", "none"), ("BF16", "int8"), ("F8_E4M3", "none")])
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_host_memory_beyond_the_final_weights_stays_small(tmp_path: Path, dtype: str, kind: str) -> None:
    whole = original_shapes("wan2.1-t2v-1.3b")
    shapes = {name: shape for name, shape in whole.items() if not BEYOND_FOUR.match(name)}
    matrices = [name for name, shape in shapes.items() if dtype == "F8_E4M3" and len(shape) == 2]
    scales = {name.removesuffix("weight") + "scale_weight": () for name in matrices if name.endswith(".weight")}
    path = write_sparse(tmp_path / "model.safetensors", shapes | scales, dtype, **dict.fromkeys(scales, "F32"))
    # parts of many sizes are made and freed: without holes in the heap the number is that of what is alive
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", CHILD, str(path), kind]
    child = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    final, extra = map(int, child.stdout.split())
    assert final > (400e6 if kind == "none" else 200e6)
    assert extra < 100 * 2**20
