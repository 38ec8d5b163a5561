"""Fetching: from a cache of the hub's layout, from a hub on this machine, and what is said where it fails."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

import pytest

from longtake.errors import ModelError
from longtake.models.hub import fetch

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "model_index.json": b"{}",
    "transformer/config.json": b'{"a": 1}',
    "transformer/model.safetensors": bytes(3 * 2**20),
    "README.md": b"not wanted",
}
PATTERNS = ["model_index.json", "transformer/*"]
CHILD = """
import json, sys
from longtake.errors import ModelError
from longtake.models.hub import fetch

lines = []
try:
    path = str(fetch(sys.argv[1], sys.argv[2:], lines.append))
except ModelError as error:
    print(json.dumps({"lines": lines, "error": str(error)}))
else:
    print(json.dumps({"lines": lines, "path": path}))
"""


class Hub(BaseHTTPRequestHandler):
    """The few routes of the Hugging Face Hub that a download takes, for one model; another one is gated."""

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        path = urlsplit(self.path).path
        if "/owner/gated" in path:
            return self.send(403, b"", {"X-Error-Code": "GatedRepo"}, with_body)
        if "/owner/model" not in path:
            return self.send(404, b"", {"X-Error-Code": "RepoNotFound"}, with_body)
        if path.startswith("/api/models/owner/model/tree/"):
            return self.send(200, json.dumps(tree()).encode(), {"Content-Type": "application/json"}, with_body)
        if path.startswith("/api/models/owner/model"):
            return self.send(200, json.dumps(info()).encode(), {"Content-Type": "application/json"}, with_body)
        content = FILES[path.removeprefix(f"/owner/model/resolve/{COMMIT}/")]
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{blob(content)}"'}
        return self.send(200, content, headers, with_body)

    def send(self, status: int, content: bytes, headers: dict[str, str], with_body: bool) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


def blob(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def tree() -> list[dict[str, object]]:
    return [{"type": "file", "path": name, "size": len(data), "oid": blob(data)} for name, data in FILES.items()]


def info() -> dict[str, object]:
    siblings = [{"rfilename": name, "size": len(data), "blobId": blob(data)} for name, data in FILES.items()]
    return {"id": "owner/model", "modelId": "owner/model", "sha": COMMIT, "siblings": siblings}


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    """The address of a running hub."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def fetched(
    model_id: str, cache: Path, endpoint: str = "", patterns: list[str] = PATTERNS, **settings: str
) -> tuple[dict[str, object], str]:
    """What `fetch` returns, raises and reports in a process of its own, which reads the settings anew; and stderr."""
    environment = os.environ | {"HF_HOME": str(cache), "HF_HUB_CACHE": str(cache / "hub"), "NO_PROXY": "*"}
    environment |= {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint} if endpoint else {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", CHILD, model_id, *patterns]
    child = subprocess.run(command, capture_output=True, text=True, check=True, env=environment | settings)
    return json.loads(child.stdout), child.stderr


def fill_cache(cache: Path) -> Path:
    """A cache as the hub's library lays it out, with `owner/model` in it."""
    repository = cache / "hub" / "models--owner--model"
    snapshot = repository / "snapshots" / COMMIT
    for name, content in FILES.items():
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).write_bytes(content)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return snapshot


def test_a_cached_model_is_found_offline(tmp_path: Path) -> None:
    snapshot = fill_cache(tmp_path)
    assert fetched("owner/model", tmp_path)[0] == {
        "lines": ["owner/model: offline, using the cache"],
        "path": str(snapshot),
    }


def test_a_cached_model_is_found_where_the_hub_does_not_answer(tmp_path: Path) -> None:
    snapshot = fill_cache(tmp_path)
    result, _ = fetched("owner/model", tmp_path, endpoint="http://127.0.0.1:9")
    assert result["path"] == str(snapshot)
    assert "cannot be reached" in str(result["lines"])


