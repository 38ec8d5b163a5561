"""Transformers that take turns: the same values as apart, and the weights of one at a time on the device."""

import copy
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from longtake.config.schema import LoraConfig, MemoryStrategy
from longtake.errors import ConfigError
from longtake.lora import attach
from longtake.memory.accounting import Needs, together
from longtake.memory.copies import Copies, Event, copies_for
from longtake.memory.strategy import Among, apply
from longtake.memory.turns import Turns
from longtake.models.wan.variants import variant
from race_checker import CheckedCopies, Race
from tiny_steps import assert_equal, step

CPU = torch.device("cpu")
NAME = "tiny-t2v-a14b"
SPEC = variant(NAME).spec
STRATEGIES = (
    MemoryStrategy(),
    MemoryStrategy(gradient_checkpointing="none"),
    MemoryStrategy(block_swap=3),
    MemoryStrategy(block_swap=5),
    MemoryStrategy(block_swap=3, block_swap_from="disk", activation_offload="disk"),
    MemoryStrategy(block_swap_from="disk", activation_offload="host"),
    MemoryStrategy(quantization="int8", block_swap=4),
)


def models() -> list[Any]:
    """Two transformers of five blocks with different weights and adapters."""
    config = variant(NAME).transformer_config | {"num_layers": 5}
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        transformer = WanTransformer3DModel(**config)
        attach(transformer, LoraConfig(rank=2), seed)
        for name, parameter in transformer.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter, std=0.05)
        found.append(transformer)
    return found


@contextmanager
def taking_turns(
    transformers: list[Any], strategy: MemoryStrategy, scratch: Path, copies: Copies | None = None
) -> Iterator[Turns]:
    """`strategy` on all of them."""
    with ExitStack() as held:
        turns = Turns(copies or copies_for(CPU))
        held.callback(turns.close)
        for index, transformer in enumerate(transformers):
            held.enter_context(apply(transformer, SPEC, strategy, scratch / str(index), among=Among(turns=turns)))
        yield turns


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda each: each.model_dump_json(exclude_defaults=True))
def test_in_any_order_each_computes_what_it_does_alone(strategy: MemoryStrategy, tmp_path: Path) -> None:
    transformers = models()
    apart = []
    for transformer in (copy.deepcopy(each) for each in transformers):
        alone = strategy if strategy.block_swap else strategy.model_copy(update={"block_swap_from": "host"})
        with apply(transformer, SPEC, alone, tmp_path / "alone"):
            apart.append(step(transformer, NAME))
    with taking_turns(transformers, strategy, tmp_path / "turns"):
        for index in (0, 1, 1, 0, 1, 0, 0):
            assert_equal(step(transformers[index], NAME), apart[index], 0.0, f"expert {index}")
    for index in (1, 0):  # and after the strategy was taken off and put on again
        with taking_turns(transformers, strategy, tmp_path / "again"):
            assert_equal(step(transformers[index], NAME), apart[index], 0.0, f"expert {index}")


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("source", ["host", "disk"])
def test_no_copy_is_read_too_early_or_overwritten_too_soon(tmp_path: Path, seed: int, source: Any) -> None:
    transformers, strategy = models(), MemoryStrategy(block_swap_from=source, activation_offload="host")
    plain = [step(transformer, NAME) for transformer in transformers]
    with (
        CheckedCopies(seed).watching() as copies,
        taking_turns(transformers, strategy, tmp_path, copies),
    ):
        for index in (0, 1, 0, 0, 1):
            assert_equal(step(transformers[index], NAME), plain[index], 0.0, f"expert {index}")


class SeesNoReader(CheckedCopies):
    """What the computation has read is forgotten: buffers are filled anew at once."""

    def reached(self) -> Event:
        """Long ago."""
        if not hasattr(self, "first"):
            self.first = super().reached()
        return self.first


class NeverWaits(CheckedCopies):
    """The computation goes on before a copy is done."""

    def wait(self, event: Event) -> None:
        """Does not."""


@pytest.mark.parametrize("faulty", [NeverWaits, SeesNoReader])
def test_a_planted_missing_wait_and_a_planted_early_reuse_are_found(
    tmp_path: Path, faulty: type[CheckedCopies]
) -> None:
    transformers = models()
    with (
        pytest.raises(Race),
        faulty(0).watching() as copies,
        taking_turns(transformers, MemoryStrategy(), tmp_path, copies),
    ):
        [step(transformer, NAME) for transformer in transformers]


@pytest.mark.parametrize("number", [0, 3, 5])
def test_the_buffers_on_the_device_are_those_of_one_transformer(number: int, tmp_path: Path) -> None:
    transformers = models()
    with taking_turns(transformers, MemoryStrategy(block_swap=number), tmp_path) as turns:
        slots = [*turns.staying, *turns.streaming]
        assert len(turns.staying) == 5 - number
        assert len(turns.streaming) == (2 if number else 0)
        lie = {range_of(parameter) for slot in slots for parameter in slot.parameters}
        for transformer in transformers:
            step(transformer, NAME)
            on_device = {
                range_of(parameter)
                for each in transformers
                for parameter in each.blocks.parameters()
                if not parameter.requires_grad and range_of(parameter) in lie
            }
            here = [range_of(each) for each in transformer.blocks.parameters() if not each.requires_grad]
            assert on_device == {place for place in here if place in lie}, "the other's weights are away"


def range_of(tensor: Tensor) -> int:
    """Where its bytes begin."""
    return tensor.untyped_storage().data_ptr() + tensor.storage_offset() * tensor.element_size()


def test_a_place_to_wait_for_nobody_is_refused(tmp_path: Path) -> None:
    (transformer, _) = models()
    strategy = MemoryStrategy(block_swap_from="disk")
    wanted = re.escape("memory.block_swap_from: it would be ignored; set memory.block_swap")
    with pytest.raises(ConfigError, match=wanted), apply(transformer, SPEC, strategy, tmp_path):
        pytest.fail("it was applied")


def test_weights_and_states_of_both_are_needed_and_activations_of_one() -> None:
    first = Needs({"activation_offload": 5, "block_swap": 7, "optimizer_offload": 2}, {})
    second = Needs({"activation_offload": 6, "block_swap": 7, "optimizer_offload": 2}, {})
    assert together([first, second]) == Needs({"activation_offload": 6, "block_swap": 14, "optimizer_offload": 4}, {})
