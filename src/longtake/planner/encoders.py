"""The encoders around a Wan transformer on `meta`: of the published configurations, or of the tiny ones."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from longtake.models.wan import tiny
from longtake.models.wan.component_configs import CLIP_VIT_H, UMT5_XXL, VAE_2_1, VAE_2_2
from longtake.models.wan.encoders import computing_type
from longtake.models.wan.variants import WanVariant
from longtake.planner.operators import DeviceType

META = torch.device("meta")
_TINY_VOCABULARY = 259
"""Tokens of `tiny.build_tokenizer`: the bytes, and three special ones."""
_LOWER_PRECISION = "Wan-AI/Wan2.2-"
_EFFICIENT = torch.ops.aten._scaled_dot_product_efficient_attention
_FLASH_ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_LEFT_TO_ONEDNN = 20480


def vae(variant: WanVariant) -> AutoencoderKLWan:
    """The VAE, in fp32 as `load_vae` has it."""
    return _vae(variant.vae, bool(variant.hub_id))


def text_encoder(variant: WanVariant) -> UMT5EncoderModel:
    """UMT5 in the type that `load_text_encoder` computes in, which `computing_type` tells from that of the files.

    Wan2.1's are in fp32 (22,723,671,744 bytes in five files, in the repositories of T2V-1.3B and I2V-14B-480P; the
    others' are taken to be the same), Wan2.2's in bf16 (11,361,851,208 bytes in three files, in that of TI2V-5B).
    """
    config = UMT5_XXL if variant.hub_id else {"vocab_size": _TINY_VOCABULARY, **tiny.TEXT_ENCODER}
    stored = torch.bfloat16 if variant.hub_id.startswith(_LOWER_PRECISION) else torch.float32
    return _text_encoder(tuple(config.items()), computing_type(stored, config["d_model"]))


def image_encoder(variant: WanVariant) -> CLIPVisionModel | None:
    """CLIP's vision tower, in fp32 as `load_image_encoder` has it; None where the model has none."""
    return _image_encoder(bool(variant.hub_id)) if variant.has_image_encoder else None


@contextmanager
def operators_of_encoders(device_type: DeviceType) -> Iterator[None]:
    """Inside the context `meta` tensors go through the operators that an encoder's tensors on a device would.

    On CUDA attention is the memory-efficient kernel's, without gradients: FlashAttention takes neither fp32 nor UMT5's
    bias (`use_flash_attention`, aten/src/ATen/native/transformers/cuda/sdp_utils.cpp). cuDNN's convolutions copy an
    input that is not contiguous (`_convolution`, aten/src/ATen/native/Convolution.cpp). On the CPU those of few
    channels are products with their unfolded input, 27 times as large (`slow_conv3d_forward_out_cpu`,
    aten/src/ATen/native/ConvolutionMM3d.cpp).
    """
    on_cuda = device_type == "cuda"
    conv2d, conv3d = functional.conv2d, functional.conv3d

    def own_conv2d(input: Tensor, *rest: Any) -> Tensor:
        return conv2d(input.contiguous() if on_cuda else input, *rest)

    def own_conv3d(input: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        given = input.contiguous() if on_cuda else input
        result = conv3d(given, weight, *rest)
        if not on_cuda and _is_unfolded(input, weight):
            input.new_empty(weight[0].numel() * result[:, 0].numel())
        return result

    def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **keywords: Any) -> Any:
        scale = keywords.get("scale")
        if on_cuda:
            return _EFFICIENT(query, key, value, attn_mask, False, scale=scale)[0]
        return _FLASH_ON_CPU(query, key, value, attn_mask=attn_mask, scale=scale)[0]

    with (
        patch.object(functional, "conv2d", own_conv2d),
        patch.object(functional, "conv3d", own_conv3d),
        patch.object(functional, "scaled_dot_product_attention", attention),
    ):
        yield


def _is_unfolded(input: Tensor, weight: Tensor) -> bool:
    """Where oneDNN does not take an fp32 convolution of one clip (`use_mkldnn`, ATen/native/Convolution.cpp)."""
    return weight[0, 0].numel() > 1 and input.shape[0] == 1 and input[..., 0].numel() <= _LEFT_TO_ONEDNN


@cache
def _vae(generation: str, published: bool) -> AutoencoderKLWan:
    small = tiny.VAE_2_2 if generation == "2.2" else tiny.VAE_2_1
    large = VAE_2_2 if generation == "2.2" else VAE_2_1
    with META:
        return _frozen(AutoencoderKLWan(**(large if published else small)))


@cache
def _text_encoder(config: tuple[tuple[str, Any], ...], dtype: torch.dtype) -> UMT5EncoderModel:
    with META:
        return _frozen(UMT5EncoderModel(UMT5Config(**dict(config))).to(dtype))


@cache
def _image_encoder(published: bool) -> CLIPVisionModel:
    with META:
        return _frozen(CLIPVisionModel(CLIPVisionConfig(**(CLIP_VIT_H if published else tiny.IMAGE_ENCODER))))


def _frozen(model: nn.Module) -> Any:
    return model.eval().requires_grad_(False)
