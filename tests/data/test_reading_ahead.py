"""Reading ahead on a thread and by processes: the same tensors, in order, whatever dies, hangs or fails."""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import psutil
import pytest
import torch

from longtake.data.reading_ahead import MOST_FAILURES, Patience, ReadingAhead
from longtake.errors import CacheError, RunError
from processes import started
from step_loads import DAMAGED, Held, Load, tensors_of

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # torch's advice where cores are few
LOOK = 0.02
Told = list[tuple[str, str]]


class Clock:
    """Seconds that go on by `pace` whenever somebody waits and looks whether to go on waiting."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pace = 0.0

    def look(self) -> bool:
        self.now += self.pace
        return False


@pytest.fixture
def told() -> Told:
    return []


@pytest.fixture
def reading(told: Told) -> Callable[..., ReadingAhead[tuple[int, dict[str, torch.Tensor]]]]:
    """Steps 0 to before 8 of a load; what is told of it is kept."""

    def of(load: Load, workers: int, clock: Clock | None = None) -> ReadingAhead[tuple[int, dict[str, torch.Tensor]]]:
        clock = clock or Clock()
        tell = lambda kind, what: told.append((kind, what))  # noqa: E731
        return ReadingAhead(load, range(8), workers, tell, Patience(look=LOOK), lambda: clock.now)

    return of


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    """Names, types, shapes and bits."""
    return [*one] == [*other] and all(
        tensor.dtype == other[name].dtype and tensor.shape == other[name].shape and torch.equal(tensor, other[name])
        for name, tensor in one.items()
    )


Reading = Callable[..., ReadingAhead[tuple[int, dict[str, torch.Tensor]]]]


@pytest.mark.parametrize("workers", [0, 2, 3])
def test_steps_come_in_order_and_to_the_bit_from_any_number_of_processes(
    reading: Reading, told: Told, workers: int
) -> None:
    state = torch.get_rng_state()
    with reading(Load(), workers) as ahead:
        for step in range(8):
            found = ahead.take(step)
            assert found is not None
            assert same(found[1], tensors_of(step))
            assert (found[0] == os.getpid()) == (workers == 0)
    assert torch.equal(torch.get_rng_state(), state)
    assert told == []


def test_one_step_is_read_ahead_and_no_more(reading: Reading) -> None:
    asked: list[int] = []

    class Noting(Load):
        def __call__(self, step: int) -> tuple[int, dict[str, torch.Tensor]]:
            asked.append(step)
            return super().__call__(step)

    with reading(Noting(), 0) as ahead:
        for step in range(7):
            ahead.take(step)
            assert asked in ([*range(step + 1)], [*range(step + 2)])
        ahead.take(7)
    assert asked == [*range(8)]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_failure_is_raised_with_its_code_where_its_step_is_due(reading: Reading, told: Told, workers: int) -> None:
    with reading(Load(damaged_at=2), workers) as ahead:
        assert [ahead.take(step) is not None for step in (0, 1)] == [True, True]
        with pytest.raises(CacheError) as raised:
            ahead.take(2)
    assert raised.value.problems == (DAMAGED,)
    assert told == []


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mistake_in_the_code_is_raised_as_it_is(reading: Reading, workers: int) -> None:
    with reading(Load(mistaken_at=1), workers) as ahead:
        ahead.take(0)
        with pytest.raises(ZeroDivisionError, match="a mistake in the code"):
            ahead.take(1)


def test_nothing_is_read_where_nothing_is_left() -> None:
    with ReadingAhead(Load(mistaken_at=3), range(3, 3), 2, print) as ahead:
        assert ahead.workers is None


def test_a_read_that_hangs_is_said_once_with_what_is_waited_for_and_goes_on(reading: Reading, told: Told) -> None:
    load, clock = Held(), Clock()
    with reading(load, 0, clock) as ahead:
        ahead.take(0)
        clock.pace = 7.0

        def look() -> bool:
            if clock.now > 200:
                load.free.set()
            return clock.look()

        found = ahead.take(1, look)
        assert found is not None
        assert same(found[1], tensors_of(1))
    assert told == [("read-waits", "the clips of step 2 have not come for 1:03; waiting for the file of 1")]


def test_who_waits_for_a_read_that_hangs_can_give_up(reading: Reading, told: Told) -> None:
    load = Held()
    with reading(load, 0) as ahead:
        ahead.take(0)
        assert ahead.take(1, lambda: True) is None
    load.free.set()
    assert told == []


def test_workers_that_were_killed_are_started_anew_and_nothing_is_lost(reading: Reading, told: Told) -> None:
    processes = set()
    with reading(Load(), 2) as ahead:
        for step in range(8):
            found = ahead.take(step)
            assert found is not None
            assert same(found[1], tensors_of(step))
            processes.add(found[0])
            if step == 2:
                os.kill(found[0], signal.SIGKILL)
    ((kind, what),) = told
    assert kind == "worker-died"
    assert what.startswith("a process that reads clips ended by SIGKILL; they are started anew at step ")
    assert len(processes) >= 3


def test_workers_that_hang_are_killed_and_started_anew(reading: Reading, told: Told) -> None:
    clock, stopped = Clock(), list[psutil.Process]()

    def look() -> bool:
        clock.pace = 50.0 if stopped and len(told) < 2 else 0.0  # the new ones take their time to start
        return clock.look()

    with reading(Load(), 2, clock) as ahead:
        for step in range(8):
            found = ahead.take(step, look)
            assert found is not None
            assert same(found[1], tensors_of(step))
            if step == 1:
                assert ahead.workers is not None
                stopped = [psutil.Process(process.pid) for process in ahead.workers.context.processes]
                for process in stopped:
                    process.suspend()
    kinds = [kind for kind, _ in told]
    assert kinds == ["read-waits", "worker-hung"]
    assert told[1][1].startswith("the processes that read clips gave nothing for 5:00; they are started anew at step ")
    assert not [process for process in stopped if process.is_running()]


def test_workers_that_die_again_and_again_end_the_run(reading: Reading, told: Told) -> None:
    with reading(Load(dies_from=3), 1) as ahead:
        assert [ahead.take(step) is not None for step in range(3)] == [True] * 3
        with pytest.raises(RunError) as raised:
            ahead.take(3)
    (problem,) = raised.value.problems
    assert problem.code == "read-workers-fail"
    assert problem.what.startswith("a process that reads clips ended by SIGKILL, and so it went 3 times with no step")
    assert problem.where == "step 4, the file of 3"
    assert [kind for kind, _ in told] == ["worker-died"] * (MOST_FAILURES - 1)


def test_no_worker_outlives_the_process_that_started_it(tmp_path: Path) -> None:
    code = """if True:
        import json, signal
        from longtake.data.reading_ahead import ReadingAhead
        from step_loads import Load
        with ReadingAhead(Load(), range(99), 2, print) as ahead:
            print(json.dumps([ahead.take(step)[0] for step in range(4)]), flush=True)
            signal.pause()
    """
    with started([sys.executable, "-c", code], tmp_path / "said", {"PYTHONPATH": str(Path(__file__).parents[1])}) as it:
        it.until(lambda: "]" in it.said.read_text())
        workers = {*json.loads(it.said.read_text())}
        assert len(workers) == 2
        assert workers < {process.pid for process in it.alive}
        it.process.kill()
        it.process.wait()
        _, left = psutil.wait_procs(it.alive, timeout=20)
        assert left == []


@pytest.fixture(autouse=True)
def _leaves_no_worker() -> Iterator[None]:
    """Of any test: those that read for this process end with what they read for."""
    yield
    left = [each for each in psutil.Process().children(recursive=True) if each.ppid() != os.getpid()]
    _, alive = psutil.wait_procs(left, timeout=10)
    assert alive == []
