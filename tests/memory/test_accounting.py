"""What a strategy needs of host memory and disk, what is free of both, and the refusal of what would not fit."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from longtake.config.schema import LoraConfig, MemoryStrategy, ModelConfig
from longtake.errors import ConfigError
from longtake.lora import attach
from longtake.memory.accounting import PINNED_SHARE, Free, Needs, Workload, cgroup_free, check, free_for, needs
from longtake.memory.strategy import apply
from longtake.models.wan.conditioning import Conditioning, dit_inputs
from longtake.models.wan.tiny import bundled
from longtake.models.wan.variants import variant
from longtake.models.wan.weights import load_transformer, locate

CPU = torch.device("cpu")
SPEC = variant("tiny-t2v").spec
DIM = SPEC.heads * SPEC.head_dim
BLOCKS, FLOAT = 4, 4
BATCH, FRAMES, SIDE = 2, 3, 4
TOKENS = FRAMES * (SIDE // 2) ** 2
HIDDEN = BATCH * TOKENS * DIM * FLOAT
ATTENDED = HIDDEN + BATCH * TOKENS * SPEC.heads * 4
WORK = Workload(TOKENS, BATCH, FLOAT)
KEEPING = "block_keep_attention"


@pytest.fixture
def model(tiny_root: Callable[[str], Path]) -> Any:
    """A tiny transformer with a LoRA."""
    files = locate(ModelConfig(path=str(tiny_root("tiny-t2v")), name="tiny-t2v"), bundled, print)
    model = load_transformer(files, "transformer", torch.float32, CPU)
    attach(model, LoraConfig(rank=2), 0)
    return model.train()


def frozen_bytes(block: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in block.parameters() if not parameter.requires_grad)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, BLOCKS * HIDDEN),
        ({"activation_offload_fraction": 0.5}, 2 * HIDDEN),
        ({"activation_offload_fraction": 0.0}, 0),
        ({"checkpoint_every": 2}, 2 * HIDDEN),
        ({"checkpoint_every": 3}, 2 * HIDDEN),
        ({"gradient_checkpointing": KEEPING}, BLOCKS * (HIDDEN + ATTENDED)),
        ({"gradient_checkpointing": KEEPING, "activation_offload_fraction": 0.25}, HIDDEN + ATTENDED),
        ({"gradient_checkpointing": KEEPING, "checkpoint_every": 3}, 2 * HIDDEN + BLOCKS * ATTENDED),
    ],
)
def test_what_is_kept_is_counted_where_it_is_moved(model: Any, fields: dict[str, Any], expected: int) -> None:
    for tier in ("host", "disk"):
        found = needs(model, SPEC, MemoryStrategy(activation_offload=tier, **fields), WORK, {})
        assert {"host": found.host_bytes, "disk": found.disk_bytes} == {"host": 0, "disk": 0, tier: expected}


@pytest.mark.parametrize(
    "fields", [{}, {"activation_offload_fraction": 0.5}, {"checkpoint_every": 2}, {"gradient_checkpointing": KEEPING}]
)
def test_the_count_is_what_a_step_writes_to_the_disk(model: Any, fields: dict[str, Any], tmp_path: Path) -> None:
    strategy = MemoryStrategy(activation_offload="disk", **fields)
    latents = torch.randn(BATCH, SPEC.latent_channels, FRAMES, SIDE, SIDE)
    texts = Conditioning(torch.randn(BATCH, 512, SPEC.text_dim), None, None, None)
    given = dit_inputs(SPEC, latents, torch.tensor([0.3, 0.8]), texts)
    with apply(model, SPEC, strategy, tmp_path):
        model(**given, return_dict=False)[0].square().mean().backward()
        written = sum(path.stat().st_size for path in tmp_path.rglob("*.bin"))
    assert written == needs(model, SPEC, strategy, WORK, {}).disk_bytes


def test_swapped_weights_need_host_memory_unless_they_are_there_already(model: Any) -> None:
    swapped = MemoryStrategy(block_swap=3)
    assert needs(model, SPEC, swapped, WORK, {}).host_bytes == 0
    model.to("meta")
    assert needs(model, SPEC, swapped, WORK, {}).host_bytes == 3 * frozen_bytes(model.blocks[0])
    assert needs(model, SPEC, swapped.model_copy(update={"block_swap": 4}), WORK, {}).host == {
        "block_swap": 4 * frozen_bytes(model.blocks[0])
    }


def test_weights_streamed_from_disk_are_spilled_unless_a_file_has_them_as_they_are(model: Any) -> None:
    from longtake.models.weight_files import WeightFile

    swapped = MemoryStrategy(block_swap=4, block_swap_from="disk")
    everything = sum(frozen_bytes(block) for block in model.blocks)
    assert needs(model, SPEC, swapped, WORK, {}).disk == {"block_swap": everything}
    name = "blocks.1.attn1.to_q.base_layer.weight"
    weight = model.get_parameter(name)
    file = WeightFile(Path("model.safetensors"), 8, weight.nbytes, torch.float32)
    assert needs(model, SPEC, swapped, WORK, {name: file}).disk_bytes == everything - weight.nbytes
    other = replace(file, dtype=torch.bfloat16, nbytes=weight.nbytes // 2)
    assert needs(model, SPEC, swapped, WORK, {name: other}).disk_bytes == everything


def test_the_optimisers_states_are_two_fp32_values_for_each_that_is_trained(model: Any) -> None:
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert needs(model, SPEC, MemoryStrategy(optimizer_offload=True), WORK, {}).host == {
        "optimizer_offload": 8 * trained
    }
    assert needs(model, SPEC, MemoryStrategy(), WORK, {}).host_bytes == 0


GIB = 2**30


@pytest.mark.parametrize(
    ("host", "disk", "free", "line"),
    [
        ({"activation_offload": 20 * GIB}, {}, Free(20 * GIB, 0), None),
        ({}, {"activation_offload": 20 * GIB}, Free(0, 20 * GIB), None),
        (
            {"activation_offload": 20 * GIB, "block_swap": 28 * GIB},
            {},
            Free(40 * GIB, 0),
            "memory.block_swap: the strategy needs 20.0 GiB for activation_offload and 28.0 GiB for block_swap, and"
            " 40.0 GiB of host memory may be used; lower memory.block_swap, or set memory.block_swap_from"
            ' = "disk"',
        ),
        (
            {"optimizer_offload": 3 * GIB},
            {},
            Free(2 * GIB, 0, pinned=True),
            "memory.optimizer_offload: the strategy needs 3.0 GiB for optimizer_offload, and 2.0 GiB of host memory"
            " (80% of what is free, since it is pinned) may be used; leave out memory.optimizer_offload",
        ),
        (
            {},
            {"activation_offload": 20 * GIB},
            Free(0, 19 * GIB),
            "memory.activation_offload: the strategy needs 20.0 GiB for activation_offload, and 19.0 GiB of the run"
            " folder's disk may be used; lower memory.activation_offload_fraction, or set memory.activation_offload"
            ' = "host"',
        ),
    ],
)
def test_a_strategy_that_does_not_fit_is_refused_with_the_numbers(
    host: dict[str, int], disk: dict[str, int], free: Free, line: str | None
) -> None:
    if line is None:
        check(Needs(host, disk), free)
        return
    with pytest.raises(ConfigError) as raised:
        check(Needs(host, disk), free)
    assert raised.value.exit_status == 2
    assert [str(problem) for problem in raised.value.problems] == [f"{line} [memory-strategy-too-big]"]


def test_host_and_disk_are_both_told() -> None:
    with pytest.raises(ConfigError) as raised:
        check(Needs({"block_swap": 2}, {"activation_offload": 2}), Free(1, 1))
    assert [problem.where for problem in raised.value.problems] == ["memory.block_swap", "memory.activation_offload"]


def test_what_is_free_is_asked_of_the_system_even_where_the_folder_is_still_to_be_made(tmp_path: Path) -> None:
    free, pinnable = (free_for(torch.device(name), tmp_path / "run" / "scratch") for name in ("cpu", "cuda"))
    assert free.disk_bytes > 0
    assert not free.pinned
    assert pinnable.pinned
    assert 0 < pinnable.host_bytes < free.host_bytes
    assert pinnable.host_bytes == pytest.approx(free.host_bytes * PINNED_SHARE, rel=0.2)


def write(folder: Path, **files: object) -> None:
    """A control group: `memory_max` is the file `memory.max`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("memory_", "memory.")).write_text(f"{content}\n")


