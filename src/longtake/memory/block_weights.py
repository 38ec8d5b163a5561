"""The frozen weights of a block as flat bytes: over a buffer of the device, and at home in host memory or in files."""

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from longtake.memory.copies import Copies
from longtake.memory.extents import Extent, read
from longtake.memory.flattened import inner_tensors, rebuilt
from longtake.memory.host_buffers import (
    Buffer,
    DiskTier,
    HostTier,
    allocate,
    as_bytes,
    computed,
    copy,
    extents_of,
    settle,
    use,
)
from longtake.models.weight_files import WeightFile

ALIGNMENT = 256
"""Bytes that a weight begins at a multiple of, as in CUDA's own allocations, so that kernels choose the same code."""

FindExtent = Callable[[str, Tensor], Extent | None]
"""Where a parameter of a block, by its name there, lies in a file exactly as the tensor has it in memory."""


@dataclass(frozen=True)
class Weight:
    """A frozen parameter of a block: the path of its module in it, its name there, where its bytes begin."""

    path: str
    name: str
    like: Tensor
    offset: int

    @property
    def key(self) -> str:
        """Its name in the block."""
        return f"{self.path}.{self.name}".lstrip(".")


class Layout:
    """How the frozen parameters of a block lie one after the other in flat bytes."""

    def __init__(self, block: nn.Module) -> None:
        self.weights: list[Weight] = []
        self.nbytes = 0
        for path, module in block.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                if not parameter.requires_grad:
                    like = _on_meta(parameter.data)
                    self.weights.append(Weight(path, name, like, self.nbytes))
                    self.nbytes += sum(_aligned(inner.nbytes) for inner in inner_tensors(like))

    def over(self, memory: Tensor) -> list[nn.Parameter]:
        """The parameters, their bytes in `memory` [nbytes]."""
        return [
            nn.Parameter(_over(weight.like, memory[weight.offset :]), requires_grad=False) for weight in self.weights
        ]

    def without_values(self) -> list[nn.Parameter]:
        """The parameters on `meta`: whoever computes with them fails."""
        return [nn.Parameter(weight.like, requires_grad=False) for weight in self.weights]

    def put(self, block: nn.Module, parameters: list[nn.Parameter]) -> None:
        """Makes `parameters` the block's."""
        for weight, parameter in zip(self.weights, parameters, strict=True):
            block.get_submodule(weight.path)._parameters[weight.name] = parameter

    def of(self, block: nn.Module) -> list[nn.Parameter]:
        """The block's parameters."""
        return [getattr(block.get_submodule(weight.path), weight.name) for weight in self.weights]


class Home:
    """The weights of one block while they are away from the device: flat bytes in `buffer`, in `layout`."""

    def __init__(self, block: nn.Module, layout: Layout, buffer: Buffer, away: list[nn.Parameter]) -> None:
        self.block, self.layout, self.buffer, self.away = block, layout, buffer, away
        layout.put(block, away)

    def put(self, parameters: list[nn.Parameter] | None = None) -> None:
        """The block computes with `parameters`, or, without, is away."""
        self.layout.put(self.block, self.away if parameters is None else parameters)


class Slot:
    """A buffer on the device for the weights of a block, and the parameters that lie in it, of whichever it holds.

    Whoever fills it is its `owner`, who alone knows which block it `holds`.
    """

    def __init__(self, copies: Copies, layout: Layout, device: torch.device) -> None:
        self.buffer = allocate(copies, layout.nbytes, device)
        self.parameters = layout.over(use(copies, self.buffer))
        self.holds: int | None = None
        self.busy = False
        self.owner: object = None


def slots_for(blocks: nn.ModuleList, number: int, copies: Copies) -> list[Slot]:
    """Buffers for `number` blocks like `blocks`, where their trained parameters are: there the others are used."""
    device = next(parameter.device for parameter in blocks.parameters() if parameter.requires_grad)
    layout = Layout(blocks[0])
    return [Slot(copies, layout, device) for _ in range(number)]


@dataclass(frozen=True)
class Waiting:
    """Where blocks' frozen weights wait: in `tier`, from which `copies` bring them to the device.

    `prefix` is the blocks' (`blocks.`), and `files` tell where parameters lie in safetensors files: a weight that is
    there in its final type is read from there.
    """

    copies: Copies
    tier: HostTier | DiskTier
    prefix: str
    files: Mapping[str, WeightFile]

    @contextmanager
    def homes(self, blocks: nn.ModuleList, chosen: Iterable[int]) -> Iterator[dict[int, "Home"]]:
        """Inside the context the weights of the `chosen` blocks are away; all blocks are laid out alike.

        Afterwards they are in host memory, or on `meta` where they came from there and stayed in their file. Raises
        RunError where the host or the disk refuse.
        """
        homes: dict[int, Home] = {}
        left: dict[int, set[str]] = {}
        with finder(self.files) as find:
            for index in chosen:
                block, layout, own = blocks[index], Layout(blocks[index]), find(f"{self.prefix}{index}.")
                assert [weight.key for weight in layout.weights] == [weight.key for weight in Layout(blocks[0]).weights]
                weights = zip(layout.weights, layout.of(block), strict=True)
                left[index] = {weight.key for weight, parameter in weights if parameter.is_meta}
                if isinstance(self.tier, HostTier):
                    homes[index] = home_in_host(block, layout, own, self.tier)
                else:
                    homes[index] = home_in_files(block, layout, own, self.tier, self.copies)
            try:
                yield homes
            finally:
                if not isinstance(self.tier, HostTier):
                    for index, home in homes.items():
                        read_back(home, left[index])


