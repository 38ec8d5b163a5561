"""Paths and files that ask for other files or for the network: no request leaves, and nothing outside is opened."""

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import clips
from command_line import run, small_run, write_config
from watched import Listener, Watch, listening, watching

PLACES = [
    "http://{host}/a.mp4",
    "HTTPS://{host}/a.mp4",
    "ftp://{host}/a.mp4",
    "rtmp://{host}/a",
    "rtsp://{host}/a",
    "tcp://{host}",
    "udp://{host}",
    "tls://{host}",
    "hls+http://{host}/a.m3u8",
    "async:http://{host}/a.mp4",
    "cache:http://{host}/a.mp4",
    "crypto:http://{host}/a.mp4",
    "concat:a.mp4|http://{host}/a.mp4",
    "concat:a.mp4|{secret}",
    "subfile,,start,0,end,0,,:{secret}",
    "file:{secret}",
    "file://{secret}",
    "pipe:0",
    "fd:0",
    "data:video/mp4;base64,AAAA",
    "\\\\{host}\\share\\a.mp4",
    "{secret}",
    "../secret.mp4",
    "a.mp4/../../secret.mp4",
    "inner/../../secret.mp4",
    "link.mp4",
    "folder/secret.mp4",
    "/proc/self/fd/0",
    "/proc/self/root{secret}",
    "/dev/stdin",
    "~/secret.mp4",
    "%2e%2e/secret.mp4",
]
"""In the column `video`; `{host}` is the listener, `{secret}` a sound clip beside the data set's folder."""

CONTENTS = {
    "playlist.mp4": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://{host}/a.ts\n#EXTINF:9,\n{secret}\n#EXT-X-ENDLIST\n",
    "master.mov": '#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\nhttp://{host}/b.m3u8\n#EXT-X-MEDIA:TYPE=AUDIO,URI="{secret}"\n',
    "script.mkv": "ffconcat version 1.0\nfile '{secret}'\nfile 'http://{host}/a.mp4'\n",
    "session.avi": "v=0\no=- 0 0 IN IP4 {address}\ns=x\nc=IN IP4 {address}\nt=0 0\nm=video {port} RTP/AVP 96\n",
    "manifest.webm": '<?xml version="1.0"?>\n<MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><BaseURL>http://{host}/</BaseURL></MPD>\n',
    "picture.png": '<svg xmlns="http://www.w3.org/2000/svg"><image href="http://{host}/a.png"/></svg>\n',
    "entity.mp4": '<?xml version="1.0"?><!DOCTYPE x [<!ENTITY e SYSTEM "file://{secret}">]><x>&e;</x>\n',
    "shortcut.mp4": "[InternetShortcut]\nURL=http://{host}/a.mp4\n",
    "lyrics.mp4": "[playlist]\nFile1=http://{host}/a.mp4\nNumberOfEntries=1\n",
}
"""Of files inside the data set."""


@pytest.fixture
def listener() -> Iterator[Listener]:
    with listening() as found:
        yield found


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A sound clip that nobody may open, beside the data set."""
    return clips.write(tmp_path.resolve() / "secret.mp4", clips.levels(8), fps=16)


@pytest.fixture
def watch(secret: Path) -> Iterator[Watch]:
    with watching(secret) as found:
        yield found


@pytest.fixture
def data(secret: Path) -> Path:
    """A data set with links that lead out of it."""
    folder = secret.parent / "data"
    (folder / "inner").mkdir(parents=True)
    clips.write(folder / "a.mp4", clips.levels(8), fps=16)
    (folder / "link.mp4").symlink_to(secret)
    (folder / "folder").symlink_to(secret.parent)
    return folder


def filled(text: str, listener: Listener, secret: Path) -> str:
    host = f"127.0.0.1:{listener.port}"
    return text.format(host=host, secret=secret, address="127.0.0.1", port=listener.port)


@pytest.fixture
def said(tmp_path: Path, tiny_root: Callable[[str], Path]) -> Callable[..., tuple[int, str]]:
    """Status and everything that `doctor` says of a source, its pictures drawn too."""

    def doctor(source: Path | str, **settings: object) -> tuple[int, str]:
        table = small_run(tiny_root("tiny-t2v"), Path(), tmp_path)
        config = write_config(tmp_path / "run.toml", table, {"data": {"source": str(source), **settings}})
        outcome = run("doctor", config, "--no-plan", "--html", tmp_path / "page.html")
        assert "Traceback" not in outcome.err
        return outcome.status, outcome.out + outcome.err

    return doctor


def test_the_listener_and_the_watch_notice(listener: Listener, secret: Path, watch: Watch) -> None:
    with socket.create_connection(("127.0.0.1", listener.port)):
        pass
    secret.read_bytes()
    assert listener.callers() == 1
    assert watch.opened() == [secret]


def test_no_path_leads_out_of_a_data_set(
    data: Path, listener: Listener, secret: Path, watch: Watch, said: Callable[..., tuple[int, str]]
) -> None:
    rows = [filled(place, listener, secret) for place in PLACES]
    source = data / "clips.csv"
    source.write_text("video,prompt\n" + "".join(f'"{row}",x\n' for row in rows))
    status, text = said(source)
    assert status == 2
    assert [row for number, row in enumerate(rows, 2) if f"clips.csv:row {number}: " not in text] == []
    assert f"{len(rows)} of {len(rows)} clips cannot be used" in text
    assert listener.callers() == 0
    assert watch.opened() == []


def test_what_files_refer_to_is_not_fetched(
    data: Path, listener: Listener, secret: Path, watch: Watch, said: Callable[..., tuple[int, str]]
) -> None:
    for name, content in CONTENTS.items():
        (data / name).write_text(filled(content, listener, secret))
    source = data / "clips.csv"
    source.write_text("video,prompt\n" + "".join(f"{name},x\n" for name in CONTENTS))
    status, text = said(source)
    assert status == 2
    assert [number for number in range(len(CONTENTS)) if f"clips.csv:row {number + 2}: " not in text] == []
    assert text.count("[file-playlist]") >= 3
    assert listener.callers() == 0
    assert watch.opened() == []


def test_allowed_links_allow_no_request(
    data: Path, listener: Listener, secret: Path, watch: Watch, said: Callable[..., tuple[int, str]]
) -> None:
    source = data / "clips.csv"
    rows = [filled(place, listener, secret) for place in PLACES if "{host}" in place] + ["link.mp4"]
    source.write_text("video,prompt\n" + "".join(f'"{row}",x\n' for row in rows))
    status, text = said(source, allow_links=True)
    assert status == 2
    assert f"{len(rows) - 1} of {len(rows)} clips cannot be used" in text
    assert listener.callers() == 0
    assert secret in watch.opened()


@pytest.mark.parametrize("source", ["http://{host}/clips.csv", "../secret.mp4", "concat:{secret}", "/dev/stdin"])
def test_a_source_is_no_address(
    source: str, listener: Listener, secret: Path, watch: Watch, said: Callable[..., tuple[int, str]]
) -> None:
    status, text = said(filled(source, listener, secret))
    assert status == 2
    assert "error: " in text
    assert listener.callers() == 0
    assert watch.opened() == []
