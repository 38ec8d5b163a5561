"""AdamW and its states, the learning rate as a function of the step, and the moving average."""

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from longtake.config.schema import MemoryStrategy, TrainingConfig
from longtake.distributed.backend import SingleDevice, optimizer_tensors
from longtake.errors import ConfigError, RunError
from longtake.memory.optimizer_offload import OffloadedAdamW
from longtake.training.average import MovingAverage
from longtake.training.optimizer import (
    allocate_states,
    build_optimizer,
    learning_rate,
    trained_parameters,
)
from saved import restore_states, save_states

MEMORIES = {
    "adamw": MemoryStrategy(),
    "adamw8bit": MemoryStrategy(optimizer="adamw8bit"),
    "offload": MemoryStrategy(optimizer_offload=True),
}
every_memory = pytest.mark.parametrize("memory", MEMORIES.values(), ids=[*MEMORIES])
SHAPES = {"matrix": (3, 4), "vector": (5,), "large matrix": (64, 80)}
"""8-bit states have the parameters of 4096 values or more."""


def parameters() -> dict[str, nn.Parameter]:
    """Two matrices and a vector, the same at every call."""
    torch.manual_seed(1)
    return {name: nn.Parameter(torch.randn(shape)) for name, shape in SHAPES.items()}


def gradient(name: str, step: int) -> Tensor:
    """A gradient that is a function of its arguments."""
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(step * 10 + len(name)))


def close(optimizer: torch.optim.Optimizer) -> None:
    """Ends the threads of an optimiser that has some."""
    if isinstance(optimizer, OffloadedAdamW):
        optimizer.close()


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
        shrunk = before[name] * (1 - rate * decay if parameter.ndim == 2 else 1)
        torch.testing.assert_close(parameter.detach(), shrunk - moved)


def test_the_states_are_fp32_and_none_is_missing() -> None:
    held = parameters()
    optimizer = build_optimizer(held, TrainingConfig())
    step_through(held, optimizer, range(1))
    tensors = optimizer_tensors(optimizer, held)
    assert set(tensors) == {f"{name}/{key}" for name in held for key in ("step", "exp_avg", "exp_avg_sq")}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_eight_bit_states_are_stored_as_their_plain_parts() -> None:
    held = parameters()
    optimizer = build_optimizer(held, TrainingConfig(), MEMORIES["adamw8bit"])
    step_through(held, optimizer, range(1))
    tensors = optimizer_tensors(optimizer, held)
    large = {path.removeprefix("large matrix/"): tensor for path, tensor in tensors.items() if "large" in path}
    parts = ("codes", "scale", "qmap")
    assert set(large) == {"step", *(f"{moment}/{part}" for moment in ("exp_avg", "exp_avg_sq") for part in parts)}
    assert large["exp_avg/codes"].dtype == torch.uint8
    assert {type(tensor) for tensor in tensors.values()} == {Tensor}


@every_memory
def test_an_optimiser_goes_on_from_its_tensors_to_the_bit(memory: MemoryStrategy, tmp_path: Path) -> None:
    whole, halved = parameters(), parameters()
    uninterrupted, first, second = (build_optimizer(held, TrainingConfig(), memory) for held in (whole, halved, halved))
    step_through(whole, uninterrupted, range(6))
    step_through(halved, first, range(3))
    restore_states(second, halved, save_states(tmp_path, optimizer_tensors(first, halved)))
    step_through(halved, second, range(3, 6))
    assert all(torch.equal(whole[name], halved[name]) for name in whole)
    ends = [optimizer_tensors(uninterrupted, whole), optimizer_tensors(second, halved)]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(value, ends[1][path]) for path, value in ends[0].items())
    for optimizer in (uninterrupted, first, second):
        close(optimizer)


def test_states_go_from_the_device_to_the_host_and_back(tmp_path: Path) -> None:
    held = parameters()
    on_device, in_host = (
        build_optimizer(held, TrainingConfig()),
        build_optimizer(held, TrainingConfig(), MEMORIES["offload"]),
    )
    step_through(held, on_device, range(2))
    stored = optimizer_tensors(on_device, held)
    restore_states(in_host, held, save_states(tmp_path, stored))
    moved = optimizer_tensors(in_host, held)
    assert moved.keys() == stored.keys()
    assert all(torch.equal(value, moved[path]) for path, value in stored.items())
    close(in_host)


@pytest.mark.parametrize("names", [("adamw", "adamw8bit"), ("adamw8bit", "adamw")])
def test_states_of_another_optimiser_are_refused(names: tuple[str, str], tmp_path: Path) -> None:
    held = parameters()
    one, other = (build_optimizer(held, TrainingConfig(), MEMORIES[name]) for name in names)
    step_through(held, one, range(1))
    with pytest.raises(RunError, match=r"memory\.optimizer as it was"):
        restore_states(other, held, save_states(tmp_path, optimizer_tensors(one, held)))


