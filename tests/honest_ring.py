"""A program that keeps the protocol of `host_buffers`: tensors go out to a tier and come back through a ring of two."""

import random
from collections.abc import Callable

import torch
from torch import Tensor

from longtake.memory.copies import Copies
from longtake.memory.host_buffers import Buffer, Tier, allocate, computed, copy, done, settle, use

STEPS, VALUES = 20, 96
MakeTier = Callable[[Copies], Tier]


def run(copies: Copies, tier: Tier, device: torch.device, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """What came back in each step, and what should have."""
    chance = random.Random(seed)
    ring = [allocate(copies, 4 * VALUES, device) for _ in range(2)]
    kept: list[tuple[Buffer, float]] = []
    leaving: list[Buffer] = []
    coming: list[tuple[Buffer, float]] = []
    found, wanted = [], []
    for step in range(STEPS):
        if step < 2 or chance.random() < 0.6:
            kept.append((_put_out(copies, tier, device, float(step), leaving), float(step)))
        while len(leaving) > chance.randrange(3):
            settle(copies, leaving.pop(0))
        if len(kept) > 4:
            # Its copies may still be under way: the buffer knows, and the next to take it waits for them.
            tier.give_back(kept.pop(chance.randrange(len(kept)))[0])
        home, value = chance.choice(kept)
        slot = ring[step % 2]
        copy(copies, "inward", slot, home)
        coming.append((slot, value))
        if step and (step == STEPS - 1 or len(coming) == 2):
            _consume(copies, *coming.pop(0), found, wanted)
    while coming:
        _consume(copies, *coming.pop(0), found, wanted)
    for buffer in (*leaving, *ring):
        settle(copies, buffer)
    return found, wanted


def _put_out(copies: Copies, tier: Tier, device: torch.device, value: float, leaving: list[Buffer]) -> Buffer:
    home = tier.take(4 * VALUES)
    leaving.append(computed(copies, torch.full((VALUES,), value, device=device).add(0.5)))
    copy(copies, "outward", home, leaving[-1])
    return home


def _consume(copies: Copies, slot: Buffer, value: float, found: list[Tensor], wanted: list[Tensor]) -> None:
    found.append(use(copies, slot).view(torch.float32).mul(2.0))
    done(copies, slot)
    wanted.append(torch.full((VALUES,), 2.0 * (value + 0.5)))
