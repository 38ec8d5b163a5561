from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from longtake.planner.operators import operators_of


def test_torchs_functions_are_put_back_after_an_error() -> None:
    names = ("linear", "conv3d", "rms_norm", "scaled_dot_product_attention")
    before = [getattr(functional, name) for name in names]
    context = operators_of("cuda")
    context.__enter__()
    assert [getattr(functional, name) for name in names] != before
    context.__exit__(ValueError, ValueError("an error inside"), None)
    assert [getattr(functional, name) for name in names] == before


def test_meta_linear_is_cast_where_the_cpus_autocast_is_on_and_only_there() -> None:
    rows, weight = torch.empty(2, 4, device="meta"), torch.empty(3, 4, device="meta")
    with operators_of("cuda"):
        assert functional.linear(rows, weight).dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            assert functional.linear(rows, weight).dtype == torch.bfloat16


def test_a_mode_can_replace_attention_as_it_can_torchs_own() -> None:
    class Replacing(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is functional.scaled_dot_product_attention:
                return "replaced"
            return func(*args, **(kwargs or {}))

    rows = torch.empty(1, 2, 8, 16, dtype=torch.bfloat16, device="meta")
    keywords = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None}
    with operators_of("cuda"):
        assert isinstance(functional.scaled_dot_product_attention(rows, rows, rows, **keywords), Tensor)
        with Replacing():
            assert functional.scaled_dot_product_attention(rows, rows, rows, **keywords) == "replaced"


def test_the_norm_is_one_operator_unless_asked_otherwise() -> None:
    before = functional.rms_norm
    with operators_of("cuda", fused_rms_norm=False):
        assert functional.rms_norm is before
