"""Block swap: which weights are on the device when, what is copied, from where, and that faults in it are found."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longtake.config.schema import LoraConfig, MemoryStrategy, ModelConfig
from longtake.errors import ConfigError, RunError
from longtake.lora import attach
from longtake.memory.block_swap import Ring, swapped_blocks
from longtake.memory.copies import CpuCopies, Event, Place, Queue
from longtake.memory.quantization import quantize_blocks
from longtake.memory.strategy import apply
from longtake.models.wan.tiny import bundled
from longtake.models.wan.variants import variant
from longtake.models.wan.weights import Loading, load_transformer, locate, weight_files
from longtake.models.weight_files import WeightFile
from race_checker import CheckedCopies, Race, Unread
from tiny_steps import Load, accumulated, assert_equal, inputs, loader

NAME = "tiny-i2v"
SPEC = variant(NAME).spec
CPU = torch.device("cpu")
ALL = MemoryStrategy(block_swap=4)
ALL_FROM_DISK = MemoryStrategy(block_swap=4, block_swap_from="disk")


class Counted(CpuCopies):
    """Counts the copies of each queue and their bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.copied: dict[Queue, list[int]] = {"inward": [], "outward": []}

    def start(self, queue: Queue, target: Place, source: Place, after: Sequence[Event]) -> Event:
        """Counts."""
        place = target if isinstance(target, Tensor) else source
        assert isinstance(place, Tensor)
        self.copied[queue].append(place.nbytes)
        return super().start(queue, target, source, after)


@contextmanager
def counted() -> Iterator[Counted]:
    """An engine that counts."""
    copies = Counted()
    try:
        yield copies
    finally:
        copies.close()


def frozen_bytes(block: torch.nn.Module) -> int:
    """Bytes of a block's frozen weights."""
    return sum(parameter.nbytes for parameter in block.parameters() if not parameter.requires_grad)


@pytest.mark.parametrize(("count", "number", "chosen"), [(4, 4, (0, 1, 2, 3)), (8, 4, (0, 2, 4, 6)), (5, 3, (0, 1, 3))])
def test_blocks_that_are_swapped_are_spread_evenly(count: int, number: int, chosen: tuple[int, ...]) -> None:
    assert swapped_blocks(count, number) == chosen


def test_a_step_fetches_each_block_once_a_pass_but_for_those_in_the_ring_and_copies_nothing_back(
    load: Load, tmp_path: Path
) -> None:
    model = load(NAME, True)
    with counted() as copies, apply(model, SPEC, ALL, tmp_path, copies=copies):
        accumulated(model, NAME)  # two micro-batches
        first = len(copies.copied["inward"])
        accumulated(model, NAME)
    assert first == 4 + 2 * 2 + 2  # the first forward pass fetches all four, each other pass the two that it lacks
    assert len(copies.copied["inward"]) - first == 4 * 2
    assert not copies.copied["outward"]
    assert set(copies.copied["inward"]) == {copies.copied["inward"][0]}
    assert frozen_bytes(model.blocks[0]) <= copies.copied["inward"][0] < 1.05 * frozen_bytes(model.blocks[0])


