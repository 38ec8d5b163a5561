"""A run on the hub: which files arrive there, with which bytes, and what is said where the hub refuses."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from hub import Hub, hub
from longtake.errors import ConfigError, RunError
from longtake.training.push import Destination, push
from runs import Scene

Scenes = Callable[[str], Scene]
TO = Destination("owner/kites")
FILES = ("README.md", "adapter.safetensors", "samples/step-00000002-0.mp4")


@pytest.fixture
def server() -> Iterator[Hub]:
    with hub() as found:
        yield found


@pytest.fixture(scope="module")
def finished(scenes: Scenes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with samples of two steps."""
    scene = scenes("tiny-t2v")
    run = scene.train(
        scene.config(
            tmp_path_factory.mktemp("runs") / "kites",
            validation={"every": 1, "sample_steps": 1, "samples": [{"prompt": "A red kite"}]},
            output={"formats": ["comfyui", "diffusers"]},
        )
    )
    assert len([*(run / "samples").glob("*.mp4")]) == 3
    return run


def as_typed(run: Path, server: Hub, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`longtake push` in a process of its own."""
    command = [sys.executable, "-m", "longtake", "push", "--run", str(run), "--repo", "owner/kites", *arguments]
    settings = {
        "HF_ENDPOINT": server.url,
        "HF_TOKEN": "hf_test",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(run.parent / "hf"),
        "PATH": "",
        "HOME": str(run.parent),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(command, env=settings, capture_output=True, text=True, timeout=200, check=False)


def test_adapters_card_and_the_last_samples_arrive_bit_for_bit(finished: Path, server: Hub) -> None:
    ended = as_typed(finished, server, "--private")
    assert (ended.returncode, ended.stdout.strip()) == (0, f"{server.url}/owner/kites/commit/{'0' * 40}"), ended.stderr
    assert server.repositories == {"owner/kites": True}
    arrived = server.files["owner/kites", "main"]
    assert sorted(arrived) == sorted([*FILES, "adapter-diffusers.safetensors"])
    assert all(content == (finished / name).read_bytes() for name, content in arrived.items())
    assert server.messages == ["Upload kites"]


@pytest.fixture
def here(server: Hub, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """`here(run, destination)` pushes from this process, whose library has read its environment long ago."""
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    return lambda run, to=TO: push(run, to, lambda _line: None)


def test_a_second_push_goes_to_the_same_repository_and_a_branch_is_made(
    finished: Path, server: Hub, here: Callable[..., str]
) -> None:
    for _ in range(2):
        here(finished, Destination("owner/kites", revision="try"))
    assert server.repositories == {"owner/kites": False}
    assert server.branches == {("owner/kites", "try")}
    assert "adapter.safetensors" in server.files["owner/kites", "try"]
    assert len(server.messages) == 2


def test_a_card_of_one_s_own_is_uploaded_as_it_is(finished: Path, server: Hub, here: Callable[..., str]) -> None:
    card = (finished / "README.md").read_bytes()
    (finished / "README.md").write_text("my own words")
    here(finished)
    (finished / "README.md").write_bytes(card)
    assert server.files["owner/kites", "main"]["README.md"] == b"my own words"


def test_full_weights_arrive_as_a_component_of_diffusers(
    scenes: Scenes, tmp_path: Path, server: Hub, here: Callable[..., str]
) -> None:
    scene = scenes("tiny-t2v")
    run = scene.train(scene.config(tmp_path / "full", lora=None, training={"steps": 1}))
    here(run)
    arrived = server.files["owner/kites", "main"]
    names = {path.relative_to(run).as_posix() for path in (run / "transformer").iterdir()}
    assert arrived.keys() == names | {"README.md"}
    assert all(content == (run / name).read_bytes() for name, content in arrived.items())


@pytest.mark.parametrize(
    ("path", "status", "line"),
    [
        ("/api/repos/create", 401, "the hub does not know you; run `hf auth login` with a token that may write"),
        ("/api/repos/create", 403, "you may not write there; use a repository of yours and a token that may write"),
        ("/api/models/owner/kites/preupload", 404, "there is no such repository, or you may not see it; check owner"),
        ("/api/models/owner/kites/commit", 413, "the hub refused it ("),
    ],
)
def test_what_the_hub_refuses_is_one_line(
    finished: Path, server: Hub, here: Callable[..., str], path: str, status: int, line: str
) -> None:
    server.refusals[path] = status
    with pytest.raises(RunError) as caught:
        here(finished)
    assert str(caught.value).startswith(f"--repo owner/kites: {line}")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("setting", "value", "line"),
    [
        ("ENDPOINT", "http://127.0.0.1:9", "the hub cannot be reached ("),
        ("HF_HUB_OFFLINE", True, "the hub's library is offline; unset HF_HUB_OFFLINE"),
    ],
)
def test_a_hub_that_is_not_there_is_one_line(
    finished: Path,
    server: Hub,
    here: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    setting: str,
    value: object,
    line: str,
) -> None:
    monkeypatch.setattr(constants, setting, value)
    with pytest.raises(RunError) as caught:
        here(finished)
    assert str(caught.value).startswith(f"--repo owner/kites: {line}")
    assert len(str(caught.value).splitlines()) == 1
    assert server.asked == []


def test_what_cannot_be_pushed_is_named_and_the_hub_not_asked(
    finished: Path, server: Hub, here: Callable[..., str], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        here(finished, Destination("no/such/name"))
    wrong = "--repo no/such/name: this is no name of a repository; write owner/name [push-name-wrong]"
    assert str(caught.value) == wrong
    for name in ("foo", "/foo", "foo/", ""):
        with pytest.raises(ConfigError, match="this is no name of a repository; write owner/name"):
            here(finished, Destination(name))
    (tmp_path / "config.toml").write_bytes((finished / "config.toml").read_bytes())
    with pytest.raises(ConfigError) as caught:
        here(tmp_path)
    assert str(caught.value) == f"{tmp_path}: the run is not finished; continue it with --resume [run-unfinished]"
    assert server.asked == []


def test_the_samples_of_an_earlier_step_stay_behind(finished: Path) -> None:
    told = [json.loads(path.read_text()) for path in (finished / "samples").glob("*.json")]
    assert {entry["step"] for entry in told} == {0, 1, 2}
    text = (finished / "README.md").read_text()
    assert 'pipeline.load_lora_weights(".", weight_name="adapter.safetensors")' in text
    assert "step-00000002-0.mp4" in text
    assert "step-00000001-0.mp4" not in text
