"""AdamW whose states wait in host memory and stream through the device during the update, a chunk at a time."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from longtake.memory.copies import Copies
from longtake.memory.host_buffers import Buffer, allocate, computed, copy, settle, use

CHUNK_BYTES = 64 * 2**20
"""Bytes of states that are on the device at a time; while they are used, as many more arrive or leave."""
ALIGNMENT = 64
"""Values of fp32 that a parameter begins at a multiple of, in the states and where it is cut: kernels that work on
several values at a time must meet the same ones side by side as in the whole parameter, to give the same bits."""
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class _Piece:
    """Values `start` to `stop` of a parameter, at `offset` in their chunk."""

    parameter: nn.Parameter
    group: int
    start: int
    stop: int
    offset: int


@dataclass(frozen=True)
class _Chunk:
    """Pieces whose states move together; a host buffer for each moment."""

    pieces: list[_Piece]
    host: list[Buffer]


class OffloadedAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW`, to the bit, with both moments in host memory.

    `state` has whole tensors in host memory as the states of a parameter; `finish` before they are read or written.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], lr: float, copies: Copies, chunk_bytes: int = CHUNK_BYTES
    ) -> None:
        """Groups of fp32 parameters on one device; raises RunError where the host refuses the memory."""
        super().__init__(groups, lr=lr)
        self.copies = copies
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        self.device = parameters[0].device
        assert all(p.dtype == torch.float32 and p.is_contiguous() for p in parameters)
        values = sum(_aligned(parameter.numel()) for parameter in parameters)
        most = max(ALIGNMENT, chunk_bytes // (4 * len(MOMENTS)) // ALIGNMENT * ALIGNMENT)
        count = -(-values // most)
        self.chunk_values = _aligned(-(-values // count))
        self.memory = [copies.host(4 * count * self.chunk_values) for _ in MOMENTS]
        for memory in self.memory:
            if not memory.is_meta:
                memory.zero_()
        self._state_in_host(parameters)
        self.chunks = self._chunks(count)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        wanted = [chunk for chunk in self.chunks if any(piece.parameter.grad is not None for piece in chunk.pieces)]
        nbytes = 4 * self.chunk_values
        ring = [[allocate(self.copies, nbytes, self.device) for _ in MOMENTS] for _ in wanted[:2]]
        try:
            self._stream(wanted, ring)
        finally:
            for buffer in (buffer for slot in ring for buffer in slot):
                settle(self.copies, buffer)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.state[parameter]["step"] += 1
        return loss

    def finish(self) -> None:
        """What is in host memory afterwards is what the last step left."""
        for buffer in (buffer for chunk in self.chunks for buffer in chunk.host):
            settle(self.copies, buffer)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the program reads it, not the computation

    def close(self) -> None:
        """Ends the copies; there is no step after it."""
        self.copies.close()

    def _stream(self, chunks: list[_Chunk], ring: list[list[Buffer]]) -> None:
        for index, chunk in enumerate(chunks):
            if index == 0:
                self._fetch(chunk, ring[0])
            if index + 1 < len(chunks):
                self._fetch(chunks[index + 1], ring[(index + 1) % 2])
            slot = ring[index % 2]
            moments = [use(self.copies, buffer).view(torch.float32) for buffer in slot]
            self._update(chunk.pieces, moments)
            for place, (moment, host) in enumerate(zip(moments, chunk.host, strict=True)):
                slot[place] = computed(self.copies, moment)
                copy(self.copies, "outward", host, slot[place])

    def _fetch(self, chunk: _Chunk, slot: list[Buffer]) -> None:
        for target, source in zip(slot, chunk.host, strict=True):
            copy(self.copies, "inward", target, source)

    def _update(self, pieces: list[_Piece], moments: list[Tensor]) -> None:
        """A step of the plain AdamW over views of the parameters, their gradients and what is on the device."""
        chosen: dict[int, list[Tensor]] = {}
        states: dict[Tensor, dict[str, Tensor]] = {}
        for piece in (piece for piece in pieces if piece.parameter.grad is not None):
            view = piece.parameter.detach().view(-1)[piece.start : piece.stop]
            assert piece.parameter.grad is not None
            view.grad = piece.parameter.grad.reshape(-1)[piece.start : piece.stop]
            inside = slice(piece.offset, piece.offset + len(view))
            states[view] = {name: moment[inside] for name, moment in zip(MOMENTS, moments, strict=True)}
            states[view]["step"] = self.state[piece.parameter]["step"].clone()
            chosen.setdefault(piece.group, []).append(view)
        groups = [{**self.param_groups[group], "params": views} for group, views in chosen.items()]
        plain = torch.optim.AdamW(groups)
        plain.state.update(states)
        plain.step()

    def _state_in_host(self, parameters: list[nn.Parameter]) -> None:
        first = 0
        for parameter in parameters:
            inside = slice(first, first + parameter.numel())
            moments = [memory.view(torch.float32)[inside].view(parameter.shape) for memory in self.memory]
            self.state[parameter] = {"step": torch.tensor(0.0), **dict(zip(MOMENTS, moments, strict=True))}
            first += _aligned(parameter.numel())

    def _chunks(self, count: int) -> list[_Chunk]:
        """All of one size: a copy needs as many bytes on both sides."""
        pieces: list[list[_Piece]] = [[] for _ in range(count)]
        first = 0
        for index, group in enumerate(self.param_groups):
            for parameter in group["params"]:
                for chunk, start, stop in self._cuts(first, parameter.numel()):
                    offset = first + start - chunk * self.chunk_values
                    pieces[chunk].append(_Piece(parameter, index, start, stop, offset))
                first += _aligned(parameter.numel())
        nbytes = 4 * self.chunk_values
        return [
            _Chunk(own, [Buffer(memory[index * nbytes : (index + 1) * nbytes]) for memory in self.memory])
            for index, own in enumerate(pieces)
        ]

    def _cuts(self, first: int, values: int) -> Iterator[tuple[int, int, int]]:
        """(chunk, start, stop) of the parts of a parameter whose states begin at value `first`."""
        start = 0
        while start < values:
            chunk = (first + start) // self.chunk_values
            stop = min(values, (chunk + 1) * self.chunk_values - first)
            yield chunk, start, stop
            start = stop


def _aligned(values: int) -> int:
    return -(-values // ALIGNMENT) * ALIGNMENT
