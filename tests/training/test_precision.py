"""Mixed precision: what computes in which type, forward and backward, and that nothing of it stays behind."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from longtake.config.schema import LoraConfig, MemoryStrategy, ModelConfig
from longtake.lora import attach
from longtake.memory.strategy import apply
from longtake.models.wan.tiny import bundled
from longtake.models.wan.variants import variant
from longtake.models.wan.weights import load_transformer, locate
from longtake.training.precision import DTYPES, compute_in

CPU = torch.device("cpu")
SPEC = variant("tiny-t2v").spec


@pytest.fixture
def load(tiny_root: Callable[[str], Path]) -> Callable[[torch.dtype], Any]:
    """The tiny transformer with a LoRA that does something, its frozen weights in the type asked for."""

    def transformer(dtype: torch.dtype, dropout: float = 0.0) -> Any:
        files = locate(ModelConfig(path=str(tiny_root("tiny-t2v")), name="tiny-t2v"), bundled, print)
        model = load_transformer(files, "transformer", dtype, CPU)
        attach(model, LoraConfig(rank=2, dropout=dropout), 0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.05)
        return model.train()

    return transformer


def inputs() -> dict[str, torch.Tensor]:
    """One sample."""
    return {
        "hidden_states": torch.randn(1, 16, 2, 4, 4),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 512, 64),
    }


def compute_types(model: Any, suffix: str) -> set[torch.dtype]:
    """Types that the outputs of the modules of that name have in one forward pass under bf16."""
    seen: set[torch.dtype] = set()
    chosen = [module for name, module in model.named_modules() if name.endswith(suffix)]
    hooks = [module.register_forward_hook(lambda _m, _i, output: seen.add(output.dtype)) for module in chosen]
    with compute_in(model, SPEC, "bf16", CPU):
        model(**inputs())
    for hook in hooks:
        hook.remove()
    return seen


def test_matrices_compute_in_bf16_and_islands_in_fp32(load: Any) -> None:
    model = load(torch.bfloat16)
    assert compute_types(model, "to_q.base_layer") == {torch.bfloat16}
    assert compute_types(model, "to_q.lora_A.default") == {torch.bfloat16}
    assert compute_types(model, "time_embedder.linear_1") == {torch.float32}


def test_a_thousand_timesteps_stay_a_thousand(load: Any) -> None:
    """In bf16 they would be 294."""
    model = load(torch.bfloat16)
    embedder = model.condition_embedder
    embedded = []
    hook = embedder.time_embedder.register_forward_hook(lambda _m, _i, output: embedded.append(output))
    with torch.no_grad(), compute_in(model, SPEC, "bf16", CPU):
        embedder.time_embedder(embedder.timesteps_proj(torch.arange(1000.0)))
    hook.remove()
    assert len(torch.unique(embedded[0], dim=0)) == 1000


@pytest.mark.filterwarnings(
    "ignore:Mismatch dtype between input and weight"
)  # torch's RMSNorm: fp32 weights, bf16 input
def test_losses_and_gradients_are_near_those_of_fp32_and_gradients_are_fp32(load: Any) -> None:
    model, given = load(torch.float32), inputs()
    gradients = {}
    for precision in DTYPES:
        model.zero_grad()
        with compute_in(model, SPEC, precision, CPU):
            model(**given, return_dict=False)[0].float().square().mean().backward()
        trained = [p.grad for p in model.parameters() if p.requires_grad]
        assert {grad.dtype for grad in trained} == {torch.float32}
        gradients[precision] = torch.cat([grad.flatten() for grad in trained])
    whole = gradients["fp32"]
    for precision, bound in (("bf16", 0.05), ("fp16", 0.01)):
        assert (gradients[precision] - whole).norm() / whole.norm() < bound
        assert not torch.equal(gradients[precision], whole)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_nothing_stays_behind(load: Any, precision: str) -> None:
    model = load(torch.float32)
    given = inputs()
    before = model(**given).sample

    def fail_inside() -> None:
        with compute_in(model, SPEC, precision, CPU):
            raise ValueError

    with pytest.raises(ValueError):
        fail_inside()
    assert not any("forward" in vars(module) for module in model.modules())
    casting = [module.cast_input_dtype_enabled for module in model.modules() if hasattr(module, "lora_A")]
    assert all(casting)
    assert torch.equal(model(**given).sample, before)


def test_only_the_transformer_is_under_autocast(load: Any) -> None:
    other = nn.Linear(4, 4)
    with compute_in(load(torch.bfloat16), SPEC, "bf16", CPU):
        assert other(torch.randn(2, 4)).dtype == torch.float32


def test_fp32_is_left_alone(load: Any) -> None:
    model = load(torch.float32)
    with compute_in(model, SPEC, "fp32", CPU):
        assert model(**inputs()).sample.dtype == torch.float32
        assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_blocks_that_are_computed_again_in_backward_save_what_forward_saved(
    load: Any, tmp_path: Path, dropout: float
) -> None:
    model, given = load(torch.bfloat16, dropout), inputs()
    gradients = []
    for checkpointing in ("none", "block"):
        model.zero_grad()
        torch.manual_seed(3)
        with (
            apply(model, SPEC, MemoryStrategy(gradient_checkpointing=checkpointing), tmp_path),
            compute_in(model, SPEC, "bf16", CPU),
        ):
            model(**given, return_dict=False)[0].float().square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize("keep", [True, False])
def test_autocast_keeps_its_casts_only_where_it_may(load: Any, keep: bool) -> None:
    model, seen = load(torch.bfloat16), []
    model.blocks[0].register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_cache_enabled()))
    with compute_in(model, SPEC, "bf16", CPU, keep):
        model(**inputs())
    assert seen == [keep]
