"""Whether the machine's clock was set while a run goes on, which no measured time depends on."""

import time
from collections.abc import Callable

from longtake.units import format_seconds

JUMP_SECONDS = 60.0
"""What the clock has to move by, between two looks, to count; one that is kept right by a network moves by less."""


class ClockWatch:
    """Compares the clock, `wall`, with `steady`, which only goes forward and always at one pace."""

    def __init__(self, wall: Callable[[], float] | None = None, steady: Callable[[], float] = time.monotonic) -> None:
        self.wall = wall or time.time
        self.steady = steady
        self.apart = self.wall() - steady()

    def jumped(self) -> str:
        """How the clock has been set since the last look, in words; empty where it has not."""
        before, self.apart = self.apart, self.wall() - self.steady()
        moved = self.apart - before
        if abs(moved) < JUMP_SECONDS:
            return ""
        way = "forward, or the machine slept," if moved > 0 else "back"
        return f"the clock was set {way} by {format_seconds(abs(moved))}"
