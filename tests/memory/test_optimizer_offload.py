"""AdamW with its states in host memory: the plain optimiser's bits, and two chunks of the device's memory."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longtake.memory.copies import Copies, CpuCopies, MetaCopies
from longtake.memory.optimizer_offload import OffloadedAdamW
from race_checker import CheckedCopies

SHAPES = ((40, 33), (7,), (64, 64), (1,), (300,), (5, 5))
STEPS = 4


def parameters(device: str = "cpu") -> list[nn.Parameter]:
    """Always the same values."""
    draw = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=draw).to(device)) for shape in SHAPES]


def groups(held: list[nn.Parameter]) -> list[dict[str, Any]]:
    """Matrices with weight decay, vectors without."""
    return [
        {"params": [parameter for parameter in held if parameter.ndim == 2], "weight_decay": 0.1},
        {"params": [parameter for parameter in held if parameter.ndim == 1], "weight_decay": 0.0},
    ]


def update(held: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Steps with gradients and rates that are functions of the step; some parameters have no gradient in some."""
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (step + 1)
        draw = torch.Generator().manual_seed(step)
        for index, parameter in enumerate(held):
            gradient = torch.randn(parameter.shape, generator=draw).to(parameter.device)
            parameter.grad = None if (index + step) % 4 == 1 else gradient
        optimizer.step()
        optimizer.zero_grad()


@contextmanager
def offloaded(held: list[nn.Parameter], chunk_bytes: int, copies: Copies) -> Iterator[OffloadedAdamW]:
    """The optimiser, closed afterwards."""
    optimizer = OffloadedAdamW(groups(held), 0.5, copies, chunk_bytes)
    try:
        yield optimizer
        optimizer.finish()
    finally:
        optimizer.close()


@pytest.mark.parametrize("chunk_bytes", [1, 1024, 5000, 20000, 2**26])
def test_weights_and_states_are_those_of_the_plain_optimiser_to_the_bit(chunk_bytes: int) -> None:
    plain, held = parameters(), parameters()
    expected = torch.optim.AdamW(groups(plain), lr=0.5)
    update(plain, expected, range(STEPS))
    with offloaded(held, chunk_bytes, CpuCopies()) as optimizer:
        update(held, optimizer, range(STEPS))
        optimizer.finish()
        for one, other in zip(plain, held, strict=True):
            assert torch.equal(one, other)
            states = optimizer.state[other]
            assert states.keys() == expected.state[one].keys()
            assert all(torch.equal(states[name], value) for name, value in expected.state[one].items())


def test_a_chunk_is_as_large_as_was_asked_for_and_a_large_parameter_is_cut() -> None:
    with offloaded(parameters(), 2048, CpuCopies()) as optimizer:
        assert optimizer.chunk_values * 8 <= 2048
        largest = optimizer.param_groups[0]["params"][1]
        pieces = [piece for chunk in optimizer.chunks for piece in chunk.pieces if piece.parameter is largest]
        assert len(pieces) >= 64 * 64 // 256
        assert [piece.start for piece in pieces[1:]] == [piece.stop for piece in pieces[:-1]]
        assert (pieces[0].start, pieces[-1].stop) == (0, largest.numel())


@pytest.mark.parametrize("seed", range(4))
def test_no_copy_runs_before_what_it_must_wait_for(seed: int) -> None:
    plain, held = parameters(), parameters()
    update(plain, torch.optim.AdamW(groups(plain), lr=0.5), range(STEPS))
    with CheckedCopies(seed).watching() as copies:
        optimizer = OffloadedAdamW(groups(held), 0.5, copies, 4096)
        update(held, optimizer, range(STEPS))
        optimizer.finish()
    assert all(torch.equal(one, other) for one, other in zip(plain, held, strict=True))


class _Told:
    """The CPU's copies, and what was asked of them in order."""

    def __init__(self) -> None:
        self.real, self.calls = CpuCopies(), [""]

    def start(self, queue: Any, target: Any, source: Any, after: Any) -> Any:
        self.calls.append(queue)
        return self.real.start(queue, target, source, after)

    def reached(self) -> Any:
        self.calls.append("reached")
        return self.real.reached()

    def wait(self, event: Any) -> None:
        self.real.wait(event)

    def host(self, nbytes: int) -> Tensor:
        return self.real.host(nbytes)

    def close(self) -> None:
        self.real.close()


def test_the_next_chunk_is_on_its_way_while_one_is_updated() -> None:
    held, copies = parameters(), _Told()
    with offloaded(held, 16384, copies) as optimizer:
        assert len(optimizer.chunks) == 3
        for parameter in held:
            parameter.grad = torch.ones_like(parameter)
        copies.calls.clear()
        optimizer.step()
    moves = [call for call in copies.calls if call != "reached"]
    two_moments = {"in": ["inward"] * 2, "out": ["outward"] * 2}
    order = ["in", "in", "out", "in", "out", "out"]
    assert moves == [move for name in order for move in two_moments[name]]


def test_chunks_without_gradients_are_left_where_they_are() -> None:
    held, copies = parameters(), _Told()
    with offloaded(held, 16384, copies) as optimizer:
        optimizer.step()
        held[1].grad = torch.ones_like(held[1])
        optimizer.step()
        assert [call for call in copies.calls[1:] if call != "reached"] == ["inward", "inward", "outward", "outward"]
        optimizer.finish()
        assert [float(optimizer.state[parameter]["step"]) for parameter in held] == [0, 1, 0, 0, 0, 0]


def test_an_overflow_under_a_gradient_scaler_changes_nothing() -> None:
    held = parameters()
    before = [parameter.detach().clone() for parameter in held]
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with offloaded(held, 4096, CpuCopies()) as optimizer:
        for value in (float("inf"), 2.0):
            for parameter in held:
                parameter.grad = torch.full_like(parameter, value)
            scaler.scale(torch.ones(()))
            scaler.step(optimizer)
            scaler.update()
            if value == float("inf"):
                assert all(torch.equal(one, other) for one, other in zip(before, held, strict=True))
                assert not optimizer.state[held[0]]["step"]
        assert not any(torch.equal(one, other) for one, other in zip(before, held, strict=True))


class _Peak(TorchDispatchMode):
    """Most bytes of `meta` storages made inside that were alive together."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {
            tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if not isinstance(tensor, Tensor) or not tensor.is_meta:
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in known | self.alive.keys():
                self.alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, partial(self.alive.pop, storage._cdata))
        self.peak = max(self.peak, sum(self.alive.values()))
        return result


@pytest.mark.parametrize("count", [1, 8, 32])
def test_the_device_holds_two_chunks_however_many_parameters_there_are(count: int) -> None:
    held = [nn.Parameter(torch.empty(256, 128, device="meta")) for _ in range(count)]
    chunk = 2**18
    copies = MetaCopies()
    optimizer = OffloadedAdamW([{"params": held}], 0.1, copies, chunk)
    for parameter in held:
        parameter.grad = torch.empty_like(parameter)
    with _Peak() as tracker:
        optimizer.step()
    temporary = 3 * 256 * 128 * 4  # of the update of one parameter
    assert tracker.peak <= min(2, count) * chunk + temporary
    assert copies.host_bytes == count * 256 * 128 * 8
    optimizer.close()
