"""Activation offload: what a block keeps for backward waits in host memory or on disk, and comes back in time.

A copy out runs while the next blocks are computed, a copy back while the block after it in the backward pass is.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from torch import Tensor

from longtake.memory.copies import Copies
from longtake.memory.host_buffers import (
    Buffer,
    Keep,
    Kept,
    Tier,
    allocate,
    as_bytes,
    computed,
    copy,
    done,
    settle,
    use,
)

IN_FLIGHT = 2
"""Groups whose tensors stay on the device while they are copied out.

The last two of a forward pass are then still there when backward begins with them, and as many are there in all of
backward: the one in use and the one that is fetched.
"""


@contextmanager
def activation_offload(copies: Copies, tier: Tier) -> Iterator[Callable[[int], Keep]]:
    """Yields for a group, the number of a block or of a segment of blocks, the `Keep` that moves tensors to `tier`.

    Groups are kept in the order of the forward pass and asked for in the order of the backward pass: when a tensor of
    one group is taken, those of the group before it are fetched. Keeping raises RunError where host or disk refuse.
    """
    store = _Store(copies, tier)
    try:
        yield lambda group: partial(store.keep, group)
    finally:
        store.close()


class _Entry:
    """One tensor that is away, or on its way."""

    def __init__(self, group: int, tensor: Tensor, buffer: Buffer) -> None:
        self.group = group
        # The layout as it lies in memory: attention's output is a transposed view.
        strides = tensor.stride()
        self.order = sorted(range(tensor.ndim), key=lambda axis: (-strides[axis], axis))
        self.dense = tensor.permute(self.order).contiguous()
        self.shape, self.dtype, self.device = self.dense.shape, tensor.dtype, tensor.device
        self.buffer = buffer
        self.source: Buffer | None = None
        self.landing: Buffer | None = None

    def tensor_of(self, memory: Tensor) -> Tensor:
        """The tensor as it was, over flat bytes."""
        dense = memory.view(self.dtype).view(self.shape)
        return dense.permute([self.order.index(axis) for axis in range(len(self.order))])


class _Store:
    def __init__(self, copies: Copies, tier: Tier) -> None:
        self.copies, self.tier = copies, tier
        self.away: list[_Entry] = []  # in the order of the forward pass

    def keep(self, group: int, tensor: Tensor) -> Kept:
        """Starts to move `tensor` out."""
        self._let_go(group)
        entry = _Entry(group, tensor.detach(), self.tier.take(tensor.nbytes))
        entry.source = computed(self.copies, entry.dense)
        copy(self.copies, "outward", entry.buffer, entry.source)
        self.away.append(entry)
        return _Kept(self, entry)

    def take(self, entry: _Entry) -> Tensor:
        """The tensor, on the device; what the backward pass wants next is on its way afterwards."""
        assert entry in self.away, "what is kept is given back once: a graph has one backward pass"
        position = self.away.index(entry)
        self._fetch(entry)
        self.away.remove(entry)
        for earlier in self._group_before(position, entry.group):
            self._fetch(earlier)
        if entry.source is not None:
            memory = as_bytes(entry.dense)
        else:
            assert entry.landing is not None
            memory = use(self.copies, entry.landing)
            done(self.copies, entry.landing)
        self.tier.give_back(entry.buffer)
        return entry.tensor_of(memory)

    def drop(self, entry: _Entry) -> None:
        """Forgets what no backward pass will ask for."""
        if entry not in self.away:
            return
        self.away.remove(entry)
        for buffer in (entry.source, entry.landing):
            if buffer is not None:
                settle(self.copies, buffer)
        self.tier.give_back(entry.buffer)

    def close(self) -> None:
        """Waits for what is on its way."""
        for entry in [*self.away]:
            self.drop(entry)

    def _let_go(self, group: int) -> None:
        """Tensors of groups before the last ones leave the device once they are copied."""
        staying = [*dict.fromkeys([group, *(entry.group for entry in reversed(self.away))])][: IN_FLIGHT + 1]
        for entry in self.away:
            if entry.source is not None and entry.group not in staying[:IN_FLIGHT]:
                settle(self.copies, entry.source)
                entry.source = None
                del entry.dense

    def _fetch(self, entry: _Entry) -> None:
        if entry.source is None and entry.landing is None:
            entry.landing = allocate(self.copies, entry.buffer.nbytes, entry.device)
            copy(self.copies, "inward", entry.landing, entry.buffer)

    def _group_before(self, position: int, group: int) -> list[_Entry]:
        """The entries of the nearest other group before `position`."""
        earlier = [entry for entry in self.away[:position] if entry.group != group]
        return [entry for entry in earlier if entry.group == earlier[-1].group] if earlier else []


class _Kept:
    """Given to autograd, which drops it with the graph."""

    def __init__(self, store: _Store, entry: _Entry) -> None:
        self.store, self.entry = store, entry

    def __call__(self) -> Tensor:
        return self.store.take(self.entry)

    def __del__(self) -> None:
        self.store.drop(self.entry)


def keep_first(moved: int, keep_for: Callable[[int], Keep], otherwise: Keep) -> Callable[[int], Keep]:
    """Moves what the first `moved` groups keep, which waits longest."""
    return lambda group: keep_for(group) if group < moved else otherwise
