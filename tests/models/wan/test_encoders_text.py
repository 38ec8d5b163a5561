"""The text encoder's type and how it comes into memory."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file, save_file
from transformers import UMT5Config, UMT5EncoderModel

from longtake.errors import ModelError
from longtake.models.wan import encoders

CAPTION = "A grey rabbit &amp;  a squirrel\n jump"


@pytest.fixture(scope="module")
def root(tiny_root: Callable[[str], Path]) -> Path:
    return tiny_root("tiny-i2v")


def _large(folder: Path, root: Path, dtype: torch.dtype = torch.float32, said: bool = True) -> Path:
    """A diffusers folder whose UMT5 is 1024 wide, with random weights in `dtype`; `said` in its config or not."""
    torch.manual_seed(0)
    config = UMT5Config(vocab_size=259, d_model=1024, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
    UMT5EncoderModel(config).to(dtype).save_pretrained(folder / "text_encoder")
    if not said:
        path = folder / "text_encoder" / "config.json"
        table = json.loads(path.read_text())
        path.write_text(json.dumps({name: value for name, value in table.items() if "dtype" not in name}))
    shutil.copytree(root / "tokenizer", folder / "tokenizer")
    return folder


@pytest.mark.parametrize("said", [True, False])
def test_a_large_text_encoder_in_fp32_files_computes_in_bf16_as_diffusers_examples_do(
    said: bool, root: Path, tmp_path: Path
) -> None:
    folder = _large(tmp_path, root, said=said)
    assert encoders.text_encoder_types(folder) == (torch.float32, torch.bfloat16)
    ours = encoders.load_text_encoder(folder, "cpu")
    theirs = UMT5EncoderModel.from_pretrained(str(folder / "text_encoder"), dtype=torch.bfloat16)
    pipeline = WanPipeline.from_pretrained(str(root), text_encoder=theirs)
    with torch.no_grad():
        expected, _ = pipeline.encode_prompt(CAPTION, do_classifier_free_guidance=False, max_sequence_length=512)
    embeds = encoders.encode_prompt(ours, CAPTION)
    assert embeds.dtype == torch.bfloat16
    assert torch.equal(embeds, expected[0, : len(embeds)])


@pytest.mark.parametrize("said", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_large_one_in_16_bits_keeps_its_type_and_transformers_exceptions(
    dtype: torch.dtype, said: bool, root: Path, tmp_path: Path
) -> None:
    folder = _large(tmp_path, root, dtype, said)
    assert encoders.text_encoder_types(folder) == (dtype, dtype)
    ours = encoders.load_text_encoder(folder, "cpu").model
    theirs = UMT5EncoderModel.from_pretrained(str(folder / "text_encoder"), dtype="auto").state_dict()
    assert ours.state_dict().keys() == theirs.keys()
    for name, value in ours.state_dict().items():
        assert value.dtype == theirs[name].dtype
        assert torch.equal(value, theirs[name])


def test_the_tiny_text_encoder_computes_in_its_files_fp32(root: Path) -> None:
    assert encoders.text_encoder_types(root) == (torch.float32, torch.float32)
    text_encoder = encoders.load_text_encoder(root, "cpu")
    assert text_encoder.model.dtype == torch.float32
    assert text_encoder.model.shared.weight is text_encoder.model.encoder.embed_tokens.weight
    assert not text_encoder.model.training
    assert not any(parameter.requires_grad for parameter in text_encoder.model.parameters())


def test_a_text_encoder_in_8_bits_is_refused(root: Path, tmp_path: Path) -> None:
    folder = _large(tmp_path, root, said=False)
    path = folder / "text_encoder" / "model.safetensors"
    save_file({name: value.to(torch.float8_e4m3fn) for name, value in load_file(path).items()}, path, {"format": "pt"})
    with pytest.raises(ModelError, match=r"text_encoder: its type \(F8_E4M3.*fp32, bf16 or fp16"):
        encoders.load_text_encoder(folder, "cpu")


_PEAK = """
import sys
from pathlib import Path
import torch
from longtake.memory_gauge import MemoryGauge
from longtake.models.wan import encoders

root = Path(sys.argv[1])
encoders.load_text_encoder(root / "small", "cpu")  # libraries load their code
gauge = MemoryGauge(torch.device("cpu"))
model = encoders.load_text_encoder(root, "cpu").model
print(gauge.read().device_peak_bytes, sum(parameter.nbytes for parameter in model.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="VmHWM begins anew on Linux alone")
def test_loading_takes_the_final_weights_and_one_staging_buffer(root: Path, tmp_path: Path) -> None:
    """Not the fp32 files beside them, which a mapping of the files would count."""
    shutil.copytree(root, tmp_path / "small")
    with torch.device("meta"):
        config = UMT5Config(vocab_size=259, d_model=1024, d_kv=64, d_ff=4096, num_layers=4, num_heads=16)
        shapes = {name: value.shape for name, value in UMT5EncoderModel(config).state_dict().items()}
    shapes.pop("encoder.embed_tokens.weight")
    (tmp_path / "text_encoder").mkdir()
    config.save_pretrained(tmp_path / "text_encoder")
    weights = tmp_path / "text_encoder" / "model.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, weights, {"format": "pt"})
    shutil.copytree(root / "tokenizer", tmp_path / "tokenizer")
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _PEAK, str(tmp_path)]
    printed = subprocess.run(command, env=environment, check=True, text=True, stdout=subprocess.PIPE).stdout
    peak, nbytes = (int(word) for word in printed.split())
    assert weights.stat().st_size > 2 * nbytes > 256 * 2**20
    assert nbytes < peak < nbytes + 40 * 2**20  # the buffer has 32 MiB, the tokenizer and the module take the rest
