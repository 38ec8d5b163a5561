"""Which GPUs CUDA_VISIBLE_DEVICES leaves, which of them a run takes, and which it leaves idle."""

import subprocess
import sys

import pytest

from longtake.distributed.devices import Gpu, choose, idle, installed, visible
from longtake.errors import ConfigError

NAMES = ("GPU-8932f937-d72c-4106", "GPU-8932aaaa-0000-4106", "GPU-c12f20bd-9fae-4106", "GPU-0f000000-0000-4106")
FOUR = tuple(Gpu(index, uuid, "NVIDIA H100") for index, uuid in enumerate(NAMES))


def seen(variable: str | None) -> list[int]:
    """Indices of the GPUs that are visible of four."""
    return [gpu.index for gpu in visible(variable, FOUR)]


def refused(variable: str) -> str:
    """The one line with which that value is refused."""
    with pytest.raises(ConfigError) as raised:
        visible(variable, FOUR)
    (problem,) = raised.value.problems
    assert str(problem).startswith(f"CUDA_VISIBLE_DEVICES={' '.join(variable.split())}: ")
    return str(problem)


@pytest.mark.parametrize(
    ("variable", "indices"),
    [
        (None, [0, 1, 2, 3]),
        ("2,3", [2, 3]),
        ("3,0", [3, 0]),
        (" 2 , 3 ", [2, 3]),
        ("02", [2]),
        ("GPU-c12f20bd-9fae-4106", [2]),
        ("GPU-c,GPU-8932f", [2, 0]),
    ],
)
def test_the_gpus_that_are_named_are_visible_in_their_order(variable: str | None, indices: list[int]) -> None:
    assert seen(variable) == indices


@pytest.mark.parametrize("variable", ["", "  ", "-1", " -1 ", "NoDevFiles"])
def test_an_empty_value_hides_all(variable: str) -> None:
    assert seen(variable) == []


@pytest.mark.parametrize("entry", ["4", "-1", "x", "1gpu", "", "GPU-ffff", "9" * 5000])
def test_an_entry_that_is_no_gpu_is_refused_with_those_that_are_there(entry: str) -> None:
    line = refused(f"0,{entry},1")
    assert f"{entry!r} is no GPU of this machine" in line
    assert "there are 0 (NVIDIA H100, GPU-8932f937), 1 (NVIDIA H100, GPU-8932aaaa), 2 (" in line


def test_the_beginning_of_two_uuids_is_refused() -> None:
    assert "'GPU-8932' is the beginning of 2 UUIDs" in refused("GPU-8932")


@pytest.mark.parametrize("variable", ["2,2", "2, 02", "GPU-c1,GPU-c12f", "MIG-a,MIG-a"])
def test_a_gpu_that_is_named_twice_is_refused(variable: str) -> None:
    assert "once more, and CUDA would see none; name each GPU once" in refused(variable)


@pytest.mark.parametrize("variable", ["0,GPU-c12f", "GPU-c12f,0", "0,MIG-a", "GPU-c12f,MIG-a"])
def test_indices_and_uuids_in_one_value_are_refused(variable: str) -> None:
    assert "give only indices or only UUIDs" in refused(variable)


def test_spaces_around_a_uuid_are_refused_since_torch_does_not_find_it_then() -> None:
    line = "torch finds no UUID with spaces, as in ' GPU-0f'; remove them [gpus-uuid-with-spaces]"
    assert refused("GPU-c12f, GPU-0f").endswith(line)


def test_torch_counts_as_many_gpus_as_are_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "_raw_device_uuid_nvml", lambda: list(NAMES))
    monkeypatch.setattr(torch.cuda, "_raw_device_count_nvml", lambda: len(NAMES))
    for variable in ("2,3", " 2 , 3 ", "", "-1", "NoDevFiles", "GPU-c,GPU-8932f"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
        assert torch.cuda._device_count_nvml() == len(seen(variable)), variable
    for variable in ("0,4,1", "2,2", "0,GPU-c12f", "GPU-c12f, GPU-0f", "GPU-8932"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
        assert torch.cuda._device_count_nvml() < len(variable.split(",")), variable
        refused(variable)


def test_a_mig_instance_is_a_device_of_its_own() -> None:
    instance = "MIG-GPU-8932f937-d72c-4106/1/2"
    assert visible(instance, FOUR) == (Gpu(-1, instance, "MIG instance"),)


def test_a_run_takes_the_first_of_the_visible_gpus() -> None:
    assert [gpu.index for gpu in choose(2, "3,1,0", FOUR)] == [3, 1]


@pytest.mark.parametrize(("variable", "gpus"), [(None, ()), ("0,1", ()), ("", FOUR), ("-1", FOUR)])
def test_where_no_gpu_is_installed_or_visible_processes_run_on_the_cpu(variable: str, gpus: tuple[Gpu, ...]) -> None:
    assert choose(3, variable, gpus) == ()


@pytest.mark.parametrize(
    ("wanted", "variable", "line"),
    [
        (8, None, "--gpus: 8 GPUs were asked for and 4 are visible; use --gpus 4 [gpus-too-few]"),
        (
            2,
            "3",
            "--gpus, CUDA_VISIBLE_DEVICES=3: 2 GPUs were asked for and 1 is visible; "
            "use --gpus 1, or name more of the 4 that are installed in CUDA_VISIBLE_DEVICES [gpus-too-few]",
        ),
        (0, None, "--gpus: 0 GPUs were asked for; use 1 or more [gpus-none-asked]"),
    ],
)
def test_more_gpus_than_are_visible_are_refused_in_one_line(wanted: int, variable: str | None, line: str) -> None:
    with pytest.raises(ConfigError) as raised:
        choose(wanted, variable, FOUR)
    assert str(raised.value) == line


def test_a_line_names_the_visible_gpus_that_stay_idle() -> None:
    assert idle(1, FOUR) == "GPU 1, 2 and 3 are visible and idle: add --gpus 4"
    assert idle(1, visible("3,1", FOUR)) == "GPU 1 is visible and idle: add --gpus 2"
    assert idle(1, visible("MIG-a,MIG-b", FOUR)) == "GPU MIG-b is visible and idle: add --gpus 2"
    assert idle(4, FOUR) == idle(1, ()) == ""


def test_the_driver_names_each_gpu_once() -> None:
    gpus = installed()
    assert [gpu.index for gpu in gpus] == [*range(len(gpus))]
    assert len({gpu.uuid for gpu in gpus}) == len(gpus)
    assert all(gpu.uuid.startswith("GPU-") and gpu.name for gpu in gpus)


def test_looking_for_gpus_imports_no_torch() -> None:
    code = "import sys, longtake.distributed.devices as d; d.installed(); print('torch' in sys.modules)"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout == "False\n"
