from typing import Any

import torch

from longtake.memory.host_buffers import HostTier, allocate, computed, copy
from longtake.planner.events import Copy
from longtake.planner.ledger import Ledger
from longtake.planner.planned_copies import PlannedCopies

META = torch.device("meta")


def test_copies_are_counted_each_way_and_what_they_fill_is_a_buffer_but_host_memory_is_not() -> None:
    ledger = Ledger()
    log: list[Any] = []
    copies = PlannedCopies(ledger, log)
    slot = allocate(copies, 1000, META)  # before the ledger watches, as a ring is
    with ledger:
        waiting = HostTier(copies).take(1000)
        copy(copies, "outward", waiting, computed(copies, torch.empty(1000, dtype=torch.uint8, device=META)))
        copy(copies, "inward", slot, waiting)
    assert copies.moved == {"outward": 1000, "inward": 1000}
    assert copies.host_bytes == 1000
    assert +ledger.now == {"buffers": 1024}
    assert copies.on_device([waiting._place.view(10, 100), slot._place]) == [slot._place]
    assert [(item.queue, item.where) for item in log if isinstance(item, Copy)] == [
        ("outward", "host"),
        ("inward", "host"),
    ]


def test_what_goes_to_a_file_is_on_disk_and_a_file_that_is_there_needs_none() -> None:
    log: list[Any] = []
    copies = PlannedCopies(Ledger(), log)
    for allocate_there, needed in ((copies.disk, 64), (copies.file, 64)):
        away = HostTier(copies, allocate_there).take(64)
        copy(copies, "inward", allocate(copies, 64, META), away)
        assert log[-1].where == "disk"
        assert copies.disk_bytes == needed
    assert copies.host_bytes == 0
