"""What the stages of a run other than training and denoising need: encoding, decoding, saving.

Encoders run on `meta` tensors and every storage that they make is counted: no allocator's slack, no CUDA context, no
workspace of cuDNN's convolutions. How large those are is cuDNN's affair; where one does not fit, PyTorch takes the next
plan for that convolution (`try_configs`, aten/src/ATen/native/cudnn/Conv_v8.cpp), which may be slower. On the CPU
oneDNN's take a few dozen MiB.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from diffusers.video_processor import VideoProcessor
from torch import nn

from longtake.config.schema import MemoryStrategy
from longtake.models.wan.conditioning import image_condition
from longtake.models.wan.encoders import TEXT_TOKENS, decode_latents, encode_video
from longtake.models.wan.variants import WanVariant
from longtake.models.weight_files import STAGING_BYTES
from longtake.planner import encoders
from longtake.planner.encoders import META, operators_of_encoders
from longtake.planner.ledger import Ledger
from longtake.planner.operators import DeviceType
from longtake.planner.plans import Bucket, StagePeak

_TRACED_CHUNKS = 5
"""Chunks of frames that are traced at most: from the third on, each is as the one before but for what was encoded."""
_UMT5 = "UMT5"
_FP32 = 4
_SHARD_BYTES = 10 * 10**9
"""diffusers' `save_pretrained` has files of this size (`max_shard_size`)."""
_BLOCK_8BIT = 256
"""Values that share a scale in torchao's 8-bit states (`OptimState8bit`)."""


@dataclass(frozen=True)
class EncoderPeak:
    """Bytes on the device, each allocation rounded up to 512: of the weights alone, and with them at the peak."""

    name: str
    weights_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class SavePeak:
    """Bytes beyond those that a run holds between two steps, each at its own peak."""

    device_bytes: int
    host_bytes: int


def prepare_peaks(
    variant: WanVariant, buckets: Iterable[Bucket], device_type: DeviceType = "cuda"
) -> tuple[StagePeak, ...]:
    """`longtake prepare`: an encoder after the other, each alone on the device; the VAE with its worst bucket."""
    worst, bucket = max(
        ((vae_encode_peak(variant, each, device_type), each) for each in buckets), key=lambda found: found[0].peak_bytes
    )
    others = [
        found
        for found in (image_encoder_peak(variant, device_type), text_encoder_peak(variant, device_type))
        if found is not None
    ]
    named = [(f"{worst.name}, {_words(bucket)}", worst), *((found.name, found) for found in others)]
    return tuple(_stage_peak("prepare", what, found, device_type) for what, found in named)


def sampling_peaks(
    variant: WanVariant, bucket: Bucket, resident_bytes: int, device_type: DeviceType = "cuda"
) -> tuple[StagePeak, ...]:
    """A sample during training, all but its denoising: decoding beside the `resident_bytes` that training keeps.

    Prompts and images were encoded before the transformer was built (`Validation.prepare`), by the encoders of
    `prepare_peaks`, each alone and with no more work than there: samples are of a bucket's size. Beside the denoising
    there is no encoder; the VAE waits in host memory, and decodes when the pipeline is gone. Left out are prompt
    embeddings and latents, 0.2 GiB at 1280x720x81.
    """
    decoded = vae_decode_peak(variant, bucket, device_type)
    return (_stage_peak("sampling", f"{decoded.name}, {_words(bucket)}", decoded, device_type, resident_bytes),)


def vae_encode_peak(variant: WanVariant, bucket: Bucket, device_type: DeviceType = "cuda") -> EncoderPeak:
    """What `data.encode` does with one clip: the whole video in fp32 on the device, encoded in chunks of 4 frames.

    For i2v and flf2v that is the video of which only images are given (`image_condition`), whose images are held too.
    """
    images = {"i2v": 1, "flf2v": 2}.get(variant.spec.task, 0)
    return _vae_encode_peak(encoders.vae(variant), images, bucket, device_type)


def vae_decode_peak(variant: WanVariant, bucket: Bucket, device_type: DeviceType = "cuda") -> EncoderPeak:
    """What `sampling.sample` does with denoised latents: the video in fp32, decoded in chunks of 4 frames."""
    return _vae_decode_peak(encoders.vae(variant), bucket, device_type)


def text_encoder_peak(variant: WanVariant, device_type: DeviceType = "cuda") -> EncoderPeak:
    """UMT5 with one prompt, padded to 512 tokens."""
    return _text_encoder_peak(encoders.text_encoder(variant), device_type)


def image_encoder_peak(variant: WanVariant, device_type: DeviceType = "cuda") -> EncoderPeak | None:
    """CLIP's vision tower with one image, all hidden states kept; None where the model has none."""
    model = encoders.image_encoder(variant)
    return None if model is None else _image_encoder_peak(model, device_type)


def save_peak(
    trained_values: int,
    method: Literal["lora", "full"],
    memory: MemoryStrategy,
    average: bool = False,
    device_type: DeviceType = "cuda",
) -> SavePeak:
    """What checkpoints while training and the files at its end add; `average` is whether `training.ema` is used.

    Trained values are fp32. A checkpoint's files (trained values, AdamW's states, average) are written one after the
    other, each copied to host memory as a whole; what is there already is not copied. An adapter at the end is copied
    to the host, serialised, cut behind its header and joined to another header: four times its bytes. A transformer
    goes there file by file. An average takes the parameters' place meanwhile, and those are kept on the device.
    """
    trained = _FP32 * trained_values
    on_host = device_type == "cpu"
    states = 0 if memory.optimizer_offload else _state_bytes(trained_values, memory)
    checkpoint = 0 if on_host else max(trained, states)
    exported = 4 * trained if method == "lora" else 0 if on_host else min(trained, _SHARD_BYTES)
    kept = trained if average else 0
    return SavePeak(kept, max(checkpoint, exported))


