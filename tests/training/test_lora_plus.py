"""LoRA+: B learns faster than A by a ratio, under every optimiser and at every step of the schedule."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from longtake.config.schema import MemoryStrategy, TrainingConfig
from longtake.memory.optimizer_offload import OffloadedAdamW
from longtake.training.optimizer import build_optimizer, learning_rate, set_rate

MEMORIES = {
    "adamw": MemoryStrategy(),
    "adamw8bit": MemoryStrategy(optimizer="adamw8bit"),
    "offload": MemoryStrategy(optimizer_offload=True),
}
SHAPES = {
    "blocks.0.attn1.to_q.lora_A.default.weight": (4, 16),
    "blocks.0.attn1.to_q.lora_B.default.weight": (16, 4),
    "blocks.0.attn1.to_q.lora_magnitude_vector.default.weight": (16,),
}
TRAINING = TrainingConfig(
    steps=8, warmup_steps=2, learning_rate=1e-2, weight_decay=0.3, lora_plus_ratio=16.0, schedule="cosine"
)


def parameters() -> dict[str, nn.Parameter]:
    torch.manual_seed(1)
    return {name: nn.Parameter(torch.randn(shape)) for name, shape in SHAPES.items()}


def gradient(name: str, step: int) -> Tensor:
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(step * 10 + len(name)))


def plain_adamw(steps: int, rates: Mapping[str, float]) -> dict[str, Tensor]:
    """AdamW in a few lines, each parameter with a rate of its own over that of the schedule."""
    found = {}
    for name, parameter in parameters().items():
        weight, first, second = parameter.detach().double(), 0.0, 0.0
        decay = 0.3 if weight.ndim == 2 else 0.0
        for step in range(steps):
            rate, own = rates[name] * learning_rate(step, TRAINING), gradient(name, step).double()
            first, second = 0.9 * first + 0.1 * own, 0.999 * second + 0.001 * own**2
            weight = weight * (1 - rate * decay)
            moment, spread = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
            weight = weight - rate * moment / (spread.sqrt() + 1e-8)
        found[name] = weight
    return found


@pytest.mark.parametrize("memory", MEMORIES.values(), ids=[*MEMORIES])
def test_b_moves_by_its_ratio_and_all_else_as_ever(memory: MemoryStrategy) -> None:
    held = parameters()
    optimizer = build_optimizer(held, TRAINING, memory)
    for step in range(4):
        set_rate(optimizer, learning_rate(step, TRAINING))
        for name, parameter in held.items():
            parameter.grad = gradient(name, step)
        optimizer.step()
    expected = plain_adamw(4, {name: 16.0 if "lora_B" in name else 1.0 for name in SHAPES})
    for name, parameter in held.items():
        # torchao corrects the bias in fp32, where 1 - 0.999 has lost ten bits
        torch.testing.assert_close(parameter.detach().double(), expected[name], rtol=1e-5, atol=1e-5, msg=name)
    if isinstance(optimizer, OffloadedAdamW):
        optimizer.close()


def test_groups_have_the_rates_from_the_start_and_decay_matrices_alone() -> None:
    groups = build_optimizer(parameters(), TRAINING).param_groups
    assert [(group["lr"], group["weight_decay"], len(group["params"])) for group in groups] == [
        (1e-2, 0.3, 1),
        (0.16, 0.3, 1),
        (1e-2, 0.0, 1),
    ]


def test_a_ratio_of_1_makes_no_group_of_its_own() -> None:
    groups = build_optimizer(parameters(), TRAINING.model_copy(update={"lora_plus_ratio": 1.0})).param_groups
    assert [len(group["params"]) for group in groups] == [2, 1]