def test_blocks_that_are_away_cannot_be_computed_with(load: Load, tmp_path: Path) -> None:
    model = load(NAME, True)
    there: list[list[int]] = []

    def look(*_: Any) -> None:
        there.append([index for index, block in enumerate(model.blocks) if not block.attn1.norm_q.weight.is_meta])

    with apply(model, SPEC, ALL_FROM_DISK, tmp_path), ExitStack() as hooks:
        for block in model.blocks:
            hooks.callback(block.ffn.register_forward_hook(look).remove)
        with torch.no_grad():
            model(**inputs(NAME))
        assert there == [[0], [1], [2], [3]]
        there.clear()
        loss = model(**inputs(NAME), return_dict=False)[0].sum()
        loss.backward()
        assert there[:4] == [[0], [1], [2], [3]]
        assert all(block in among and len(among) <= 2 for block, among in zip([3, 2, 1, 0], there[4:], strict=True))
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_afterwards_the_weights_are_what_they_were(load: Load, tmp_path: Path) -> None:
    model = load(NAME, True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for strategy in (ALL, ALL_FROM_DISK):
        with apply(model, SPEC, strategy, tmp_path):
            accumulated(model, NAME)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("source", ["host", "disk"])
def test_weights_that_were_never_loaded_are_read_from_their_safetensors_file(
    load: Load, tiny_root: Callable[[str], Path], tmp_path: Path, source: Any, dtype: torch.dtype
) -> None:
    files = locate(ModelConfig(path=str(tiny_root(NAME)), name=NAME), bundled, print)
    places = weight_files(files, "transformer")

    def unread(name: str) -> torch.device | None:
        in_file = places[name].dtype == (torch.float32 if any(part in name for part in SPEC.keep_fp32) else dtype)
        return None if name.startswith("blocks.") and in_file else CPU

    model = load_transformer(files, "transformer", dtype, CPU, Loading(unread))
    attach(model, LoraConfig(rank=2), 0, CPU)
    trained = {name: tensor for name, tensor in load(NAME, True).named_parameters() if tensor.requires_grad}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(trained[name])
    assert model.blocks[0].attn1.to_q.base_layer.weight.is_meta == (dtype == torch.float32)
    named = {_wrapped(name, model): place for name, place in places.items()}
    whole = load_transformer(files, "transformer", dtype, CPU)
    attach(whole, LoraConfig(rank=2), 0, CPU)
    whole.load_state_dict(trained, strict=False)
    results = []
    for other, given in ((whole, {}), (model, named)):
        strategy = MemoryStrategy(block_swap=4, block_swap_from=source) if given else MemoryStrategy()
        with (
            apply(other, SPEC, strategy, tmp_path / "scratch", given),
            torch.autocast("cpu", enabled=dtype != torch.float32),
        ):
            results.append(accumulated(other, NAME))
            spilled = sum(file.stat().st_size for file in (tmp_path / "scratch").rglob("*.bin"))
            assert spilled == 0 or dtype != torch.float32
    assert_equal(results[1], results[0], 0.0, source)


def _wrapped(name: str, model: torch.nn.Module) -> str:
    path, _, leaf = name.rpartition(".")
    return f"{path}.base_layer.{leaf}" if hasattr(model.get_submodule(path), "base_layer") else name


def test_a_file_that_was_cut_short_is_an_error_that_names_it(tiny_root: Callable[[str], Path], tmp_path: Path) -> None:
    model = loader(tiny_root)(NAME, True)
    weight = model.blocks[0].attn1.to_q.base_layer.weight
    short = tmp_path / "short.safetensors"
    short.write_bytes(bytes(weight.nbytes - 1))
    files = {"blocks.0.attn1.to_q.base_layer.weight": WeightFile(short, 0, weight.nbytes, weight.dtype)}
    with (
        pytest.raises(RunError, match=r"short\.safetensors: the file ended early"),
        apply(model, SPEC, ALL_FROM_DISK, tmp_path / "scratch", files),
    ):
        accumulated(model, NAME)


@pytest.mark.parametrize("kind", ["int8", "fp8", "nf4"])
@pytest.mark.parametrize("strategy", [ALL, ALL_FROM_DISK, ALL.model_copy(update={"slices": 2})])
def test_quantised_weights_stream_as_they_are(
    tiny_root: Callable[[str], Path], tmp_path: Path, kind: Any, strategy: MemoryStrategy
) -> None:
    model = loader(tiny_root)(NAME, True)
    whole = frozen_bytes(model.blocks[0])
    quantize_blocks(model, SPEC, kind)
    resident = strategy.model_copy(update={"block_swap": 0, "block_swap_from": "host", "quantization": kind})
    with apply(model, SPEC, resident, tmp_path):
        plain = accumulated(model, NAME)
    with (
        counted() as copies,
        apply(model, SPEC, strategy.model_copy(update={"quantization": kind}), tmp_path, copies=copies),
    ):
        found = accumulated(model, NAME)
    assert_equal(found, plain, 0.0, kind)
    assert max(copies.copied["inward"]) < whole / (5 if kind == "nf4" else 3)


def test_two_experts_stream_side_by_side(tiny_root: Callable[[str], Path], tmp_path: Path) -> None:
    high, low = (loader(tiny_root)(NAME, True) for _ in range(2))
    plain = accumulated(high, NAME), accumulated(low, NAME)
    strategy = ALL.model_copy(update={"activation_offload": "disk"})
    with CheckedCopies(1).watching() as copies, ExitStack() as stack:
        stack.enter_context(apply(high, SPEC, strategy, tmp_path / "high", copies=copies))
        stack.enter_context(apply(low, SPEC, ALL_FROM_DISK, tmp_path / "low", copies=copies))
        for _ in range(2):
            assert_equal(accumulated(high, NAME), plain[0], 0.0, "high")
            assert_equal(accumulated(low, NAME), plain[1], 0.0, "low")


def test_a_step_that_broke_off_does_not_spoil_the_next(load: Load, tmp_path: Path) -> None:
    model = load(NAME, True)
    plain = accumulated(model, NAME)

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError

    with apply(model, SPEC, ALL.model_copy(update={"activation_offload": "host"}), tmp_path):
        for block in model.blocks:
            for module in (block.norm1, block.ffn):
                handle = module.register_forward_pre_hook(fail)
                with pytest.raises(torch.OutOfMemoryError):
                    accumulated(model, NAME)
                handle.remove()
            backward = block.ffn.register_full_backward_pre_hook(fail)
            with pytest.raises(torch.OutOfMemoryError):
                accumulated(model, NAME)
            backward.remove()
            assert_equal(accumulated(model, NAME), plain, 0.0, "after a failure")


def test_another_strategy_finds_weights_where_the_one_before_left_them(
    tiny_root: Callable[[str], Path], tmp_path: Path
) -> None:
    files = locate(ModelConfig(path=str(tiny_root(NAME)), name=NAME), bundled, print)
    model = load_transformer(
        files, "transformer", torch.float32, CPU, Loading(lambda name: None if name.startswith("blocks.") else CPU)
    )
    attach(model, LoraConfig(rank=2), 0, CPU)
    named = {_wrapped(name, model): place for name, place in weight_files(files, "transformer").items()}
    strategies = (ALL_FROM_DISK, MemoryStrategy(block_swap=3, block_swap_from="disk"), MemoryStrategy(block_swap=3))
    found = []
    for strategy in (*strategies, MemoryStrategy(), ALL):
        with apply(model, SPEC, strategy, tmp_path, named):
            found.append(accumulated(model, NAME))
    for other in found[1:]:
        assert_equal(other, found[0], 0.0, "another strategy")


def test_more_blocks_than_the_model_has_are_refused(load: Load, tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match=r"memory\.block_swap: the model has 4 blocks; at most 4"),
        apply(load(NAME, True), SPEC, MemoryStrategy(block_swap=5), tmp_path),
    ):
        pass


