"""What loading a text encoder takes, and what decoding in tiles would save and change.

    python benchmarks/encoders.py

Loading: a UMT5 of 238 million random weights, 1024 wide, files in fp32, five shards. Each way of loading it has a
process of its own whose greatest resident size (VmHWM) is read, less its size before, and the share of that which is no
mapped file (RssAnon), sampled. The norm of the difference between the results in bf16 and in fp32, over the norm.
Tiles: `enable_tiling` of AutoencoderKLWan with diffusers' sizes, on `meta` for the published VAEs. In values for the
bundled ones: a moving picture of 512x320 and 17 frames, encoded and decoded, compared with the same without tiles.
"""

import argparse
import math
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.video_processor import VideoProcessor
from torch.nn import functional
from transformers import UMT5Config, UMT5EncoderModel

from longtake.memory_gauge import MemoryGauge
from longtake.models.wan import encoders as real
from longtake.models.wan import tiny
from longtake.models.wan.variants import variant
from longtake.planner import encoders, stages

CPU = torch.device("cpu")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
PUBLISHED = (
    ("wan2.1-i2v-14b-480p", (129, 480, 832)),
    ("wan2.1-i2v-14b-720p", (81, 720, 1280)),
    ("wan2.2-ti2v-5b", (121, 704, 1280)),
)
WAYS: dict[str, Callable[[Path], Any]] = {
    "transformers, fp32": lambda root: _from_pretrained(root, torch.float32),
    "transformers, bf16": lambda root: _from_pretrained(root, torch.bfloat16),
    "longtake": lambda root: real.load_text_encoder(root, CPU).model,
}


def build(root: Path) -> None:
    """A diffusers folder with a text encoder of middle size."""
    config = UMT5Config(vocab_size=32000, d_model=1024, d_kv=64, d_ff=2816, num_layers=16, num_heads=16)
    UMT5EncoderModel(config).save_pretrained(root / "text_encoder", max_shard_size="200MB")
    tiny.build_tokenizer().save_pretrained(root / "tokenizer")


def measure(root: Path, way: str) -> str:
    """A row: MiB of weights, and at the peak of loading them, in this process."""
    gauge, ended, anonymous = MemoryGauge(CPU), threading.Event(), [_anonymous()]

    def sample() -> None:
        while not ended.wait(0.002):
            anonymous.append(_anonymous())

    thread = threading.Thread(target=sample)
    thread.start()
    model = WAYS[way](root)
    ended.set()
    thread.join()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    grown = max(anonymous) - anonymous[0]
    return " | ".join(f"{nbytes / 2**20:.0f}" for nbytes in (weights, gauge.read().device_peak_bytes, grown))


def rounding(root: Path) -> float:
    """Of the encoder's result in bf16, relative to fp32."""
    tokens = torch.randint(3, 32000, (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact, rounded = (
            WAYS[way](root)(tokens, torch.ones_like(tokens)).last_hidden_state.float()
            for way in ("transformers, fp32", "longtake")
        )
    return float((exact - rounded).norm() / exact.norm())


def tiled_peak(name: str, bucket: tuple[int, int, int]) -> int:
    """Bytes at the peak of decoding in tiles, on CUDA as planned."""
    vae, (frames, height, width) = encoders.vae(variant(name)), bucket
    rows, columns = (side // vae.config.scale_factor_spatial for side in (height, width))
    latents = torch.empty(1, vae.config.z_dim, 1 + (frames - 1) // 4, rows, columns, device="meta")
    vae.enable_tiling()
    try:
        return max(
            stages._bytes_over_time(
                vae, lambda: VideoProcessor().postprocess_video(real.decode_latents(vae, latents), "pt"), "cuda"
            )
        )
    finally:
        vae.use_tiling = False


def seams(name: str) -> tuple[float, float]:
    """(PSNR in dB, greatest difference of values in [-1, 1]) of decoding in tiles against decoding at once."""
    vae, generator = real.load_vae(tiny.bundled(name), CPU), torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 5, 10, 16, generator=generator) * 2 - 1
    video = functional.interpolate(coarse, size=(17, 320, 512), mode="trilinear")
    latents = real.encode_video(vae, video)
    whole = real.decode_latents(vae, latents)
    vae.enable_tiling()
    difference = real.decode_latents(vae, latents) - whole
    return 10 * math.log10(4 / float(difference.square().mean())), float(difference.abs().max())


def _from_pretrained(root: Path, dtype: torch.dtype) -> UMT5EncoderModel:
    return UMT5EncoderModel.from_pretrained(str(root / "text_encoder"), dtype=dtype, local_files_only=True)


def _anonymous() -> int:
    found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def main() -> None:
    """The tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    if chosen := parser.parse_args().measure:
        print(measure(Path(chosen[0]), chosen[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder))
        print("| loaded by | weights, MiB | resident at the peak | of it anonymous |\n|---|--:|--:|--:|")
        for way in WAYS:
            command = [sys.executable, __file__, "--measure", folder, way]
            row = subprocess.run(command, env=os.environ | ENVIRONMENT, check=True, text=True, stdout=subprocess.PIPE)
            print(f"| {way} | {row.stdout.strip()} |")
        print(f"bf16 against fp32: {100 * rounding(Path(folder)):.1f} %\n")
    print("| VAE of | decoding | GiB | in tiles |\n|---|---|--:|--:|")
    for name, (frames, height, width) in PUBLISHED:
        bucket = (frames, height, width)
        peaks = (stages.vae_decode_peak(variant(name), bucket).peak_bytes, tiled_peak(name, bucket))
        print(f"| {name} | {width}x{height}x{frames} | {' | '.join(f'{peak / 2**30:.2f}' for peak in peaks)} |")
    for name in ("tiny-t2v", "tiny-ti2v"):
        psnr, greatest = seams(name)
        print(f"{name} in tiles: {psnr:.1f} dB, greatest difference {greatest:.2f}")


if __name__ == "__main__":
    main()
