"""Nothing in src, scripts or benchmarks runs what a file says, starts a shell, or reaches a network unasked.

Each rule is a name; each use that is legitimate is in `ALLOWED`, by file and rule, with its reason.
"""

import ast
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for folder in ("src", "scripts", "benchmarks") for path in (ROOT / folder).rglob("*.py"))

BUILTINS = {"eval", "exec", "compile"}
MODULES = {
    "unpickling": "pickle cPickle _pickle marshal shelve dill joblib cloudpickle jsonpickle",
    "network": (
        "requests urllib.request urllib3 http.client http.server httpx httpx2 httpcore httpcore2 aiohttp websockets"
        " ftplib smtplib imaplib poplib telnetlib xmlrpc socketserver paramiko huggingface_hub modelscope wandb"
    ),
    "program": "subprocess pty pexpect",
    "import by name": "runpy imp",
}
"""Modules whose import is a use."""
NAMES = {
    "torch.load": "torch.load torch.serialization.load torch.jit.load torch.hub.load torch.package.PackageImporter",
    "yaml.load": "yaml.load yaml.load_all yaml.full_load yaml.unsafe_load yaml.Loader yaml.UnsafeLoader",
    "shell": "os.system os.popen subprocess.getoutput subprocess.getstatusoutput asyncio.create_subprocess_shell",
    "program": (
        "os.execv os.execve os.execvp os.execvpe os.execl os.execle os.execlp os.spawnv os.spawnve os.spawnl"
        " os.posix_spawn os.posix_spawnp os.startfile asyncio.create_subprocess_exec"
    ),
    "network": "asyncio.open_connection asyncio.start_server torch.hub.load_state_dict_from_url",
    "unpacking": "shutil.unpack_archive",
    "mktemp": "tempfile.mktemp os.tempnam os.tmpnam",
    "import by name": "importlib.util.spec_from_file_location importlib.machinery.SourceFileLoader",
    **{name: f"builtins.{name}" for name in BUILTINS},
}
"""Dotted names whose mention is a use, however they were imported."""
KEYWORDS = {"shell": False, "trust_remote_code": False, "allow_pickle": False, "weights_only": True}
"""Arguments and the one literal that may be given for them."""
HARMLESS = {"socket.gethostname", "socket.socket"}
"""Of the module socket: the name of this machine, and the type, which annotations name; calling that is a use."""
IMPORTS = {"importlib.import_module", "builtins.__import__", "__import__"}

_SOCKET = "an unnamed pair of sockets to the process that decodes, which no network reaches"
ALLOWED = {
    ("src/longtake/models/wan/pickles.py", "torch.load"): "the one audited place: weights_only, on fake tensors",
    (
        "src/longtake/memory/quantization.py",
        "import by name",
    ): "names of torchao's modules, which are literals, as a test below checks",
    ("src/longtake/models/hub.py", "network"): "fetches the model that the user names",
    ("src/longtake/training/push.py", "network"): "uploads a run where the user asks for it",
    ("src/longtake/training/metrics.py", "network"): "Weights & Biases, where output.wandb is set",
    ("src/longtake/models/libraries.py", "network"): "only how loud the hub's library is",
    ("src/longtake/models/wan/text_encoders.py", "network"): "only an error's class",
    ("src/longtake/training/card.py", "network"): "only the text of a model card",
    ("src/longtake/data/decoder.py", "network"): _SOCKET,
    ("src/longtake/data/decoding_child.py", "network"): _SOCKET,
    ("src/longtake/data/decoder.py", "program"): "starts the process that decodes",
    ("src/longtake/demo/clips.py", "program"): "pip, which downloads the film where the user asks for a demo",
    ("scripts/make_lock.py", "program"): "uv, which resolves the pins",
    ("scripts/train_tiny_transformer.py", "program"): "longtake itself, stage by stage",
    ("benchmarks/*.py", "program"): "a process of its own for what is measured",
}
"""(file, rule): why it may."""


def uses(source: str) -> Iterator[tuple[str, int]]:
    """(rule, line) of each use of what is forbidden."""
    tree = ast.parse(source)
    imported = _imported(tree)
    for node in ast.walk(tree):
        for rule in _rules(node, imported):
            yield rule, getattr(node, "lineno", 0)