def test_all_weights_trained_leave_nothing_to_stream(load: Load, tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match=r"memory\.block_swap: all weights are trained"),
        apply(load(NAME, False), SPEC, ALL, tmp_path),
    ):
        pass


class NeverWaits(CheckedCopies):
    """The computation goes on before a copy is done."""

    def wait(self, event: Event) -> None:
        """Does not."""


class SeesNoReader(CheckedCopies):
    """What the computation has read is forgotten: buffers are filled anew at once."""

    def reached(self) -> Event:
        """Long ago."""
        if not hasattr(self, "first"):
            self.first = super().reached()
        return self.first


@pytest.mark.parametrize("strategy", [ALL, ALL_FROM_DISK, MemoryStrategy(activation_offload="disk")])
@pytest.mark.parametrize("faulty", [NeverWaits, SeesNoReader])
def test_a_planted_missing_wait_and_a_planted_early_reuse_are_found(
    load: Load, tmp_path: Path, strategy: MemoryStrategy, faulty: type[CheckedCopies]
) -> None:
    model = load(NAME, True)
    with (
        pytest.raises(Race),
        faulty(0).watching() as copies,
        apply(model, SPEC, strategy, tmp_path, copies=copies),
    ):
        accumulated(model, NAME)


def test_a_planted_wrong_prefetch_order_is_found(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(NAME, True)
    monkeypatch.setattr(Ring, "_backward_order", lambda ring: iter(sorted(ring.homes)))
    with (
        pytest.raises(Unread),
        CheckedCopies(0).watching() as copies,
        apply(model, SPEC, ALL, tmp_path, copies=copies),
    ):
        accumulated(model, NAME)
