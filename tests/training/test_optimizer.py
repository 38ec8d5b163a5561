"""AdamW and its states, the learning rate as a function of the step, and the moving average."""

import math

import pytest
import torch
from torch import Tensor, nn

from longtake.config.schema import TrainingConfig
from longtake.training.optimizer import (
    MovingAverage,
    build_optimizer,
    learning_rate,
    load_optimizer_tensors,
    optimizer_tensors,
    trained_parameters,
)


def parameters() -> dict[str, nn.Parameter]:
    """A matrix and a vector, the same at every call."""
    torch.manual_seed(1)
    return {"matrix": nn.Parameter(torch.randn(3, 4)), "vector": nn.Parameter(torch.randn(5))}


def gradient(name: str, step: int) -> Tensor:
    """A gradient that is a function of its arguments."""
    shape = (3, 4) if name == "matrix" else (5,)
    return torch.randn(shape, generator=torch.Generator().manual_seed(step * 10 + len(name)))


def step_through(held: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Optimiser steps with the gradients of `steps`."""
    for step in steps:
        for name, parameter in held.items():
            parameter.grad = gradient(name, step)
        optimizer.step()


def test_the_rate_rises_in_a_line_and_falls_along_half_a_cosine() -> None:
    training = TrainingConfig(steps=110, warmup_steps=10, learning_rate=2.0, schedule="cosine")
    rates = [learning_rate(step, training) for step in range(110)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[10] == pytest.approx(2.0)
    assert rates[60] == pytest.approx(1.0)
    assert rates[35] == pytest.approx(1 + math.cos(math.pi / 4))
    assert 0 < rates[-1] < 1e-3
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_a_constant_rate_stays_after_the_warm_up() -> None:
    training = TrainingConfig(steps=20, warmup_steps=4, learning_rate=1e-3, schedule="constant")
    assert [learning_rate(step, training) for step in (1, 3, 4, 19)] == pytest.approx([5e-4, 1e-3, 1e-3, 1e-3])
    assert learning_rate(0, training.model_copy(update={"warmup_steps": 0})) == 1e-3


def test_the_rate_has_no_memory() -> None:
    training = TrainingConfig(steps=50, warmup_steps=5)
    forwards = [learning_rate(step, training) for step in range(50)]
    assert [learning_rate(step, training) for step in reversed(range(50))] == forwards[::-1]


def test_one_step_is_adamw_with_decay_on_matrices_alone() -> None:
    held, rate, decay = parameters(), 0.1, 0.3
    before = {name: parameter.detach().clone() for name, parameter in held.items()}
    optimizer = build_optimizer(held, TrainingConfig(learning_rate=rate, weight_decay=decay))
    step_through(held, optimizer, range(1))
    for name, parameter in held.items():
        moved = rate * gradient(name, 0) / (gradient(name, 0).abs() + 1e-8)  # the first step's bias correction
        shrunk = before[name] * (1 - rate * decay if name == "matrix" else 1)
        torch.testing.assert_close(parameter.detach(), shrunk - moved)


def test_the_states_are_fp32_and_none_is_missing() -> None:
    held = parameters()
    optimizer = build_optimizer(held, TrainingConfig())
    step_through(held, optimizer, range(1))
    tensors = optimizer_tensors(optimizer, held)
    assert set(tensors) == {f"{name}/{key}" for name in held for key in ("step", "exp_avg", "exp_avg_sq")}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_an_optimiser_goes_on_from_its_tensors_to_the_bit() -> None:
    whole, halved = parameters(), parameters()
    step_through(whole, build_optimizer(whole, TrainingConfig()), range(6))
    first = build_optimizer(halved, TrainingConfig())
    step_through(halved, first, range(3))
    stored = {name: tensor.clone() for name, tensor in optimizer_tensors(first, halved).items()}
    second = build_optimizer(halved, TrainingConfig())
    load_optimizer_tensors(second, halved, stored)
    step_through(halved, second, range(3, 6))
    assert all(torch.equal(whole[name], halved[name]) for name in whole)


def test_what_is_frozen_is_not_trained() -> None:
    module = nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    assert list(trained_parameters(module)) == ["weight"]


def test_the_average_follows_its_formula() -> None:
    held = parameters()
    average = MovingAverage(held, decay=0.9)
    expected = {name: parameter.detach().double() for name, parameter in held.items()}
    for step in range(5):
        with torch.no_grad():
            for name, parameter in held.items():
                parameter.add_(gradient(name, step))
                expected[name] = 0.9 * expected[name] + 0.1 * parameter.double()
        average.update()
    for name, wanted in expected.items():
        torch.testing.assert_close(average.averages[name].double(), wanted, rtol=1e-6, atol=1e-6)


def test_the_average_stands_in_for_the_parameters_for_a_while() -> None:
    held = parameters()
    average = MovingAverage(held, decay=0.5)
    with torch.no_grad():
        held["vector"].add_(1)
    kept = held["vector"].detach().clone()

    def fail_inside() -> None:
        with average.in_use():
            assert torch.equal(held["vector"], average.averages["vector"])
            raise ValueError

    with pytest.raises(ValueError):
        fail_inside()
    assert torch.equal(held["vector"], kept)
    assert not torch.equal(average.averages["vector"], kept)
