"""The engine of one device: gradients, norm and clipping, updates and skips, the fp16 scale."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from longtake.distributed.backend import Backend, SingleDevice, any_rank, world

CPU = torch.device("cpu")


def engine(fp16: bool = False) -> tuple[nn.Parameter, SingleDevice]:
    """One parameter of three values, and its engine."""
    parameter = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    return parameter, SingleDevice([parameter], torch.optim.AdamW([parameter], lr=0.1), CPU, fp16)


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


def test_an_overflow_halves_the_scale_and_shows_in_the_norm() -> None:
    parameter, backend = engine(fp16=True)
    before = backend.state()["scale"]
    backend.backward((parameter * float("inf")).sum())
    norm = backend.clip(1.0)
    assert not norm < float("inf")
    backend.step(skip=True)
    assert backend.state()["scale"] == before / 2
    assert torch.equal(parameter.detach(), torch.tensor([1.0, 2.0, 3.0]))


def test_a_norm_that_overflows_alone_is_skipped_too() -> None:
    parameter, backend = engine(fp16=True)
    backend.backward((parameter * 1e30).sum() / 65536)
    assert backend.clip(1.0) == float("inf")
    backend.step(skip=True)
    assert torch.equal(parameter.detach(), torch.tensor([1.0, 2.0, 3.0]))
    assert not backend.optimizer.state


def test_the_scale_is_in_the_state_and_comes_back() -> None:
    _, backend = engine(fp16=True)
    state = backend.state() | {"scale": 8.0, "_growth_tracker": 7}
    _, other = engine(fp16=True)
    other.load_state(state)
    assert other.state() == state


def test_without_fp16_there_is_no_state() -> None:
    _, backend = engine()
    assert backend.state() == {}
    backend.load_state({})


def test_the_world_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert world() == (0, 1)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert world() == (3, 8)


RANK = """
import sys
import torch.distributed as ranks
from longtake.distributed.backend import any_rank
rank = int(sys.argv[1])
ranks.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
print(any_rank(rank == 1), any_rank(False), any_rank(True))
ranks.destroy_process_group()
"""


def test_what_one_rank_says_all_hear(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RANK]
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "meet")], stdout=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    assert [process.communicate(timeout=60)[0].split() for process in processes] == [["True", "False", "True"]] * 2


@pytest.mark.parametrize("flag", [True, False])
def test_a_process_alone_hears_itself(flag: bool) -> None:
    assert any_rank(flag) is flag
