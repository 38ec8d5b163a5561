from typing import Any

import torch
from torch import Tensor

from longtake.planner.kernels import kernels_of, workspaces

ATEN = torch.ops.aten
FLASH_ON_CPU = ATEN._scaled_dot_product_flash_attention_for_cpu.default


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def on_cpu(func: Any, *args: Any) -> tuple[int, ...]:
    with kernels_of("cpu"):
        return workspaces(func, args)


def test_a_cpus_attention_packs_keys_and_values_in_half_precision() -> None:
    query, key = meta(2, 4, 1000, 64), meta(2, 4, 500, 64)
    assert on_cpu(FLASH_ON_CPU, query, key, key) == (key.nbytes, key.nbytes)
    assert on_cpu(FLASH_ON_CPU, query, key[:, :, :63], key[:, :, :63]) == ()
    assert on_cpu(FLASH_ON_CPU, query.float(), key.float(), key.float()) == ()


def test_a_cpu_casts_operands_of_two_types_before_it_computes() -> None:
    rows, scale = meta(2, 8, 4), meta(2, 1, 4, dtype=torch.float32)
    assert on_cpu(ATEN.mul.Tensor, rows, scale) == (4 * rows.numel(),)
    assert on_cpu(ATEN.mul.Tensor, rows, rows) == ()
    assert on_cpu(ATEN.mul.Tensor, rows, 2.0) == ()
    assert on_cpu(ATEN.mul.Tensor, rows, torch.tensor(2.0, dtype=torch.float64)) == ()
    assert on_cpu(ATEN._to_copy.default, rows) == ()


def test_a_cpus_product_with_a_long_inner_side_is_summed_in_fp32() -> None:
    long, short, weight = meta(3000, 2048), meta(3000, 512), meta(2048, 1024)
    assert on_cpu(ATEN.mm.default, long, weight) == (4 * 3000 * 512,)
    assert on_cpu(ATEN.addmm.default, meta(1024), long, weight) == (4 * 3000 * 512,)
    assert on_cpu(ATEN.mm.default, short, weight[:512]) == ()
    assert on_cpu(ATEN.mm.default, long.float(), weight.float()) == ()
    assert on_cpu(ATEN.mm.default, meta(2048, 3000).t(), weight) == ()


def test_cuda_has_none_of_them_and_is_meant_where_nothing_else_is_said() -> None:
    rows, scale = meta(2, 8, 4), meta(2, 1, 4, dtype=torch.float32)
    assert workspaces(ATEN.mul.Tensor, (rows, scale)) == ()
    with kernels_of("cuda"):
        assert workspaces(ATEN.mm.default, (meta(3000, 2048), meta(2048, 1024))) == ()
    assert on_cpu(ATEN.mul.Tensor, rows, scale)
    assert workspaces(ATEN.mul.Tensor, (rows, scale)) == ()


def test_flash_attentions_backward_pass_on_cuda_sums_in_fp32() -> None:
    query = meta(1, 100, 2, 64).transpose(1, 2)
    args = (query, query, query, query, query)
    assert workspaces(ATEN._scaled_dot_product_flash_attention_backward.default, args) == (
        4 * 2 * 128 * 64,
        4 * 2 * 128,
    )


def test_8_bit_states_that_no_compiler_fuses_are_written_through_temporaries() -> None:
    from torchao.optim.subclass_8bit import OptimState8bit

    state = OptimState8bit.zeros((64, 256), signed=True, block_size=256, device="meta")
    values = meta(64, 256, dtype=torch.float32)
    assert on_cpu(ATEN.copy_.default, state, values) == (41 * 64 * 256,)
    assert on_cpu(ATEN.copy_.default, values, values) == ()
    assert workspaces(ATEN.copy_.default, (state, values)) == ()
