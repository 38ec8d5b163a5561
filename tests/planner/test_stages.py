"""What stages other than training need: the published encoders' sizes, short traces that stand for long ones."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from longtake.config.schema import LoraConfig, MemoryStrategy, TrainingConfig
from longtake.distributed.backend import optimizer_tensors
from longtake.lora import save_adapter, trained_adapter
from longtake.memory_gauge import MemoryGauge
from longtake.models.wan import encoders as real
from longtake.models.wan.conditioning import image_condition
from longtake.models.wan.variants import VARIANTS, variant
from longtake.models.weight_files import STAGING_BYTES
from longtake.planner import encoders, stages
from longtake.planner.encoders import operators_of_encoders
from longtake.planner.ledger import Ledger
from longtake.planner.plans import Bucket, StagePeak
from longtake.planner.stages import (
    SavePeak,
    image_encoder_peak,
    prepare_peaks,
    sampling_peaks,
    save_peak,
    text_encoder_peak,
    vae_decode_peak,
    vae_encode_peak,
)
from longtake.training.optimizer import allocate_states, build_optimizer
from saved import Saved, save

CPU = torch.device("cpu")
GIB = 2**30
SMALL = (17, 64, 96)
I2V, T2V, TI2V = (variant(name) for name in ("wan2.1-i2v-14b-480p", "wan2.1-t2v-14b", "wan2.2-ti2v-5b"))
TINY = [name for name in VARIANTS if name.startswith("tiny")]


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_has_a_plan_for_each_of_its_encoders(name: str) -> None:
    chosen = variant(name)
    image = image_encoder_peak(chosen)
    assert (image is not None) == chosen.has_image_encoder
    found = [vae_encode_peak(chosen, SMALL), vae_decode_peak(chosen, SMALL), text_encoder_peak(chosen)]
    for peak in (*found, *([image] if image else [])):
        assert 0 < peak.weights_bytes < peak.peak_bytes


def test_umt5_takes_10_6_gib_of_weights_and_10_7_at_its_peak() -> None:
    peak = text_encoder_peak(I2V)
    assert peak.weights_bytes / GIB == pytest.approx(10.58, abs=0.005)
    assert peak.peak_bytes / GIB == pytest.approx(10.7, abs=0.05)
    assert text_encoder_peak(TI2V) == peak


@pytest.mark.parametrize("device_type", ["cuda", "cpu"])
@pytest.mark.parametrize("chosen", [T2V, TI2V], ids=lambda chosen: chosen.name)
@pytest.mark.parametrize("frames", [21, 33, 65])
def test_two_short_clips_tell_a_long_ones_peak_exactly(
    chosen: Any, frames: int, device_type: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The published VAEs, a small picture: the size changes no operator."""
    assert_short_traces_tell(chosen, (frames, 64, 96), device_type, monkeypatch)


