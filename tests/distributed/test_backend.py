"""The engine of one device: gradients, norm and clipping, updates and skips, the fp16 scale."""

import pytest
import torch
from torch import nn

from longtake.distributed.backend import Backend, SingleDevice, world
from longtake.distributed.loss_scale import LossScale

CPU = torch.device("cpu")


def engine(fp16: bool = False) -> tuple[nn.Parameter, SingleDevice]:
    """One parameter of three values, and its engine."""
    parameter = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    return parameter, SingleDevice(nn.ParameterList([parameter]), {"weight": parameter}, optimizer, fp16)


def test_it_is_a_backend() -> None:
    assert isinstance(engine()[1], Backend)


@pytest.mark.parametrize("fp16", [False, True])
def test_losses_add_up_to_the_gradient_of_their_sum(fp16: bool) -> None:
    parameter, backend = engine(fp16)
    for factor in (1.0, 2.0, 3.0):
        backend.backward((parameter * factor).sum())
    assert backend.clip(0.0) == pytest.approx(6 * 3**0.5)
    torch.testing.assert_close(parameter.grad, torch.full((3,), 6.0))


@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize(("bound", "left"), [(0.5, 0.5), (100.0, 14**0.5), (0.0, 14**0.5)])
def test_the_norm_is_measured_whole_and_clipped_to_its_bound(fp16: bool, bound: float, left: float) -> None:
    parameter, backend = engine(fp16)
    backend.backward(parameter.square().sum() / 2)
    assert backend.clip(bound) == pytest.approx(14**0.5)
    assert parameter.grad is not None
    assert float(parameter.grad.norm()) == pytest.approx(left, rel=1e-5)


@pytest.mark.parametrize("fp16", [False, True])
def test_a_step_updates_and_drops_the_gradients(fp16: bool) -> None:
    parameter, backend = engine(fp16)
    before = parameter.detach().clone()
    backend.backward(parameter.sum())
    backend.clip(1.0)
    backend.step(skip=False)
    assert parameter.grad is None
    assert not torch.equal(parameter, before)


@pytest.mark.parametrize("fp16", [False, True])
def test_a_skipped_step_leaves_parameters_and_states(fp16: bool) -> None:
    parameter, backend = engine(fp16)
    before = parameter.detach().clone()
    backend.backward(parameter.sum())
    backend.clip(1.0)
    backend.step(skip=True)
    assert parameter.grad is None
    assert torch.equal(parameter, before)
    assert not backend.optimizer.state


def test_an_overflow_shows_in_the_norm_and_halves_the_scale() -> None:
    parameter, backend = engine(fp16=True)
    before = backend.scale.value
    backend.backward((parameter * float("inf")).sum())
    norm = backend.clip(1.0)
    assert not norm < float("inf")
    backend.step(skip=True)
    backend.scale.update(finite=False)
    assert backend.scale.value == before / 2
    assert torch.equal(parameter.detach(), torch.tensor([1.0, 2.0, 3.0]))


def test_a_norm_that_overflows_alone_is_skipped_too() -> None:
    parameter, backend = engine(fp16=True)
    backend.backward((parameter * 1e30).sum() / 65536)
    assert backend.clip(1.0) == float("inf")
    backend.step(skip=True)
    assert torch.equal(parameter.detach(), torch.tensor([1.0, 2.0, 3.0]))
    assert not backend.optimizer.state


def test_the_scale_follows_torchs_scaler() -> None:
    ours, torchs = LossScale(enabled=True), torch.amp.GradScaler("cpu", growth_interval=2000)
    parameter = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter])
    for step in range(2200):
        overflow = step in (0, 7, 8, 100)
        torchs.scale((parameter * (float("inf") if overflow else 1.0)).sum()).backward()
        torchs.step(optimizer)
        torchs.update()
        optimizer.zero_grad()
        ours.update(finite=not overflow)
    assert ours.state() == torchs.state_dict()


def test_the_scale_is_in_the_state_and_comes_back() -> None:
    state = LossScale(enabled=True).state() | {"scale": 8.0, "_growth_tracker": 7}
    other = LossScale(enabled=True)
    other.load_state(state)
    assert other.state() == state


def test_without_fp16_there_is_no_scale() -> None:
    scale = LossScale(enabled=False)
    assert (scale.value, scale.state()) == (1.0, {})
    scale.load_state({})


def test_what_a_device_holds_is_whole_and_writing_it_changes_the_run() -> None:
    parameter, backend = engine()
    backend.backward(parameter.sum())
    backend.step(skip=False)
    with backend.tensors(write=True) as held:
        (weight,) = held["trained"]
        assert (weight.name, weight.shape, weight.start, weight.is_whole) == ("weight", (3,), 0, True)
        assert {piece.name for piece in held["optimizer"]} == {f"weight/{k}" for k in ("step", "exp_avg", "exp_avg_sq")}
        weight.values.fill_(5.0)
    assert torch.equal(parameter.detach(), torch.full((3,), 5.0))


def test_the_world_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert world() == (0, 1)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert world() == (3, 8)