@every_memory
def test_states_allocated_beforehand_change_nothing(memory: MemoryStrategy) -> None:
    lazy, eager = parameters(), parameters()
    optimizers = [build_optimizer(held, TrainingConfig(), memory) for held in (lazy, eager)]
    allocate_states(optimizers[1])
    assert all(torch.equal(lazy[name], eager[name]) for name in lazy)
    assert not any(parameter.grad is not None for parameter in eager.values())
    assert not any(value.any() for path, value in optimizer_tensors(optimizers[1], eager).items() if "qmap" not in path)
    for held, optimizer in zip((lazy, eager), optimizers, strict=True):
        step_through(held, optimizer, range(3))
    states = [optimizer_tensors(*pair) for pair in zip(optimizers, (lazy, eager), strict=True)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][path]) for path, value in states[0].items())
    assert all(torch.equal(lazy[name], eager[name]) for name in lazy)
    for optimizer in optimizers:
        close(optimizer)


@every_memory
def test_states_that_are_there_are_left_alone(memory: MemoryStrategy) -> None:
    held = parameters()
    optimizer = build_optimizer(held, TrainingConfig(), memory)
    step_through(held, optimizer, range(2))
    before = {path: tensor.clone() for path, tensor in optimizer_tensors(optimizer, held).items()}
    allocate_states(optimizer)
    assert all(torch.equal(tensor, before[path]) for path, tensor in optimizer_tensors(optimizer, held).items())
    close(optimizer)


@every_memory
def test_the_rate_is_set_as_a_number_at_each_step(memory: MemoryStrategy) -> None:
    held = parameters()
    optimizer = build_optimizer(held, TrainingConfig(weight_decay=0.0), memory)
    for rate in (0.25, 0.0):
        before = {name: parameter.detach().clone() for name, parameter in held.items()}
        for group in optimizer.param_groups:
            group["lr"] = rate
        step_through(held, optimizer, range(1))
        moved = {name: (parameter.detach() - before[name]).abs() for name, parameter in held.items()}
        assert all(distance.median() == pytest.approx(rate, rel=0.1) for distance in moved.values())
    close(optimizer)


@every_memory
def test_it_works_without_values(memory: MemoryStrategy) -> None:
    held = {name: nn.Parameter(torch.empty(shape, device="meta")) for name, shape in SHAPES.items()}
    optimizer = build_optimizer(held, TrainingConfig(), memory)
    allocate_states(optimizer)
    for parameter in held.values():
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    assert {path.split("/")[0] for path in optimizer_tensors(optimizer, held)} == held.keys()
    close(optimizer)


def test_eight_bit_states_take_a_quarter_of_the_memory() -> None:
    held = {"large": nn.Parameter(torch.randn(512, 64))}
    sizes = {}
    for name in ("adamw", "adamw8bit"):
        optimizer = build_optimizer(held, TrainingConfig(), MEMORIES[name])
        allocate_states(optimizer)
        sizes[name] = sum(tensor.nbytes for tensor in optimizer_tensors(optimizer, held).values())
    assert sizes["adamw8bit"] < 0.3 * sizes["adamw"]


def test_without_torchao_eight_bit_states_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(ConfigError, match=r"memory\.optimizer.*pip install \"longtake\[quantization\]\""):
        build_optimizer(parameters(), TrainingConfig(), MEMORIES["adamw8bit"])


def test_what_is_frozen_is_not_trained() -> None:
    module = nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    assert list(trained_parameters(module)) == ["weight"]


def average_of(held: dict[str, nn.Parameter], decay: float) -> MovingAverage:
    optimizer = torch.optim.SGD(held.values())
    return MovingAverage(SingleDevice(nn.ParameterDict(held), held, optimizer, fp16=False), decay)


def averages(average: MovingAverage) -> dict[str, Tensor]:
    return {piece.name: piece.values.view(piece.shape) for piece in average.pieces}


def test_the_average_follows_its_formula() -> None:
    held = parameters()
    average = average_of(held, decay=0.9)
    expected = {name: parameter.detach().double() for name, parameter in held.items()}
    for step in range(5):
        with torch.no_grad():
            for name, parameter in held.items():
                parameter.add_(gradient(name, step))
                expected[name] = 0.9 * expected[name] + 0.1 * parameter.double()
        average.update()
    for name, wanted in expected.items():
        torch.testing.assert_close(averages(average)[name].double(), wanted, rtol=1e-6, atol=1e-6)


def test_the_average_stands_in_for_the_parameters_for_a_while() -> None:
    held = parameters()
    average = average_of(held, decay=0.5)
    with torch.no_grad():
        held["vector"].add_(1)
    kept = held["vector"].detach().clone()

    def fail_inside() -> None:
        with average.in_use():
            assert torch.equal(held["vector"], averages(average)["vector"])
            raise ValueError

    with pytest.raises(ValueError):
        fail_inside()
    assert torch.equal(held["vector"], kept)
    assert not torch.equal(averages(average)["vector"], kept)


def test_states_of_the_one_kernel_that_cuda_has_are_allocated_beforehand_too() -> None:
    lazy, eager = parameters(), parameters()
    optimizers = [torch.optim.AdamW(held.values(), fused=True) for held in (lazy, eager)]
    allocate_states(optimizers[1])
    for held, optimizer in zip((lazy, eager), optimizers, strict=True):
        step_through(held, optimizer, range(3))
    assert all(torch.equal(lazy[name], eager[name]) for name in lazy)