@pytest.mark.parametrize("frames", [29, 301])
def test_so_they_do_where_the_whole_video_outweighs_the_decoder(frames: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundled VAE is so small that the peak of 301 frames is after the last chunk."""
    bucket = (frames, 32, 32)
    assert_short_traces_tell(variant("tiny-t2v"), bucket, "cuda", monkeypatch)
    activations = vae_decode_peak(variant("tiny-t2v"), (17, 32, 32)).peak_bytes
    video = 4 * 3 * frames * 32 * 32
    assert (vae_decode_peak(variant("tiny-t2v"), bucket).peak_bytes > activations + 1.5 * video) == (frames == 301)


def assert_short_traces_tell(chosen: Any, bucket: Bucket, device_type: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = encoders.vae(chosen)

    def both() -> list[stages.EncoderPeak]:
        encoded = stages._vae_encode_peak.__wrapped__(vae, 0, bucket, device_type)  # past the cache
        return [encoded, stages._vae_decode_peak.__wrapped__(vae, bucket, device_type)]

    told = both()
    monkeypatch.setattr(stages, "_TRACED_CHUNKS", 1000)
    assert told == both()


@pytest.mark.parametrize("chosen", [T2V, TI2V, variant("tiny-flf2v")], ids=lambda chosen: chosen.name)
@pytest.mark.parametrize("peak", [vae_encode_peak, vae_decode_peak])
def test_more_frames_or_pixels_never_need_less(chosen: Any, peak: Any) -> None:
    longer = [peak(chosen, (frames, 64, 96)).peak_bytes for frames in (5, 9, 13, 17, 21, 49, 129)]
    larger = [peak(chosen, (9, height, width)).peak_bytes for height, width in ((64, 96), (64, 128), (96, 128))]
    assert longer == sorted(set(longer))
    assert larger == sorted(set(larger))


def test_a_longer_clip_adds_its_pixels_and_latents_to_the_encoders_peak_and_its_pixels_to_the_decoders() -> None:
    def grows(peak: Any) -> int:
        found = [peak(T2V, (frames, 480, 832)).peak_bytes for frames in (81, 129)]
        return int(found[1] - found[0])

    pixels, latents = 4 * 3 * 48 * 480 * 832, 4 * 16 * 12 * 60 * 104
    assert grows(vae_encode_peak) == pixels + 2 * latents, "mean and logarithm of the variance"
    assert grows(vae_decode_peak) == pixels + 3 * latents, "as they came, scaled, and after the first convolution"


def test_images_are_held_beside_the_video_that_they_stand_in() -> None:
    bucket, image = (17, 480, 832), 4 * 3 * 480 * 832
    alone = vae_encode_peak(T2V, bucket).peak_bytes
    assert vae_encode_peak(I2V, bucket).peak_bytes == alone + image
    assert vae_encode_peak(variant("wan2.1-flf2v-14b-720p"), bucket).peak_bytes == alone + 2 * image


def peak_of_values(model: nn.Module, run: Callable[[], object]) -> int:
    """Of a real computation on the CPU, as the plan counts."""
    ledger = Ledger("cpu")
    ledger.hold("weights", [*model.parameters(), *model.buffers()])
    with torch.no_grad(), operators_of_encoders("cpu"), ledger:
        run()
    return max(nbytes for _, nbytes in ledger.timeline)


@pytest.mark.parametrize("name", ["tiny-t2v", "tiny-ti2v", "tiny-flf2v"])
def test_real_values_take_what_the_plan_says_in_the_vae(name: str, tiny_root: Callable[[str], Path]) -> None:
    chosen, bucket = variant(name), (25, 32, 64)
    vae = real.load_vae(tiny_root(name), CPU)

    def encode() -> object:
        if chosen.spec.task == "flf2v":
            return image_condition(vae, torch.zeros(3, 32, 64), torch.zeros(3, 32, 64), 25)
        return real.encode_video(vae, torch.zeros(1, 3, *bucket))

    def decode() -> object:
        return real.decode_latents(vae, torch.zeros(1, *chosen.spec.latent_shape(*bucket)))

    assert peak_of_values(vae, encode) == vae_encode_peak(chosen, bucket, "cpu").peak_bytes
    decoded = vae_decode_peak(chosen, bucket, "cpu").peak_bytes
    assert peak_of_values(vae, decode) == decoded - 512, "on the CPU the statistics' mean is not copied"


def test_real_values_take_what_the_plan_says_in_umt5_and_clip(tiny_root: Callable[[str], Path]) -> None:
    root, chosen = tiny_root("tiny-i2v"), variant("tiny-i2v")
    text, image = real.load_text_encoder(root, CPU), real.load_image_encoder(root, CPU)
    planned = image_encoder_peak(chosen, "cpu")
    assert planned is not None
    found = peak_of_values(text.model, lambda: real.encode_prompt(text, "a cat"))
    assert found == pytest.approx(text_encoder_peak(chosen, "cpu").peak_bytes, rel=0.01), "the mask is made by parts"
    pixels = torch.zeros(1, 3, 56, 56)
    assert peak_of_values(image.model, lambda: image.model(pixels.clone(), output_hidden_states=True)) == (
        planned.peak_bytes
    )


def test_torchs_functions_are_put_back_after_an_error() -> None:
    names = ("conv2d", "conv3d", "scaled_dot_product_attention")
    before = [getattr(functional, name) for name in names]
    context = operators_of_encoders("cuda")
    context.__enter__()
    assert not set(before) & {getattr(functional, name) for name in names}
    context.__exit__(ValueError, ValueError("an error inside"), None)
    assert [getattr(functional, name) for name in names] == before


def test_prepare_needs_the_worst_of_its_buckets_and_one_encoder_at_a_time() -> None:
    buckets = [(81, 480, 832), (129, 480, 832), (1, 720, 1280)]
    video, images, captions = prepare_peaks(I2V, buckets)
    worst = vae_encode_peak(I2V, buckets[1])
    assert video == StagePeak("prepare", "VAE, encoding, 832x480x129", worst.peak_bytes, worst.weights_bytes)
    assert (images.what, captions.what) == ("CLIP", "UMT5")
    assert captions.device_bytes == text_encoder_peak(I2V).peak_bytes
    assert captions.host_bytes == STAGING_BYTES, "read by parts"
    assert [stage.what for stage in prepare_peaks(T2V, buckets)] == ["VAE, encoding, 832x480x129", "UMT5"]
    assert not any(stage.host_bytes for stage in prepare_peaks(variant("tiny-i2v"), [SMALL], "cpu"))


@pytest.mark.parametrize("chosen", [I2V, T2V, TI2V], ids=lambda chosen: chosen.name)
def test_a_sample_needs_the_decoder_alone_beside_what_training_keeps(chosen: Any) -> None:
    bucket, resident = (81, 704, 1280), 31 * GIB
    (stage,) = sampling_peaks(chosen, bucket, resident)
    decoder = vae_decode_peak(chosen, bucket)
    what = "VAE, decoding, 1280x704x81"
    assert stage == StagePeak("sampling", what, resident + decoder.peak_bytes, decoder.weights_bytes)


def test_saving_adds_the_largest_file_on_the_host_and_on_the_device_what_an_average_displaces() -> None:
    adamw, values = MemoryStrategy(), 1_000_000
    assert save_peak(values, "lora", adamw) == SavePeak(0, 16 * values)
    assert save_peak(values, "full", adamw) == SavePeak(0, 8 * values), "AdamW's states"
    assert save_peak(values, "full", MemoryStrategy(optimizer_offload=True)) == SavePeak(0, 4 * values)
    assert save_peak(values, "full", MemoryStrategy(optimizer="adamw8bit")) == SavePeak(0, 4 * values)
    assert save_peak(values, "full", adamw, average=True).device_bytes == 4 * values
    assert save_peak(values, "full", adamw, device_type="cpu") == SavePeak(0, 0)
    billions = 14_288_491_584
    offloaded = MemoryStrategy(optimizer_offload=True)
    assert save_peak(billions, "full", offloaded).host_bytes == 4 * billions, "a checkpoint is written as a whole"


def adapter() -> dict[str, torch.Tensor]:
    """64 MiB."""
    wide = 2**16
    shapes = {"A": (32, wide), "B": (wide, 32)}
    names = [(block, half) for block in range(4) for half in shapes]
    return {f"blocks.{block}.attn1.to_q.lora_{half}.weight": torch.ones(shapes[half]) for block, half in names}


def test_an_adapters_file_takes_three_times_its_bytes_beside_it(tmp_path: Path) -> None:
    state = adapter()
    values = sum(tensor.numel() for tensor in state.values())
    gauge = MemoryGauge(CPU)
    before = gauge.process.memory_info().rss
    gauge.begin_stage()
    save_adapter(tmp_path / "adapter.safetensors", trained_adapter(state, LoraConfig(), {}), "comfyui")
    planned = save_peak(values, "lora", MemoryStrategy(), device_type="cpu").host_bytes
    assert gauge.stage_peak()[1] - before == pytest.approx(planned - 4 * values, rel=0.02)


def test_a_checkpoint_of_tensors_in_host_memory_copies_none(tmp_path: Path) -> None:
    state = adapter()
    optimizer = {f"{name}/exp_avg": tensor for name, tensor in adapter().items()}
    gauge = MemoryGauge(CPU)
    before = gauge.process.memory_info().rss
    gauge.begin_stage()
    save(tmp_path, Saved(1, state, optimizer), 3)
    assert gauge.stage_peak()[1] - before < 2**21


def test_8_bit_states_are_as_large_as_torchaos() -> None:
    memory = MemoryStrategy(optimizer="adamw8bit")
    parameter = nn.Parameter(torch.zeros(512, 512))
    optimizer = build_optimizer({"weight": parameter}, TrainingConfig(steps=1), memory)
    allocate_states(optimizer)
    real_bytes = sum(tensor.nbytes for tensor in optimizer_tensors(optimizer, {"weight": parameter}).values())
    tables = 2 * 256 * 4  # of the 256 values that a byte stands for
    assert real_bytes == stages._state_bytes(parameter.numel(), memory) + tables + 4