def home_in_host(block: nn.Module, layout: Layout, find: FindExtent, tier: HostTier) -> Home:
    """Moves a block's weights to host memory; those without values are read from their file."""
    buffer = tier.take(layout.nbytes)
    parameters = layout.over(use(tier.copies, buffer))
    for weight, old, new in zip(layout.weights, layout.of(block), parameters, strict=True):
        extent = find(weight.key, old.data) if old.is_meta and not new.is_meta else None
        if extent is not None:
            read(as_bytes(new), (extent,))
            continue
        assert new.is_meta or not old.is_meta, f"{weight.key} has no values"
        for source, target in zip(inner_tensors(old.data), inner_tensors(new.data), strict=True):
            target.copy_(source)
    return Home(block, layout, buffer, parameters)


def home_in_files(block: nn.Module, layout: Layout, find: FindExtent, tier: DiskTier, copies: Copies) -> Home:
    """Leaves a block's weights in the files that have them; those that no file has are written to one of `tier`."""
    extents: list[Extent] = []
    for weight, parameter in zip(layout.weights, layout.of(block), strict=True):
        extent = find(weight.key, parameter.data)
        for inner in inner_tensors(parameter.data):
            found = (extent,) if extent is not None else _spilled(inner, tier, copies)
            extents += [*found, *_filled_gap(found[0], _aligned(inner.nbytes) - inner.nbytes)]
    return Home(block, layout, Buffer(tuple(extents)), layout.without_values())


def read_back(home: Home, left: Collection[str]) -> None:
    """Puts a block's weights from files into plain host memory, but for those that are `left` there, without values."""
    weights = home.layout.weights
    if all(weight.key in left for weight in weights):
        home.put()
        return
    memory = torch.empty(home.layout.nbytes, dtype=torch.uint8)
    read(memory, extents_of(home.buffer))
    parameters = home.layout.over(memory)
    for index, weight in enumerate(weights if left else ()):
        # copies, as the whole block's memory would stay with a view
        inners = [inner.clone() for inner in inner_tensors(parameters[index].data)]
        own = (
            home.away[index] if weight.key in left else nn.Parameter(rebuilt(weight.like, inners), requires_grad=False)
        )
        parameters[index] = own
    home.put(parameters)


def bring(block: nn.Module, find: FindExtent, device: torch.device) -> None:
    """Puts a block's frozen weights on `device`, reading those without values from their file."""
    for path, module in block.named_modules():
        for name, parameter in [*module.named_parameters(recurse=False)]:
            inners = inner_tensors(parameter.data)
            if parameter.requires_grad or all(inner.device == device for inner in inners):
                continue
            if parameter.is_meta:
                extent = find(f"{path}.{name}".lstrip("."), parameter.data)
                assert extent is not None, f"{path}.{name} has no values"
                inners = [torch.empty_like(inner, device="cpu") for inner in inners]
                read(as_bytes(inners[0]), (extent,))
            there = rebuilt(parameter.data, [inner.to(device) for inner in inners])
            module._parameters[name] = nn.Parameter(there, requires_grad=False)


@contextmanager
def finder(files: Mapping[str, WeightFile]) -> Iterator[Callable[[str], FindExtent]]:
    """Yields for a block's prefix (`blocks.3.`) what finds its parameters in `files`, which are open in the context."""
    opened: dict[Path, int] = {}

    def of(prefix: str) -> FindExtent:
        def find(name: str, tensor: Tensor) -> Extent | None:
            file = files.get(prefix + name)
            if file is None or not file.holds(tensor.dtype) or len(inner_tensors(tensor)) != 1:
                return None
            if file.path not in opened:
                opened[file.path] = os.open(file.path, os.O_RDONLY)
            return Extent(opened[file.path], str(file.path), file.start, file.nbytes)

        return find

    try:
        yield of
    finally:
        for descriptor in opened.values():
            with suppress(OSError):
                os.close(descriptor)


def _spilled(tensor: Tensor, tier: DiskTier, copies: Copies) -> tuple[Extent, ...]:
    buffer = tier.take(tensor.nbytes)
    source = computed(copies, tensor.contiguous())
    copy(copies, "outward", buffer, source)
    settle(copies, source)
    return extents_of(buffer)


def _filled_gap(beside: Extent, gap: int) -> list[Extent]:
    """Up to the next weight the ring's buffer gets whatever the file begins with, so that one read fills it all."""
    count = -(-gap // beside.nbytes)
    sizes = [min(beside.nbytes, gap - index * beside.nbytes) for index in range(count)]
    return [Extent(beside.descriptor, beside.path, beside.offset, size) for size in sizes]


def _over(like: Tensor, memory: Tensor) -> Tensor:
    inners, offset = [], 0
    for inner in inner_tensors(like):
        inners.append(memory[offset : offset + inner.nbytes].view(inner.dtype).view(inner.shape))
        offset += _aligned(inner.nbytes)
    return rebuilt(like, inners)


def _on_meta(tensor: Tensor) -> Tensor:
    return rebuilt(
        tensor, [torch.empty(inner.shape, dtype=inner.dtype, device="meta") for inner in inner_tensors(tensor)]
    )


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
