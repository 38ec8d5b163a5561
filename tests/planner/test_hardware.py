"""The devices a plan can be for: their names, their numbers, and this machine's."""

import difflib
from dataclasses import fields

import pytest
import torch

from longtake.errors import ConfigError
from longtake.planner.hardware import DEVICES, GIB, Device, Precision, device, measure_cpu, recognise

NAMES = [
    *("h200", "h100-sxm", "h100-pcie", "a100-40gb", "a100-80gb", "l40s"),
    *("rtx-3090", "rtx-4080", "rtx-4090", "rtx-5090", "rtx-a6000", "rtx-pro-6000", "cpu"),
]


def test_the_table_has_every_promised_device_under_its_own_name() -> None:
    assert list(DEVICES) == NAMES
    assert all(row.name == name for name, row in DEVICES.items())


@pytest.mark.parametrize("name", NAMES)
def test_every_rate_is_above_zero_and_every_fraction_at_most_one(name: str) -> None:
    row = DEVICES[name]
    numbers = {field.name: getattr(row, field.name) for field in fields(Device) if field.type != "str"}
    assert all(value > 0 for key, value in numbers.items() if key.endswith(("_flops", "_bytes", "_second", "_seconds")))
    assert all(0 < value <= 1 for key, value in numbers.items() if key.endswith("_efficiency"))
    assert 0 <= row.copy_share <= 1


@pytest.mark.parametrize(
    ("name", "gigabytes"),
    [
        *(("h200", 141), ("h100-sxm", 80), ("h100-pcie", 80), ("a100-40gb", 40), ("a100-80gb", 80), ("l40s", 48)),
        *(("rtx-3090", 24), ("rtx-4080", 16), ("rtx-4090", 24), ("rtx-5090", 32)),
        *(("rtx-a6000", 48), ("rtx-pro-6000", 96)),
    ],
)
def test_a_card_has_a_little_less_memory_than_its_name_says(name: str, gigabytes: int) -> None:
    assert 0.92 * gigabytes * GIB < DEVICES[name].memory_bytes < gigabytes * GIB


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("h100", "h100-sxm"),
        ("H100-SXM", "h100-sxm"),
        ("h100 pcie", "h100-pcie"),
        ("a100", "a100-80gb"),
        ("A100-40G", "a100-40gb"),
        ("4090", "rtx-4090"),
        ("rtx4090", "rtx-4090"),
        ("RTX PRO 6000", "rtx-pro-6000"),
        ("a6000", "rtx-a6000"),
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb"),
        ("NVIDIA A800-SXM4-80GB", "a100-80gb"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 3090", "rtx-3090"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA GeForce RTX 5090", "rtx-5090"),
        ("NVIDIA RTX A6000", "rtx-a6000"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "rtx-pro-6000"),
        *((name, name) for name in NAMES),
    ],
)
def test_the_names_that_drivers_and_users_give_a_card_are_recognised(spelling: str, name: str) -> None:
    assert recognise(spelling) is DEVICES[name]
    assert device(spelling) is DEVICES[name]


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA A100-SXM4-40GB MIG 3g.20gb",
        "NVIDIA H100 NVL",
        "NVIDIA H20",
        "NVIDIA GH200 480GB",
        "NVIDIA L40",
        "NVIDIA RTX 6000 Ada Generation",
        "Quadro RTX 6000",
        "NVIDIA GeForce RTX 3090 Ti",
        "Tesla V100-SXM2-32GB",
        "",
    ],
)
def test_a_card_of_another_size_or_rate_is_not_taken_for_one_in_the_table(name: str) -> None:
    assert recognise(name) is None


def test_a_misspelt_name_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"--gpu: no rates are known .* 'rtx-409'; did you mean rtx-4090\?"):
        device("rtx-409")


def test_a_name_like_no_other_is_refused_with_all_of_them() -> None:
    assert not difflib.get_close_matches("tpu-v5", DEVICES, 1, 0.7)
    with pytest.raises(ConfigError, match=r"where: .* name one of h200, .*, cpu"):
        device("tpu-v5", "where")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_this_machine_is_measured_without_touching_the_random_state(precision: Precision) -> None:
    before = torch.random.get_rng_state()
    here = measure_cpu(precision, seconds=0.01)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert here.generation == "cpu"
    assert 10**9 < here.fp32_flops < 10**14
    assert 10**8 < here.memory_bytes_per_second < 10**13
    assert 10**8 < here.host_bytes_per_second < 10**12
    assert here.attention_efficiency > 0
    assert here.attention_backward_efficiency > 0
    assert 10**-7 < here.launch_seconds < 10**-2


def test_a_copy_takes_a_core_from_the_computation_only_where_none_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr("os.sched_getaffinity", lambda _process: set(range(threads)))
    assert measure_cpu(seconds=0.001).copy_share == 1 / threads
    monkeypatch.setattr("os.sched_getaffinity", lambda _process: set(range(threads + 1)))
    assert measure_cpu(seconds=0.001).copy_share == 0.0