def _rules(node: ast.AST, imported: dict[str, str]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (rule for alias in node.names for rule in _of_module(alias.name))
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
        for alias in node.names:
            whole = f"{node.module}.{alias.name}"
            yield from {*_of_module(node.module), *_of_module(whole), *_of_name(whole)}
    elif isinstance(node, ast.Attribute):
        yield from _of_name(_dotted(node, imported))
    elif isinstance(node, ast.Call):
        yield from _of_call(node, _dotted(node.func, imported))


def _imported(tree: ast.AST) -> dict[str, str]:
    """What each name stands for that an import gives, in any scope."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update({alias.asname: alias.name for alias in node.names if alias.asname})
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    return found


def _dotted(node: ast.expr, imported: dict[str, str]) -> str:
    first, _, rest = ast.unparse(node).partition(".")
    return ".".join(part for part in (imported.get(first, first), rest) if part)


def _of_module(name: str) -> Iterator[str]:
    for rule, modules in MODULES.items():
        if any(name == module or name.startswith(f"{module}.") for module in modules.split()):
            yield rule


def _of_name(name: str) -> Iterator[str]:
    yield from (rule for rule, names in NAMES.items() if name in names.split())
    if name.endswith(".extractall"):
        yield "unpacking"
    if name.startswith("socket.") and name.count(".") == 1 and name not in HARMLESS:
        yield "network"


def _of_call(call: ast.Call, name: str) -> Iterator[str]:
    if name in BUILTINS:
        yield name
    if name in IMPORTS and not (call.args and isinstance(call.args[0], ast.Constant)):
        yield "import by name"
    if name == "socket.socket":
        yield "network"
    for keyword in call.keywords:
        if keyword.arg in KEYWORDS:
            value = keyword.value
            if not (isinstance(value, ast.Constant) and value.value is KEYWORDS[keyword.arg]):
                yield keyword.arg


@cache
def found() -> dict[tuple[str, str], list[int]]:
    """The lines of all uses in this repository by file and rule."""
    lines: dict[tuple[str, str], list[int]] = {}
    for path in SOURCES:
        for rule, line in uses(path.read_text(encoding="utf-8")):
            lines.setdefault((path.relative_to(ROOT).as_posix(), rule), []).append(line)
    return lines


def allowing(file: str, rule: str) -> list[tuple[str, str]]:
    """The entries of `ALLOWED` that a use falls under."""
    return [entry for entry in ALLOWED if entry[1] == rule and fnmatchcase(file, entry[0])]


PLANTED = [
    ("eval(text)", "eval"),
    ("import builtins\nbuiltins.eval(text)", "eval"),
    ("exec(text)", "exec"),
    ("compile(text, 'a', 'exec')", "compile"),
    ("import pickle", "unpickling"),
    ("from _pickle import loads", "unpickling"),
    ("import marshal", "unpickling"),
    ("import shelve as s", "unpickling"),
    ("def late():\n    import dill", "unpickling"),
    ("from joblib import load", "unpickling"),
    ("import torch\ntorch.load(path)", "torch.load"),
    ("import torch as t\nread = t.load", "torch.load"),
    ("from torch import load as read", "torch.load"),
    ("import torch\ntorch.jit.load(path)", "torch.load"),
    ("torch_load(path, weights_only=False)", "weights_only"),
    ("read(path, weights_only=flag)", "weights_only"),
    ("run('ls', shell=True)", "shell"),
    ("run('ls', shell=flag)", "shell"),
    ("import os\nos.system('ls')", "shell"),
    ("from os import popen", "shell"),
    ("import yaml\nyaml.load(text)", "yaml.load"),
    ("from yaml import unsafe_load", "yaml.load"),
    ("AutoModel.from_pretrained(name, trust_remote_code=True)", "trust_remote_code"),
    ("AutoModel.from_pretrained(name, trust_remote_code=flag)", "trust_remote_code"),
    ("__import__(name)", "import by name"),
    ("import importlib\nimportlib.import_module(name)", "import by name"),
    ("from importlib import import_module as get\nget(f'{name}.x')", "import by name"),
    ("import runpy", "import by name"),
    ("import numpy as np\nnp.load(path, allow_pickle=True)", "allow_pickle"),
    ("import tempfile\ntempfile.mktemp()", "mktemp"),
    ("from tempfile import mktemp", "mktemp"),
    ("archive.extractall(folder)", "unpacking"),
    ("import shutil\nshutil.unpack_archive(path)", "unpacking"),
    ("import subprocess", "program"),
    ("import os\nos.execv(path, [])", "program"),
    ("import requests", "network"),
    ("from urllib.request import urlopen", "network"),
    ("from urllib import request", "network"),
    ("import http.client", "network"),
    ("from http import server", "network"),
    ("import httpx", "network"),
    ("import socket\nsocket.create_connection(place)", "network"),
    ("import socket as s\ns.socket()", "network"),
    ("from socket import create_connection", "network"),
    ("from huggingface_hub import snapshot_download", "network"),
]


@pytest.mark.parametrize(("source", "rule"), PLANTED)
def test_the_rule_sees_a_planted_use(source: str, rule: str) -> None:
    assert {name for name, _ in uses(source)} == {rule}


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()\nre.compile('a')\ntorch.compile(model)\nself.exec()",
        "import torch\ntorch.save(state, path)\njson.load(file)",
        "run(['ls'], shell=False)\nread(path, weights_only=True)\nread(path, allow_pickle=False)",
        "import importlib\nimportlib.import_module('deepspeed')",
        "from urllib.parse import quote\nfrom http import HTTPStatus",
        "import socket\nsocket.gethostname()\ndef f(connection: socket.socket) -> None: ...",
        "import yaml\nyaml.safe_load(text)",
        "from longtake.web import requests",
    ],
)
def test_the_rules_let_pass_what_only_looks_alike(source: str) -> None:
    assert list(uses(source)) == []


def test_every_rule_has_a_planted_use() -> None:
    assert {*MODULES, *NAMES, *KEYWORDS} == {rule for _, rule in PLANTED}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_is_forbidden_is_used_only_where_it_is_allowed(path: Path) -> None:
    file = path.relative_to(ROOT).as_posix()
    assert {rule: lines for (name, rule), lines in found().items() if name == file and not allowing(name, rule)} == {}


def test_every_allowed_use_is_there_and_has_a_reason() -> None:
    used = {entry for file, rule in found() for entry in allowing(file, rule)}
    assert set(ALLOWED) - used == set()
    assert min(map(len, ALLOWED.values())) > 20


def test_pickles_are_read_in_one_call_that_takes_nothing_but_weights() -> None:
    text = (ROOT / "src/longtake/models/wan/pickles.py").read_text(encoding="utf-8")
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    loading = [call for call in calls if ast.unparse(call.func) == "torch.load"]
    assert len(loading) == len(found()["src/longtake/models/wan/pickles.py", "torch.load"]) == 1
    assert "weights_only=True" in ast.unparse(loading[0])


def test_modules_are_imported_by_names_that_are_literals() -> None:
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES]
    calls = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    named = [call.args[0] for call in calls if ast.unparse(call.func) == "require_torchao"]
    assert named
    assert all(isinstance(name, ast.Constant) and str(name.value).startswith("torchao") for name in named)
