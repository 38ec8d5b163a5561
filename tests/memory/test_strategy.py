"""Memory strategies: losses and gradients to the bit, what is moved, and what is left behind: nothing."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from longtake.config.schema import MemoryStrategy
from longtake.errors import ConfigError, RunError
from longtake.memory.strategy import apply, ladder
from longtake.models.wan.variants import variant
from race_checker import CheckedCopies
from tiny_steps import Load, accumulated, assert_equal, dropout, inputs

BLOCKS, DIM = 4, 160
PLAIN = MemoryStrategy(gradient_checkpointing="none")
MODELS = ("tiny-t2v", "tiny-i2v", "tiny-ti2v")


def combinations() -> Iterator[MemoryStrategy]:
    """Every setting with every other that it can go with, in one of its values at least."""
    kinds: tuple[Any, ...] = ("block", "block_keep_attention")
    for kind, offload in product(kinds, ("none", "host", "disk")):
        kept = MemoryStrategy(gradient_checkpointing=kind, activation_offload=offload)
        yield from (kept, kept.model_copy(update={"checkpoint_every": 2}))
        yield kept.model_copy(update={"checkpoint_every": 3 if kind == "block" else 4})
        for source, count in (("host", 4), ("disk", 3)):
            swapped = {"block_swap": count, "block_swap_from": source}
            yield kept.model_copy(update=swapped)
            yield kept.model_copy(update=swapped | {"block_swap": 4, "checkpoint_every": 2})
            yield kept.model_copy(update=swapped | {"slices": 3, "attention_head_groups": 2})
        yield kept.model_copy(update={"slices": 5})
        yield kept.model_copy(update={"attention_head_groups": 5})
        if offload != "none":
            yield kept.model_copy(update={"activation_offload_fraction": 0.5})


COMBINATIONS = [*combinations()]
DISK = MemoryStrategy(activation_offload="disk")


def test_there_are_many_combinations_and_none_twice() -> None:
    assert len({str(strategy) for strategy in COMBINATIONS}) == len(COMBINATIONS) > 25


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_the_plain_model(load: Load, tmp_path: Path, name: str, lora: bool) -> None:
    """To the bit, dropout included, unless slices re-order sums: within 1e-5 then."""
    model, spec = load(name, lora), variant(name).spec
    with apply(model, spec, PLAIN, tmp_path):
        loss, gradients = accumulated(model, name)
    assert len(gradients) == sum(parameter.requires_grad for parameter in model.parameters())
    assert all(gradient.any() for key, gradient in gradients.items() if "lora" in key)
    for strategy in COMBINATIONS:
        if strategy.block_swap and not lora:
            continue  # there is nothing frozen to stream
        with apply(model, spec, strategy, tmp_path):
            found = accumulated(model, name)
        bound = 1e-5 if strategy.slices > 1 or strategy.attention_head_groups > 1 else 0.0
        assert_equal(found, (loss, gradients), bound, str(strategy))


def test_dropout_is_drawn_again_as_it_was(load: Load, tmp_path: Path) -> None:
    model, spec = load("tiny-i2v", True), variant("tiny-i2v").spec
    with dropout(model, 0.3):
        with apply(model, spec, PLAIN, tmp_path):
            plain = accumulated(model, "tiny-i2v")
        for strategy in COMBINATIONS:
            if strategy.slices == strategy.attention_head_groups == 1:
                with apply(model, spec, strategy, tmp_path):
                    assert_equal(accumulated(model, "tiny-i2v"), plain, 0.0, str(strategy))
        sliced = MemoryStrategy(slices=2)
        with pytest.raises(ConfigError, match=r"memory\.slices.*dropout"), apply(model, spec, sliced, tmp_path):
            pass
    assert not torch.equal(plain[0], accumulated(model, "tiny-i2v")[0])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["tiny-i2v", "tiny-ti2v"])
def test_no_copy_is_read_before_it_is_done_and_no_buffer_filled_before_it_is_read(
    load: Load, tmp_path: Path, name: str, seed: int
) -> None:
    """Copies run as late as they may, in an order of their own for each seed; every read and write is checked."""
    model, spec = load(name, True), variant(name).spec
    plain = accumulated(model, name)
    for strategy in COMBINATIONS[seed::4]:
        if strategy.activation_offload == "none" and not strategy.block_swap:
            continue
        with CheckedCopies(seed).watching() as copies, apply(model, spec, strategy, tmp_path, copies=copies):
            found = accumulated(model, name)
        bound = 1e-5 if strategy.slices > 1 or strategy.attention_head_groups > 1 else 0.0
        assert_equal(found, plain, bound, str(strategy))


@pytest.mark.parametrize(("fraction", "moved"), [(1.0, 4), (0.5, 2), (0.25, 1), (0.0, 0)])
def test_the_early_blocks_hidden_states_are_moved_and_nothing_else(
    load: Load, tmp_path: Path, fraction: float, moved: int
) -> None:
    model, given = load("tiny-i2v", True), inputs("tiny-i2v")
    strategy = MemoryStrategy(activation_offload="disk", activation_offload_fraction=fraction)
    hidden_bytes = 2 * 3 * 2 * 2 * DIM * 4
    with apply(model, variant("tiny-i2v").spec, strategy, tmp_path):
        for _ in range(2):  # the files are used again
            model(**given, return_dict=False)[0].square().mean().backward()
            assert [file.stat().st_size for file in tmp_path.rglob("*.bin")] == [hidden_bytes] * moved


def test_the_strategy_is_gone_afterwards_even_after_a_failure(load: Load, tmp_path: Path) -> None:
    model, spec = load("tiny-t2v", True), variant("tiny-t2v").spec
    scratch = tmp_path / "scratch"

    def fail_inside() -> None:
        with apply(model, spec, DISK, scratch):
            model(**inputs("tiny-t2v"))
            assert model.is_gradient_checkpointing
            assert scratch.is_dir()
            raise ValueError

    with pytest.raises(ValueError):
        fail_inside()
    assert not scratch.exists()
    assert not model.is_gradient_checkpointing


def test_what_a_killed_run_left_is_removed_at_the_next_start(load: Load, tmp_path: Path) -> None:
    killed = (
        "import os, signal, sys, torch; from pathlib import Path\n"
        "from longtake.memory.activation_offload import activation_offload\n"
        "from longtake.memory.copies import CpuCopies\n"
        "from longtake.memory.host_buffers import disk_tier\n"
        "with disk_tier(Path(sys.argv[1]), 'activations') as tier, activation_offload(CpuCopies(), tier) as keep_for:\n"
        "    kept = keep_for(0)(torch.ones(8))\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run([sys.executable, "-c", killed, str(tmp_path)], env=os.environ, check=False)
    assert ended.returncode == -9
    assert len([*tmp_path.rglob("*.bin")]) == 1
    with apply(load("tiny-t2v", True), variant("tiny-t2v").spec, DISK, tmp_path):
        assert not [*tmp_path.rglob("*.bin")]
        assert len([*tmp_path.iterdir()]) == 1


def test_two_runs_in_one_scratch_folder_leave_each_other_theirs(load: Load, tmp_path: Path) -> None:
    other = tmp_path / "notes.txt"
    other.write_text("not ours")
    with apply(load("tiny-t2v", True), variant("tiny-t2v").spec, DISK, tmp_path):
        pass
    assert [*tmp_path.iterdir()] == [other]


def test_a_refusing_disk_is_an_error_that_says_so(load: Load, tmp_path: Path) -> None:
    model = load("tiny-t2v", True)
    with apply(model, variant("tiny-t2v").spec, DISK, tmp_path):
        (store,) = tmp_path.iterdir()
        store.rmdir()
        with pytest.raises(RunError, match="cannot offload 15360 bytes"):
            model(**inputs("tiny-t2v"))


def test_checkpointing_keeps_a_fraction_of_what_the_plain_model_keeps(load: Load, tmp_path: Path) -> None:
    model, spec = load("tiny-t2v", False), variant("tiny-t2v").spec
    kept = {}
    for label, strategy in {"none": PLAIN, "block": MemoryStrategy()}.items():
        with apply(model, spec, strategy, tmp_path), _counting(model) as count:
            model(**inputs("tiny-t2v"), return_dict=False)[0].square().mean()
        kept[label] = count["bytes"]
    assert kept["block"] < kept["none"] / 4


@contextmanager
def _counting(model: nn.Module) -> Iterator[dict[str, int]]:
    """Bytes that autograd keeps for backward, weights left out and each storage counted once."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held: dict[int, Tensor] = {}  # kept alive, so that no address comes twice
    count = {"bytes": 0}

    def pack(tensor: Tensor) -> Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in weights and pointer not in held:
            held[pointer] = tensor.detach()
            count["bytes"] += tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield count


