"""A clock that is set while a run goes on is noticed, and one that only runs is not."""

import pytest

from longtake.training.clock_watch import ClockWatch


class Clocks:
    """The machine's clock and one that only goes forward, both of which a test sets."""

    def __init__(self) -> None:
        self.wall, self.steady = 1.8e9, 50.0

    def pass_(self, seconds: float, set_by: float = 0.0) -> None:
        self.steady += seconds
        self.wall += seconds + set_by


@pytest.mark.parametrize(
    ("set_by", "said"),
    [
        (-3 * 3600.0, "the clock was set back by 3:00:00"),
        (86400.0 * 365, "the clock was set forward, or the machine slept, by 8760:00:00"),
        (61.0, "the clock was set forward, or the machine slept, by 1:01"),
        (-59.0, ""),
        (0.0, ""),
    ],
)
def test_a_jump_of_a_minute_or_more_is_said_once(set_by: float, said: str) -> None:
    clocks = Clocks()
    watch = ClockWatch(lambda: clocks.wall, lambda: clocks.steady)
    clocks.pass_(1e6)
    assert watch.jumped() == ""
    clocks.pass_(41.0, set_by)
    assert watch.jumped() == said
    clocks.pass_(1e5)
    assert watch.jumped() == ""


def test_a_clock_that_is_kept_right_little_by_little_is_not_said() -> None:
    clocks = Clocks()
    watch = ClockWatch(lambda: clocks.wall, lambda: clocks.steady)
    for _ in range(100):
        clocks.pass_(600.0, 0.5)
        assert watch.jumped() == ""
