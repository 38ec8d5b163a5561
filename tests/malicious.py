"""Pickles that run code in every way that a pickle can, each of which would leave something named after itself."""

import io
import os
import pickle
import shlex
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

CALL = b"\x85R."
"""TUPLE1, REDUCE, STOP: the function on the stack with the argument above it."""


class Payload:
    """What runs `command` when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def malicious_pickles(marks: Path, tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
    """By name; unpickled, each makes what has its name in `marks`. `tensors` are what one of them lies among."""

    def command(name: str) -> str:
        return f"touch {shlex.quote(str(marks / name))}"

    evaluated = f"__import__('pathlib').Path({str(marks / 'eval')!r}).touch()"
    hidden = Payload(command("among tensors"))
    found = {name: _bare(name, command(name)) for name in ("reduce", "inst", "obj", "newobj", "build", "stack global")}
    return found | {
        "eval": b"\x80\x02" + _named("builtins", "eval") + _text(evaluated) + CALL,
        "length lie": _bare("reduce", command("length lie"))[:-1] + b"\x8e" + (2**40).to_bytes(8, "little") + b".",
        "archive": _archive(_bare("reduce", command("archive"))),
        "legacy": _saved({"a": torch.ones(2), "b": Payload(command("legacy"))}, zipped=False),
        "among tensors": _saved({**tensors, "conv1.bias": hidden}, zipped=True),
        "within torch": _archive(_within_torch(_saved(Payload(command("within torch")), zipped=False))),
        "numpy": _in_numpy(Payload(command("numpy")), np.save),
        "numpy archive": _in_numpy(Payload(command("numpy archive")), np.savez),
    }


def unpickled(name: str, content: bytes) -> None:
    """Runs it, as a careless reader would; those that lie fail afterwards."""
    if name.startswith("numpy"):
        found = np.load(io.BytesIO(content), allow_pickle=True)
        assert name == "numpy" or found["arr_0"] is not None
    elif name == "length lie":
        with pytest.raises((MemoryError, pickle.UnpicklingError)):
            pickle.loads(content)
    elif name in ("archive", "legacy", "among tensors", "within torch"):
        torch.load(io.BytesIO(content), weights_only=False)
    else:
        pickle.loads(content)


def _bare(name: str, command: str) -> bytes:
    """A pickle of `os.system(command)` by the opcode of that name."""
    system, argument = _named("posix", "system"), _text(command)
    if name == "inst":
        return b"(" + argument + b"iposix\nsystem\n."
    if name == "obj":
        return b"(" + system + argument + b"o."
    if name == "newobj":  # bytes.__new__(bytes, map.__new__(map, os.system, [command])) calls it when it iterates
        lazy = _named("builtins", "map") + system + b"]" + argument + b"a\x86\x81"
        return b"\x80\x02" + _named("builtins", "bytes") + lazy + b"\x85\x81."
    if name == "build":  # the first state sets an attribute that is called with the second
        empty = _named("argparse", "Namespace") + b")\x81"
        return b"\x80\x02" + empty + b"}" + _text("__setstate__") + system + b"sb" + argument + b"b."
    if name == "stack global":
        return b"\x80\x04" + _text("posix") + _text("system") + b"\x93" + argument + CALL
    return system + f"(S{command!r}\n".encode() + b"tR."  # of protocol 0, which is text


def _within_torch(content: bytes) -> bytes:
    """`functools.partial(torch.storage._load_from_bytes, content)()`: no scanner's list has either.

    The second is torch's own for storages, and loads the pickle in the pickle without care.
    """
    inner = b"B" + len(content).to_bytes(4, "little") + content
    made = _named("functools", "partial") + _named("torch.storage", "_load_from_bytes") + inner + b"\x86R"
    return b"\x80\x03" + made + b")R."


def _named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _text(value: str) -> bytes:
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


def _archive(content: bytes) -> bytes:
    """What `torch.save` makes, around any pickle."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, part in (("data.pkl", content), ("byteorder", b"little"), ("version", b"3\n")):
            archive.writestr(f"archive/{name}", part)
    return made.getvalue()


def _saved(value: Any, zipped: bool) -> bytes:
    made = io.BytesIO()
    torch.save(value, made, _use_new_zipfile_serialization=zipped)
    return made.getvalue()


def _in_numpy(value: Any, save: Any) -> bytes:
    made = io.BytesIO()
    save(made, np.array(value, dtype=object))
    return made.getvalue()
