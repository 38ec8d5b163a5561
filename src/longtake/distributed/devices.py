"""The GPUs of this machine, those that CUDA_VISIBLE_DEVICES leaves visible, and those that a run takes of them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from longtake.errors import ConfigError, Problem, RunError

VARIABLE = "CUDA_VISIBLE_DEVICES"
NONE = ("", "-1", "NoDevFiles")
"""Values that hide every GPU; the last is Slurm's, in a job that asked for none."""
_INDEX = re.compile(r"[0-9]{1,6}")


@dataclass(frozen=True)
class Gpu:
    """A GPU as the driver has it: `index` is nvidia-smi's, -1 for a MIG instance, which has none; `uuid` is in full."""

    index: int
    uuid: str
    name: str

    def __str__(self) -> str:
        return self.uuid if self.index < 0 else f"{self.index} ({self.name}, {self.uuid[:12]})"


def installed() -> tuple[Gpu, ...]:
    """The machine's GPUs by nvidia-smi's index; empty without a driver. Raises RunError where one does not answer."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded):
        return ()
    except pynvml.NVMLError as error:
        raise _broken(error) from error
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        found = [(pynvml.nvmlDeviceGetUUID(handle), pynvml.nvmlDeviceGetName(handle)) for handle in handles]
    except pynvml.NVMLError as error:
        raise _broken(error) from error
    finally:
        pynvml.nvmlShutdown()
    return tuple(Gpu(index, uuid, name) for index, (uuid, name) in enumerate(found))


def visible(variable: str | None, gpus: Sequence[Gpu]) -> tuple[Gpu, ...]:
    """Those of `gpus`, all that there are, that a process with `variable` as CUDA_VISIBLE_DEVICES sees, in its order.

    The rules are CUDA's, as far as torch keeps to them (torch.cuda.device_count): indices, or UUIDs or the beginnings
    of UUIDs, not both. Where CUDA would quietly see fewer GPUs than are named, or none, ConfigError is raised.
    https://docs.nvidia.com/cuda/cuda-programming-guide/05-appendices/environment-variables.html
    """
    if variable is None or not gpus:
        return tuple(gpus)
    if variable.strip() in NONE:
        return ()
    found: list[Gpu] = []
    entries = [_as_torch_reads(entry) for entry in variable.split(",")]
    for entry in entries:
        gpu = _named(entry, gpus, variable)
        if _kind(entry) != _kind(entries[0]):
            what = f"{entry!r} is of another kind than {entries[0]!r}, and torch would see none from there on"
            raise _wrong(variable, what, "give only indices or only UUIDs", "gpus-kinds-mixed")
        if gpu in found:
            what = f"{entry!r} is GPU {gpu} once more, and CUDA would see none"
            raise _wrong(variable, what, "name each GPU once", "gpus-named-twice")
        found.append(gpu)
    return tuple(found)


def choose(wanted: int, variable: str | None, gpus: Sequence[Gpu]) -> tuple[Gpu, ...]:
    """The GPUs of `wanted` processes, one each; none where none is installed or visible: those then run on the CPU.

    `variable` is CUDA_VISIBLE_DEVICES, `gpus` what is installed. Raises ConfigError where fewer are visible.
    """
    if wanted < 1:
        raise ConfigError(Problem(f"{wanted} GPUs were asked for", "--gpus", "use 1 or more", code="gpus-none-asked"))
    seen = visible(variable, gpus)
    if not seen or wanted <= len(seen):
        return seen[:wanted]
    what = f"{wanted} GPUs were asked for and {_count(seen)} visible"
    remedy = f"use --gpus {len(seen)}"
    if variable is not None and len(gpus) > len(seen):
        remedy += f", or name more of the {len(gpus)} that are installed in {VARIABLE}"
    raise ConfigError(
        Problem(what, "--gpus" if variable is None else f"--gpus, {VARIABLE}={variable}", remedy, code="gpus-too-few")
    )


def idle(used: int, seen: Sequence[Gpu]) -> str:
    """One line of the visible GPUs that a run with `used` processes on this machine leaves idle; empty without any."""
    names = [gpu.uuid if gpu.index < 0 else str(gpu.index) for gpu in seen[used:]]
    if not names:
        return ""
    listed = " and ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)
    return f"GPU {listed} {'are' if names[1:] else 'is'} visible and idle: add --gpus {len(seen)}"


def _named(entry: str, gpus: Sequence[Gpu], variable: str) -> Gpu:
    if entry != entry.strip():
        raise _wrong(
            variable, f"torch finds no UUID with spaces, as in {entry!r}", "remove them", "gpus-uuid-with-spaces"
        )
    if entry.startswith("MIG-"):
        return Gpu(-1, entry, "MIG instance")
    if _INDEX.fullmatch(entry):
        found = [gpu for gpu in gpus if gpu.index == int(entry)]
    else:
        found = [gpu for gpu in gpus if entry.startswith("GPU-") and gpu.uuid.startswith(entry)]
    if len(found) == 1:
        return found[0]
    what = f"{entry!r} is the beginning of {len(found)} UUIDs" if found else f"{entry!r} is no GPU of this machine"
    code = "gpus-uuid-ambiguous" if found else "gpus-not-installed"
    remedy = f"there are {', '.join(map(str, gpus))}"
    raise _wrong(variable, f"{what}, and CUDA would see none from there on", remedy, code)


def _as_torch_reads(entry: str) -> str:
    """Without the spaces around an index; those around a UUID stay, since torch does not find it with them."""
    return entry.strip() if _INDEX.fullmatch(entry.strip()) else entry


def _kind(entry: str) -> str:
    return "index" if _INDEX.fullmatch(entry) else entry[:4]


def _wrong(variable: str, what: str, remedy: str, code: str) -> ConfigError:
    return ConfigError(Problem(what, f"{VARIABLE}={variable}", remedy, code=code))


def _count(seen: Sequence[Gpu]) -> str:
    return "1 is" if len(seen) == 1 else f"{len(seen)} are"


def _broken(error: Exception) -> RunError:
    return RunError(
        Problem(f"the NVIDIA driver does not answer ({error})", "", "see what nvidia-smi says", code="driver-silent")
    )
