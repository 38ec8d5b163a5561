"""The two spellings of the transformer's names."""

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

from longtake.errors import ModelError
from longtake.models.wan.keys import to_diffusers, to_original
from longtake.models.wan.variants import VARIANTS, WanVariant


def diffusers_shapes(variant: WanVariant) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = WanTransformer3DModel(**variant.transformer_config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=list(VARIANTS))
def test_the_variants_shapes_and_counts_are_those_of_diffusers_class(variant: WanVariant) -> None:
    shapes = diffusers_shapes(variant)
    assert variant.parameter_shapes() == shapes
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    assert sum(sizes.values()) == variant.parameters
    assert sum(size for name, size in sizes.items() if name.startswith("blocks.0.")) == variant.block_parameters


@pytest.mark.parametrize("name", ["tiny-t2v", "tiny-i2v", "tiny-flf2v", "tiny-ti2v"])
def test_the_two_directions_are_inverse_for_parameters_and_for_modules(name: str) -> None:
    names = list(VARIANTS[name].parameter_shapes())
    names += [name.rpartition(".")[0] for name in names if name.endswith(".weight")]
    originals = [to_original(name) for name in names]
    assert len(set(originals)) == len(set(names))
    assert [to_diffusers(original) for original in originals] == names


def test_the_names_are_those_that_diffusers_converter_makes_but_for_emb_pos() -> None:
    names = [to_original(name) for name in VARIANTS["tiny-flf2v"].parameter_shapes()]
    assert "img_emb.emb_pos" in names
    names.remove("img_emb.emb_pos")
    for name in names:
        assert list(convert_wan_transformer_to_diffusers({name: torch.zeros(2)})) == [to_diffusers(name)]


@pytest.mark.parametrize(
    ("original", "diffusers"),
    [
        ("blocks.11.self_attn.q.weight", "blocks.11.attn1.to_q.weight"),
        ("blocks.0.cross_attn.o.bias", "blocks.0.attn2.to_out.0.bias"),
        ("blocks.0.cross_attn.k_img", "blocks.0.attn2.add_k_proj"),
        ("blocks.0.cross_attn.norm_k_img.weight", "blocks.0.attn2.norm_added_k.weight"),
        ("blocks.3.norm3.weight", "blocks.3.norm2.weight"),
        ("blocks.3.modulation", "blocks.3.scale_shift_table"),
        ("blocks.3.ffn.2.lora_A.weight", "blocks.3.ffn.net.2.lora_A.weight"),
        ("head.modulation", "scale_shift_table"),
        ("head.head.weight", "proj_out.weight"),
        ("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"),
        ("img_emb.proj.1.weight", "condition_embedder.image_embedder.ff.net.0.proj.weight"),
        ("time_projection.1.bias", "condition_embedder.time_proj.bias"),
    ],
)
def test_names_that_are_easily_mixed_up(original: str, diffusers: str) -> None:
    assert to_diffusers(original) == diffusers
    assert to_original(diffusers) == original


@pytest.mark.parametrize("name", ["", "blocks", "blocks.0.attn1.to_q.weight", "blocks.x.ffn.0", "double_blocks.0.q"])
def test_a_name_that_the_layout_has_not_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match="original layout"):
        to_diffusers(name)