@pytest.mark.parametrize("endpoint", ["", "http://127.0.0.1:9"])
def test_a_model_that_is_neither_cached_nor_reachable_is_one_line(tmp_path: Path, endpoint: str) -> None:
    error = str(fetched("owner/model", tmp_path, endpoint)[0]["error"])
    assert error.startswith("owner/model: cannot be fetched (")
    assert "HF_HUB_OFFLINE" in error
    assert len(error.splitlines()) == 1


def test_the_size_is_told_before_and_progress_is_shown_while_downloading(tmp_path: Path, hub: str) -> None:
    result, progress = fetched("owner/model", tmp_path, hub)
    assert result["lines"] == [f"owner/model: downloading 3 files, 3.0 MiB, to {tmp_path / 'hub'}"]
    folder = Path(str(result["path"]))
    assert {name: (folder / name).is_file() for name in FILES} == {name: name != "README.md" for name in FILES}
    assert (folder / "transformer/model.safetensors").read_bytes() == FILES["transformer/model.safetensors"]
    assert "3/3" in progress
    again, _ = fetched("owner/model", tmp_path, hub)
    assert again == {"lines": [], "path": str(folder)}


@pytest.mark.parametrize(
    ("model_id", "message"),
    [
        ("owner/unknown", "owner/unknown: there is no such model on the hub"),
        ("owner/gated", "owner/gated: this model is gated; accept its terms"),
        ("not a/valid/id", "not a/valid/id: there is no such model on the hub"),
    ],
)
def test_a_model_that_the_hub_refuses_is_one_line(tmp_path: Path, hub: str, model_id: str, message: str) -> None:
    result, _ = fetched(model_id, tmp_path, hub)
    assert str(result["error"]).startswith(message)
    assert len(str(result["error"]).splitlines()) == 1


def test_a_repository_without_the_wanted_files_is_refused(tmp_path: Path, hub: str) -> None:
    result, _ = fetched("owner/model", tmp_path, hub, ["high_noise_model/*"])
    assert "has none of the files" in str(result["error"])


def test_modelscope_without_its_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(ModelError, match=r"ms://owner/model: .*longtake\[modelscope\]"):
        fetch("ms://owner/model", PATTERNS, print)


@pytest.fixture
def modelscope(tmp_path: Path) -> str:
    """The import path of a stand-in with the four names of ModelScope's library that are used."""
    package = tmp_path / "library" / "modelscope"
    (package / "hub").mkdir(parents=True)
    names = ("NotExistError", "RequestError", "NotLoginException", "NoValidRevisionError", "FileDownloadError")
    (package / "hub" / "errors.py").write_text("".join(f"class {name}(Exception): ...\n" for name in names))
    (package / "hub" / "__init__.py").write_text("")
    (package / "hub" / "api.py").write_text(
        "class HubApi:\n"
        "    def get_model_files(self, model_id, recursive):\n"
        "        return [{'Path': 'model_index.json', 'Size': 5}, {'Path': 'transformer/x', 'Size': 1019},\n"
        "                {'Path': 'README.md', 'Size': 9}]\n"
    )
    (package / "__init__.py").write_text(
        "from modelscope.hub.errors import NotExistError\n"
        "def snapshot_download(model_id, allow_patterns):\n"
        "    if model_id != 'owner/model':\n"
        "        raise NotExistError('no such model')\n"
        "    return '/cache/' + model_id\n"
    )
    return str(package.parent)


def test_modelscope_is_asked_for_the_same_files(tmp_path: Path, modelscope: str) -> None:
    result, _ = fetched("ms://owner/model", tmp_path, PYTHONPATH=modelscope)
    assert result["path"] == "/cache/owner/model"
    assert result["lines"] == ["ms://owner/model: 2 files, 1.0 KiB, less what is in the cache"]


def test_a_model_that_modelscope_does_not_have_is_one_line(tmp_path: Path, modelscope: str) -> None:
    result, _ = fetched("ms://owner/unknown", tmp_path, PYTHONPATH=modelscope)
    assert str(result["error"]).startswith("ms://owner/unknown: cannot be fetched (no such model)")
