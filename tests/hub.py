"""A stand-in for the Hugging Face Hub: a server that takes what `huggingface_hub` sends and keeps it."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Hub:
    """What has arrived: repositories with whether they are private, branches, and files by (repository, branch).

    `refusals` are statuses to answer with, by the beginning of a path.
    """

    url: str = ""
    repositories: dict[str, bool] = field(default_factory=dict)
    branches: set[tuple[str, str]] = field(default_factory=set)
    files: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    refusals: dict[str, int] = field(default_factory=dict)


@contextmanager
def hub() -> Iterator[Hub]:
    """A hub that answers inside the context."""
    held = Hub()

    class Handler(_Handler):
        hub = held

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    held.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield held
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Who the user is, and what a repository is."""
        self._answer(lambda _body: self._get())

    def do_POST(self) -> None:
        """All else."""
        self._answer(self._post)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Says nothing."""

    def _answer(self, of: Any) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.asked.append(f"{self.command} {self.path}")
        refused = [status for start, status in self.hub.refusals.items() if self.path.startswith(start)]
        status, answer = (refused[0], {"error": "refused"}) if refused else of(body)
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _get(self) -> tuple[int, Any]:
        if self.path == "/api/whoami-v2":
            return 200, {"name": "owner", "type": "user", "auth": {}}
        return 404, {"error": f"nothing at {self.path}"}

    def _post(self, body: bytes) -> tuple[int, Any]:
        if self.path == "/api/repos/create":
            return self._create(json.loads(body))
        if self.path == "/api/validate-yaml":
            return 200, {"warnings": [], "errors": []}
        _, _, kind, owner, name, action, revision = self.path.split("/", 6)
        assert kind == "models"
        repo = f"{owner}/{name}"
        if action == "branch":
            self.hub.branches.add((repo, revision))
            return 200, {}
        if action == "preupload":
            wanted = json.loads(body)["files"]
            return 200, {
                "files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in wanted]
            }
        assert action == "commit"
        return self._commit(repo, revision.partition("?")[0], body)

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        repo = asked["name"] if "/" in asked["name"] else f"{asked.get('organization') or 'owner'}/{asked['name']}"
        if repo in self.hub.repositories:
            return 409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{repo}"}
        self.hub.repositories[repo] = bool(asked.get("private")) or asked.get("visibility") == "private"
        return 200, {"url": f"{self.hub.url}/{repo}", "name": repo}

    def _commit(self, repo: str, revision: str, body: bytes) -> tuple[int, Any]:
        files = self.hub.files.setdefault((repo, revision), {})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "header":
                self.hub.messages.append(line["value"]["summary"])
            else:
                assert (line["key"], line["value"]["encoding"]) == ("file", "base64")
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return 200, {"commitUrl": f"{self.hub.url}/{repo}/commit/{'0' * 40}", "commitOid": "0" * 40, "success": True}