def test_what_cannot_work_is_refused(load: Load, tmp_path: Path) -> None:
    strategy = MemoryStrategy(gradient_checkpointing="none", activation_offload="disk")
    with (
        pytest.raises(ConfigError, match=r"memory\.activation_offload"),
        apply(load("tiny-t2v", True), variant("tiny-t2v").spec, strategy, tmp_path / "scratch"),
    ):
        pytest.fail("it was applied")
    assert not (tmp_path / "scratch").exists()


def test_the_ladder_leads_from_any_strategy_to_the_most_frugal_one(load: Load) -> None:
    model, spec = load("tiny-i2v", True), variant("tiny-i2v").spec
    rungs = ladder(PLAIN, model, spec)
    assert [rung.gradient_checkpointing for rung in rungs] == ["block"] * 4
    assert [rung.activation_offload for rung in rungs] == ["none", "host", "host", "host"]
    assert [rung.block_swap for rung in rungs] == [0, 0, BLOCKS, BLOCKS]
    assert [rung.slices for rung in rungs] == [1, 1, 1, 16]
    assert ladder(rungs[0], model, spec) == rungs[1:]
    assert ladder(rungs[-1], model, spec) == ()
    disk = MemoryStrategy(activation_offload="disk", block_swap=3, block_swap_from="disk")
    assert [rung.activation_offload for rung in ladder(disk, model, spec)] == ["disk", "disk"]
    assert {rung.block_swap_from for rung in ladder(disk, model, spec)} == {"disk"}


