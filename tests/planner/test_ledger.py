from typing import Any

import torch
from torch import Tensor

from longtake.planner.ledger import Ledger

META = torch.device("meta")


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def test_the_ledger_counts_rounded_storages_while_they_live_and_views_not_at_all() -> None:
    with Ledger("cpu") as ledger:
        first = torch.zeros(129)
        view = first[1:].view(2, 64)
        del first
        assert +ledger.now == {"block": 1024}
        second = torch.zeros(1)
        ledger.hold("checkpoints", [view])
        assert +ledger.now == {"block": 512, "checkpoints": 1024}
        del view, second
        assert ledger.now.total() == 0
    assert ledger.peak.total() == 1536


def test_views_and_updates_of_a_storage_that_was_never_counted_count_nothing() -> None:
    away = meta(1000)
    with Ledger() as ledger:
        away.view(10, 100)[:5].add_(1)
        torch.ops.aten._unsafe_view(away, [100, 10])  # which does not say that it is a view
    assert ledger.peak.total() == 0


def test_a_remembered_operator_gives_tensors_like_its_own_kernels() -> None:
    def results() -> list[Tensor]:
        rows = meta(2, 6, 4, dtype=torch.bfloat16)
        turned = rows.permute(2, 0, 1).clone()
        made = [rows.transpose(1, 2) + rows.mT, rows.sum(1, dtype=torch.float32), rows.to(torch.float64), turned]
        return [*made, *rows.max(dim=1), rows.mul_(2), *torch._foreach_sqrt([meta(3), meta(4)])]

    with Ledger():
        traced = [results(), results()]
    for found in traced:
        assert [(t.shape, t.stride(), t.dtype) for t in found] == [(t.shape, t.stride(), t.dtype) for t in results()]


def test_numbers_of_different_types_are_different_arguments() -> None:
    whole = meta(3, dtype=torch.int64)
    with Ledger():
        assert [(whole * factor).dtype for factor in (2, 2.0, True)] == [torch.int64, torch.float32, torch.int64]


def test_a_remembered_result_is_new_and_freed_like_the_first() -> None:
    with Ledger() as ledger:
        rows = meta(128)
        for _ in range(3):
            found = rows + 1
            assert ledger.now.total() == 1024
            del found
            assert ledger.now.total() == 512


def test_floating_point_operations_are_torchs_count_each_time() -> None:
    with Ledger() as ledger:
        for _ in range(3):
            meta(2, 3) @ meta(3, 5)
    assert ledger.flops == 3 * 2 * (2 * 3 * 5)
    assert ledger.timeline[-1][0] == ledger.flops


def backward_of_attention(tokens: int, contiguous: bool) -> None:
    shape = (1, tokens, 5, 32)
    operands = [meta(*shape, dtype=torch.bfloat16).transpose(1, 2) for _ in range(5)]
    if not contiguous:
        operands[0] = meta(1, 5, tokens, 32, dtype=torch.bfloat16)
    gradient, query, key, value, out = operands
    no_state, logsumexp = torch.empty(0, dtype=torch.int64, device=META), meta(1, 5, tokens)
    torch.ops.aten._scaled_dot_product_flash_attention_backward(
        gradient, query, key, value, out, logsumexp, None, None, tokens, tokens, 0.0, False, no_state, no_state
    )


def test_attentions_backward_has_fp32_sums_of_rounded_tokens_and_copies_what_is_not_contiguous() -> None:
    found = []
    for contiguous in (True, False):
        with Ledger() as ledger:
            backward_of_attention(200, contiguous)
        found.append(ledger.peak["workspace"])
        assert ledger.now["workspace"] == 0
    sums = 4 * 5 * 256 * 32 + 4 * 5 * 256
    assert found == [sums, sums + 2 * 5 * 200 * 32 // 512 * 512 + 512 * bool(2 * 5 * 200 * 32 % 512)]
    with Ledger(workspaces=False) as ledger:
        backward_of_attention(200, True)
    assert ledger.peak["workspace"] == 0


def test_the_largest_storages_at_the_peak_are_told_with_what_made_them() -> None:
    def run(ledger: Any) -> Any:
        ledger.hold("weights", [weights])
        with ledger:
            product = weights * 2
            product.exp()
            del product
            torch.zeros(10, device=META)
        return ledger

    weights = meta(1000)
    peak = run(Ledger()).peak.total()
    largest = run(Ledger(explain_at=peak)).largest
    assert sum(storage.nbytes for storage in largest) == peak == 3 * 4096
    assert {(storage.kind, storage.operator) for storage in largest} == {
        ("weights", "held"),
        ("block", "mul.Tensor"),
        ("block", "exp.default"),
    }
