"""Signals: the first is noted, the second has its usual effect, also among ranks, and what was ignored stays so."""

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from longtake.training import interrupt
from longtake.training.interrupt import stop_request


class Told(Exception):
    """What the handler of these tests raises."""


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    def tell(number: int, _frame: object) -> None:
        raise Told(number)

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.signal(number, tell) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_the_first_signal_is_noted(name: str) -> None:
    with stop_request() as stop:
        assert not stop.signal
        os.kill(os.getpid(), signal.Signals[name])
        assert stop.signal == name


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_the_second_signal_has_its_usual_effect(second: signal.Signals) -> None:
    with stop_request() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Told):
            os.kill(os.getpid(), second)
        assert stop.signal == "SIGINT"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_rank_takes_what_its_launcher_passes_on_for_the_same_request(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    with stop_request() as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.Signals[name])
            assert stop.signal == name
    with pytest.raises(Told):
        os.kill(os.getpid(), signal.Signals[name])


def test_to_a_rank_another_signal_or_the_same_one_later_has_its_usual_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    with stop_request() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Told):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == "SIGTERM"
    monkeypatch.setattr(interrupt, "REPEATED_WITHIN", 0.0)
    with stop_request() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Told):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == "SIGTERM"


def test_afterwards_signals_are_as_before() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_request():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_under_nohup_the_end_of_the_terminal_does_not_stop_a_run() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stop_request() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.signal
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == "SIGTERM"
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_beside_the_main_thread_nothing_is_taken_over() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work() -> None:
        with stop_request() as stop:
            seen.append((stop.signal, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [("", before)]
