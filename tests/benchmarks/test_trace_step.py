import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn import functional

from longtake.config.schema import LoraConfig, TrainingConfig
from longtake.models.wan.variants import variant

FRAMES, SIZE, RANK = 81, (160, 96), 8
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "trace_step.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("trace_step", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["trace_step"] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def traced(script: ModuleType) -> Any:
    return script.build(variant("tiny-i2v"), LoraConfig(rank=RANK), TrainingConfig())


def peak_of(script: ModuleType, traced: Any, strategy: str, **choices: bool) -> Any:
    batch = script.meta_batch(traced.spec, FRAMES, SIZE)
    return script.trace(traced, script.STRATEGIES[strategy], batch, **choices)


def test_the_ledger_counts_rounded_storages_while_they_live_and_views_not_at_all(script: ModuleType) -> None:
    with script.Ledger("cpu") as ledger:
        first = torch.zeros(129)
        view = first[1:].view(2, 64)
        del first
        assert ledger.now == {"blocks": 1024}
        second = torch.zeros(1)
        ledger.hold("inputs", [view])
        assert ledger.now == {"blocks": 512, "inputs": 1024}
        del view, second
        assert ledger.now.total() == 0
    assert ledger.peak.total() == 1536


def test_checkpointing_keeps_each_blocks_input_in_bf16_and_one_block(script: ModuleType, traced: Any) -> None:
    plain, checkpointed = (peak_of(script, traced, strategy) for strategy in ("no checkpointing", "per block"))
    tokens, dim, layers = traced.spec.tokens(FRAMES, SIZE[1], SIZE[0]), 5 * 32, 4
    assert checkpointed["inputs"] == layers * -(-tokens * dim * 2 // 512) * 512
    assert 0.2 * plain["blocks"] < checkpointed["blocks"] < 0.4 * plain["blocks"]
    assert checkpointed["weights"] == plain["weights"]


def test_adapters_and_two_moments_are_held_in_fp32(script: ModuleType, traced: Any) -> None:
    peak = peak_of(script, traced, "per block")
    rounded = sum(-(-parameter.nbytes // 512) * 512 for parameter in traced.parameters.values())
    assert all(parameter.dtype == torch.float32 for parameter in traced.parameters.values())
    assert (peak["adapters"], peak["optimizer"]) == (rounded, 2 * rounded)


def test_what_autocast_does_to_rms_norm_changes_nothing_because_norms_are_kept_out_of_it(
    script: ModuleType, traced: Any
) -> None:
    inside, outside = (
        peak_of(script, traced, "no checkpointing", rms_norm_in_fp32=in_fp32)["blocks"] for in_fp32 in (True, False)
    )
    assert inside == outside


def test_a_traced_step_updates_every_adapter_and_leaves_the_model_as_it_was(script: ModuleType, traced: Any) -> None:
    states = [traced.optimizer.state[parameter] for parameter in traced.parameters.values()]
    before = [int(state["step"]) for state in states]
    peak_of(script, traced, "per block")
    assert [int(state["step"]) for state in states] == [step + 1 for step in before]
    assert all(parameter.grad is None for parameter in traced.parameters.values())
    assert "forward" not in vars(traced.transformer)
    assert not any(block._forward_pre_hooks for block in traced.transformer.blocks)


def test_a_step_is_traced_to_the_same_bytes_twice(script: ModuleType, traced: Any) -> None:
    assert peak_of(script, traced, "per block") == peak_of(script, traced, "per block")


def test_torchs_functions_are_put_back_after_an_error(script: ModuleType) -> None:
    names = ("linear", "conv3d", "rms_norm", "scaled_dot_product_attention")
    before = [getattr(functional, name) for name in names]
    context = script.operators_of_cuda(True)
    context.__enter__()
    assert [getattr(functional, name) for name in names] != before
    context.__exit__(ValueError, ValueError("an error inside"), None)
    assert [getattr(functional, name) for name in names] == before


def test_meta_linear_is_cast_where_the_cpus_autocast_is_on_and_only_there(script: ModuleType) -> None:
    rows, weight = torch.empty(2, 4, device="meta"), torch.empty(3, 4, device="meta")
    with script.operators_of_cuda(True):
        assert functional.linear(rows, weight).dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            assert functional.linear(rows, weight).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["tiny-t2v", "tiny-flf2v", "tiny-ti2v"])
def test_every_kind_of_model_can_be_traced(script: ModuleType, name: str) -> None:
    traced = script.build(variant(name), LoraConfig(rank=RANK), TrainingConfig())
    peak = peak_of(script, traced, "per block")
    assert set(peak) >= set(script.KINDS) - {"gradients"}
