"""Reducing a rank: no approximation of that rank is nearer."""

import numpy as np
import pytest
import torch

from longtake.config.schema import LoraConfig
from longtake.lora import Adapter, adapter_state, merge, reduced, trained_adapter
from longtake.lora.reduction import truncated

LORA = LoraConfig(rank=8, alpha=6.0, targets=("attention", "ffn"), block_ranks=((1, 1, 3),))


@pytest.fixture
def adapter(trained):
    return trained_adapter(adapter_state(trained("tiny-t2v", LORA)), LORA, {"longtake.model": "tiny-t2v"})


def update(adapter: Adapter, module: str) -> np.ndarray:
    down, up = (adapter.state[f"{module}.{half}.weight"].double().numpy() for half in ("lora_A", "lora_B"))
    return adapter.scales[module] * up @ down


@pytest.mark.parametrize("rank", [1, 4, 7])
def test_the_error_is_the_least_that_numpy_finds(adapter, rank):
    found = reduced(adapter, rank)
    lost = whole = 0.0
    for module in adapter.modules:
        before, after = update(adapter, module), update(found.adapter, module)
        values = np.linalg.svd(before, compute_uv=False)
        least = float((values[rank:] ** 2).sum()) ** 0.5
        error = float(np.linalg.norm(before - after))
        assert error == pytest.approx(least, rel=1e-6, abs=1e-5)  # the factors are rounded to fp32
        assert found.errors[module] == pytest.approx(least / np.linalg.norm(before), rel=1e-6, abs=1e-12)
        lost, whole = lost + least**2, whole + float((before**2).sum())
    assert found.error == pytest.approx((lost / whole) ** 0.5, rel=1e-6)
    assert found.errors[found.worst] == max(found.errors.values())


def test_every_scale_is_1_and_lower_ranks_stay(adapter):
    found = reduced(adapter, 4).adapter
    assert set(found.scales.values()) == {1.0}
    assert {module: found.ranks[module] for module in found.modules} == {
        module: min(4, rank) for module, rank in adapter.ranks.items()
    }
    assert found.metadata == adapter.metadata
    assert {tensor.dtype for tensor in found.state.values()} == {torch.float32}


def test_a_rank_that_suffices_loses_nothing(adapter):
    down, up = (adapter.state[f"blocks.0.ffn.net.2.{half}.weight"] for half in ("lora_A", "lora_B"))
    a, b, values = truncated(torch.cat([down, down]), torch.cat([up, 2 * up], dim=1), 0.5, 8)
    assert (a.shape, b.shape, values.shape) == ((8, 640), (160, 8), (16,))
    torch.testing.assert_close(b @ a, 1.5 * up @ down, rtol=1e-4, atol=1e-5)
    assert values[8:].max() < 1e-10 * values[0]


def test_layers_that_learnt_nothing_have_no_error(adapter):
    silent = {key: torch.zeros_like(value) if "lora_B" in key else value for key, value in adapter.state.items()}
    found = reduced(Adapter(silent, adapter.alphas, {}), 2)
    assert found.error == 0
    assert set(found.errors.values()) == {0.0}
    assert all(value.isfinite().all() for value in found.adapter.state.values())


def test_a_dora_keeps_its_lengths(build, trained):
    lora = LORA.model_copy(update={"dora": True})
    adapter = trained_adapter(adapter_state(trained("tiny-t2v", lora)), lora, {})
    found = reduced(adapter, 2).adapter
    transformer = build("tiny-t2v")
    merge(transformer, found)
    module = "blocks.0.ffn.net.0.proj"
    lengths = adapter.state[f"{module}.lora_magnitude_vector.weight"]
    torch.testing.assert_close(transformer.get_parameter(f"{module}.weight").norm(dim=1), lengths.abs())