def test_the_ladder_leaves_out_what_a_model_does_not_allow(load: Load) -> None:
    spec = variant("tiny-i2v").spec
    assert {rung.block_swap for rung in ladder(PLAIN, load("tiny-i2v", False), spec)} == {0}
    model = load("tiny-i2v", True)
    with dropout(model, 0.1):
        assert {rung.slices for rung in ladder(PLAIN, model, spec)} == {1}


def test_more_groups_than_heads_are_refused(load: Load, tmp_path: Path) -> None:
    strategy = MemoryStrategy(attention_head_groups=6)
    with (
        pytest.raises(ConfigError, match=r"memory\.attention_head_groups: the model has 5 heads; at most 5"),
        apply(load("tiny-i2v", True), variant("tiny-i2v").spec, strategy, tmp_path),
    ):
        pass


def test_a_fallback_that_the_model_does_not_allow_is_refused_at_once(load: Load, tmp_path: Path) -> None:
    strategy = MemoryStrategy(fallbacks=(MemoryStrategy(), MemoryStrategy(block_swap=5)))
    with (
        pytest.raises(ConfigError, match=r"memory\.fallbacks\[1\]\.block_swap: the model has 4 blocks"),
        apply(load("tiny-i2v", True), variant("tiny-i2v").spec, strategy, tmp_path),
    ):
        pass