def _state_bytes(values: int, memory: MemoryStrategy) -> int:
    """Of both moments: fp32, or a byte and a share of a scale; small parameters, which stay fp32, are overlooked."""
    if memory.optimizer == "adamw8bit":
        return 2 * (values + _FP32 * values // _BLOCK_8BIT)
    return 2 * _FP32 * values


# A module stands for its configuration: `encoders` makes one for each, and those of most models are the same.
@cache
def _vae_encode_peak(vae: Any, images: int, bucket: Bucket, device_type: DeviceType) -> EncoderPeak:
    _, height, width = bucket

    def encode(frames: int) -> None:
        if not images:
            encode_video(vae, torch.empty(1, 3, frames, height, width, device=META))
            return
        first, *last = (torch.empty(3, height, width, device=META) for _ in range(images))
        image_condition(vae, first, last[0] if last else None, frames)

    return _vae_peak("VAE, encoding", vae, encode, bucket[0], device_type)


@cache
def _vae_decode_peak(vae: Any, bucket: Bucket, device_type: DeviceType) -> EncoderPeak:
    rows, columns = (side // vae.config.scale_factor_spatial for side in bucket[1:])
    stride, processor = vae.config.scale_factor_temporal, VideoProcessor()

    def decode(frames: int) -> None:
        latents = torch.empty(1, vae.config.z_dim, 1 + (frames - 1) // stride, rows, columns, device=META)
        processor.postprocess_video(decode_latents(vae, latents), "pt")

    return _vae_peak("VAE, decoding", vae, decode, bucket[0], device_type)


@cache
def _text_encoder_peak(model: Any, device_type: DeviceType) -> EncoderPeak:
    def encode() -> None:
        tokens = torch.zeros(1, TEXT_TOKENS, dtype=torch.long, device=META)
        # what transformers makes of a prompt's own mask, whose values it looks at on the way
        mask = torch.ones(1, 1, TEXT_TOKENS, TEXT_TOKENS, dtype=torch.bool, device=META)
        model(tokens, mask)

    return _peak(_UMT5, model, max(_bytes_over_time(model, encode, device_type)))


@cache
def _image_encoder_peak(model: Any, device_type: DeviceType) -> EncoderPeak:
    side = model.config.image_size

    def encode() -> None:
        model(torch.empty(1, 3, side, side, device=META), output_hidden_states=True)

    return _peak("CLIP", model, max(_bytes_over_time(model, encode, device_type)))


def _vae_peak(name: str, vae: Any, run: Callable[[int], None], frames: int, device_type: DeviceType) -> EncoderPeak:
    """`run` works on a clip of so many frames, the first alone and then one chunk after the other.

    From the third chunk on the causal cache is full, and each does what the one before did while the video and what
    has come of it are longer: after each operator the bytes are affine in the number of chunks. So the peak of a long
    clip is that of two short ones, continued operator by operator, as far back from the end as both are in step.
    """
    stride = vae.config.scale_factor_temporal

    def traced(chunks: int) -> list[int]:
        return _bytes_over_time(vae, lambda: run(1 + stride * (chunks - 1)), device_type)

    chunks = 1 + (frames - 1) // stride
    if chunks <= _TRACED_CHUNKS:
        return _peak(name, vae, max(traced(chunks)))
    short, long = traced(_TRACED_CHUNKS - 1), traced(_TRACED_CHUNKS)
    in_step = 2 * (len(long) - len(short))  # two chunks, the second of which begins before the last operators
    pairs = zip(short[-in_step:], long[-in_step:], strict=True)
    return _peak(name, vae, max(late + (chunks - _TRACED_CHUNKS) * (late - early) for early, late in pairs))


def _bytes_over_time(model: nn.Module, run: Callable[[], None], device_type: DeviceType) -> list[int]:
    """On the device after each operator of `run`, the model's own among them."""
    ledger = _holding(model)
    with torch.no_grad(), operators_of_encoders(device_type), ledger:
        run()
    return [nbytes for _, nbytes in ledger.timeline]


def _peak(name: str, model: nn.Module, peak_bytes: int) -> EncoderPeak:
    return EncoderPeak(name, _holding(model).now.total(), peak_bytes)


def _holding(model: nn.Module) -> Ledger:
    ledger = Ledger()
    ledger.hold("weights", [*model.parameters(), *model.buffers()])
    return ledger


def _stage_peak(
    stage: Literal["prepare", "sampling"], what: str, peak: EncoderPeak, device_type: DeviceType, beside_bytes: int = 0
) -> StagePeak:
    """With the host memory through which the weights come to a GPU: UMT5's by parts (`read_weights`), others' whole."""
    through = STAGING_BYTES if peak.name == _UMT5 else peak.weights_bytes
    return StagePeak(stage, what, beside_bytes + peak.peak_bytes, through if device_type == "cuda" else 0)


def _words(bucket: Bucket) -> str:
    frames, height, width = bucket
    return f"{width}x{height}x{frames}"
