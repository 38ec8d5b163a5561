"""Allocations and frees for the model of the caching allocator, of sizes near those at which its rules change."""

from random import Random

from hypothesis import strategies as st

MIB = 1 << 20
Events = list[tuple[int, int]]


@st.composite
def traces(draw: st.DrawFn) -> Events:
    """A short trace in any order, which need not free all."""
    sizes = st.one_of(
        st.sampled_from([0, 1, 512, MIB, MIB + 1, 10 * MIB - 1, 10 * MIB, 19 * MIB, 20 * MIB, 41 * MIB]),
        st.integers(1, 3 * MIB),
        st.integers(1, 60).map(lambda count: count * MIB),
    )
    events: Events = []
    live: list[int] = []
    for _ in range(draw(st.integers(1, 60))):
        if live and draw(st.integers(0, 9)) < 4:
            events.append((live.pop(draw(st.integers(0, len(live) - 1))), -1))
        else:
            live.append(len(events))
            events.append((len(events), draw(sizes)))
    return events


def in_phases(random: Random, capacity: int) -> Events:
    """Phases with sizes of their own that fill `capacity` bytes and free nearly all: what leaves gaps behind."""
    events: Events = []
    live: dict[int, int] = {}
    for _ in range(random.randint(2, 6)):
        sizes = [random.choice([random.randint(1, 2 * MIB), random.randint(1, 40) * MIB]) for _ in range(4)]
        for _ in range(random.choice([10, 40])):
            size = random.choice(sizes)
            while live and (sum(live.values()) + size > capacity or random.random() < 0.2):
                events.append((_leaves(random, live), -1))
            live[len(events)] = size
            events.append((len(events), size))
        while len(live) > random.choice([0, 2, 5]):
            events.append((_leaves(random, live), -1))
    return events


def _leaves(random: Random, live: dict[int, int]) -> int:
    identity = random.choice(list(live))
    del live[identity]
    return identity
