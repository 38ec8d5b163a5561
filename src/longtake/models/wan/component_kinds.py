"""Which component around the transformer tensors are: VAE, UMT5 or CLIP, of which variants. Needs no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from longtake.models.wan.headers import TensorHeader
from longtake.models.wan.variants import VARIANTS

ComponentKind = Literal["vae", "text_encoder", "image_encoder"]
ComponentNames = Literal["diffusers", "original", "open_clip"]

TOKENIZER = "spiece_model"
"""The tensor in which ComfyUI's files of UMT5 have SentencePiece's model, its bytes as uint8."""

_PREFIXES = ("", "model.", "vision_model.")
# Kind, whose names, and some that are all there; the first is the tensor whose shape tells the generation.
_COMPONENTS: tuple[tuple[ComponentKind, ComponentNames, tuple[str, ...]], ...] = (
    ("vae", "diffusers", ("quant_conv.weight", "encoder.conv_in.weight")),
    ("vae", "original", ("conv1.weight", "encoder.conv1.weight", "decoder.conv1.weight")),
    ("text_encoder", "diffusers", ("shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight")),
    (
        "text_encoder",
        "diffusers",
        ("encoder.embed_tokens.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"),
    ),
    ("text_encoder", "original", ("token_embedding.weight", "blocks.0.attn.q.weight")),
    ("image_encoder", "diffusers", ("embeddings.class_embedding",)),
    ("image_encoder", "original", ("visual.cls_embedding",)),
    ("image_encoder", "open_clip", ("visual.class_embedding", "visual.transformer.resblocks.0.ln_1.weight")),
)
_VAE_WIDTHS = ((96,), (160,))
# T5 has its first block's bias alone, UMT5 has one in each
_SECOND_BLOCK = (
    ("encoder.block.1.layer.0.SelfAttention.q.weight", "blocks.1.attn.q.weight"),
    (
        "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight",
        "blocks.1.pos_embedding.embedding.weight",
    ),
)


@dataclass(frozen=True)
class FoundComponent:
    """`tensors` are the component's own, by the `names` of that layout without `prefix`; `users` are variants."""

    kind: ComponentKind
    names: ComponentNames
    prefix: str
    tensors: dict[str, TensorHeader]
    users: tuple[str, ...]


def find_component(tensors: Mapping[str, TensorHeader]) -> FoundComponent | None:
    """What component the tensors of a file are; None where they are none, and no users where it is not one of Wan's."""
    for prefix in _PREFIXES:
        for kind, names, told_by in _COMPONENTS:
            if all(prefix + name in tensors for name in told_by):
                body = {name.removeprefix(prefix): held for name, held in tensors.items() if name.startswith(prefix)}
                own = {name: held for name, held in body.items() if _is_own(kind, names, name)}
                return FoundComponent(kind, names, prefix, own, _users(kind, told_by, own))
    return None


def _is_own(kind: ComponentKind, names: ComponentNames, name: str) -> bool:
    """The text half of the original CLIP and the tokenizer are not."""
    visual = kind != "image_encoder" or names == "diffusers" or name.startswith("visual.")
    return visual and name != TOKENIZER


def _users(kind: ComponentKind, told_by: Sequence[str], tensors: Mapping[str, TensorHeader]) -> tuple[str, ...]:
    """The variants whose VAE, text or image encoder has these sizes."""
    shape = tensors[told_by[0]].shape
    if kind == "vae":
        full = tensors[told_by[1]].shape[:1] in _VAE_WIDTHS
        wanted = [item for item in VARIANTS.values() if (2 * item.spec.latent_channels,) == shape[:1]]
        return tuple(item.name for item in wanted if bool(item.hub_id) == full)
    if kind == "text_encoder":
        if len(shape) != 2:
            return ()
        second, biases = (any(name in tensors for name in names) for names in _SECOND_BLOCK)
        if second and not biases:
            return ()
        return tuple(item.name for item in VARIANTS.values() if (item.spec.text_dim,) == shape[-1:])
    return tuple(item.name for item in VARIANTS.values() if (item.spec.image_dim,) == shape[-1:])
