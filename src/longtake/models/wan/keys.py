"""Names of the transformer's parameters: the original Wan release's on one side, diffusers' on the other."""

import re
from collections.abc import Mapping

from longtake.errors import ModelError, Problem

_TOP = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "head.norm": "norm_out",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
_ATTENTION = {
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "o": "to_out.0",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
    "k_img": "add_k_proj",
    "v_img": "add_v_proj",
    "norm_k_img": "norm_added_k",
}
# The two layouts number the norms differently: the original's third is diffusers' second.
_BLOCK = {
    "modulation": "scale_shift_table",
    "norm1": "norm1",
    "norm2": "norm3",
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    **{f"self_attn.{ours}": f"attn1.{theirs}" for ours, theirs in _ATTENTION.items()},
    **{f"cross_attn.{ours}": f"attn2.{theirs}" for ours, theirs in _ATTENTION.items()},
}
_TOP_BACK = {theirs: ours for ours, theirs in _TOP.items()}
_BLOCK_BACK = {theirs: ours for ours, theirs in _BLOCK.items()}
_IN_BLOCK = re.compile(r"(blocks\.\d+\.)(.+)")


def to_diffusers(name: str) -> str:
    """diffusers' name of the original parameter, or leaf module, `name`; what follows the module is kept.

    Raises ModelError where the original transformer has no such module.
    """
    return _rename(name, _TOP, _BLOCK, "original")


def to_original(name: str) -> str:
    """The original name of diffusers' parameter, or leaf module, `name`: the inverse of `to_diffusers`.

    Raises ModelError where diffusers' transformer has no such module.
    """
    return _rename(name, _TOP_BACK, _BLOCK_BACK, "diffusers")


def _rename(name: str, top: Mapping[str, str], block: Mapping[str, str], layout: str) -> str:
    match = _IN_BLOCK.fullmatch(name)
    prefix, body = (match[1], match[2]) if match else ("", name)
    table = block if match else top
    parts = body.split(".")
    for length in range(len(parts), 0, -1):
        module = ".".join(parts[:length])
        if module in table:
            return prefix + ".".join([table[module], *parts[length:]])
    raise ModelError(Problem(f"the Wan transformer has no {name!r} in the {layout} layout", code="weights-unexpected"))