def test_a_limit_on_a_control_group_or_on_one_above_it_leaves_its_rest(tmp_path: Path) -> None:
    membership, mount = tmp_path / "cgroup", tmp_path / "mount"
    membership.write_text("0::/user/run\n")
    write(
        mount / "user", memory_max=1000, memory_current=700, memory_stat="anon 300\nactive_file 50\ninactive_file 150"
    )
    write(mount / "user" / "run", memory_max="max", memory_current=600)
    assert [*cgroup_free(membership, mount)] == [1000 - 700 + 200]
    write(mount / "user" / "run", memory_max=650)
    assert [*cgroup_free(membership, mount)] == [650 - 600, 500]


def test_a_limit_of_the_first_version_is_found_too(tmp_path: Path) -> None:
    membership, mount = tmp_path / "cgroup", tmp_path / "mount"
    membership.write_text("5:cpu,cpuacct:/\n4:memory:/docker/abc\n0::/\n")
    used = {
        "memory_usage_in_bytes": 700,
        "memory_stat": "inactive_file 1\ntotal_inactive_file 100\ntotal_active_file 0",
    }
    # in a container its own group is mounted as the root
    write(mount / "memory", memory_limit_in_bytes=1000, **used)
    assert [*cgroup_free(membership, mount)] == [400]
    write(mount / "memory", memory_limit_in_bytes=9223372036854771712)
    assert [*cgroup_free(membership, mount)] == []


def test_without_control_groups_nothing_is_limited(tmp_path: Path) -> None:
    assert [*cgroup_free(tmp_path / "cgroup", tmp_path)] == []
