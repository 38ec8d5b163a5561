"""A file that takes too long, too much or the decoder itself is named, and the next one is read by a new decoder."""

import os
import signal
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

import clips
from longtake.data.decoder import Decoder, Limits, shared_decoder
from longtake.data.sniff import Window
from longtake.errors import DataError, Problem, RunError

WINDOW = Window(0.0, 3, 24.0)
Taken = Callable[..., Decoder]

ANSWER = """
import json, os, signal, socket, struct, sys, time
connection = socket.socket(fileno=int(sys.argv[1]))
def say(message):
    text = message if isinstance(message, bytes) else json.dumps(message).encode()
    connection.sendall(struct.pack(">I", len(text)) + text)
def ask():
    file, = socket.recv_fds(connection, 1, 1)[1] or [None]
    if file is None: sys.exit()
    length, = struct.unpack(">I", connection.recv(4))
    return file, json.loads(connection.recv(length))
ask()
"""
"""A decoder that something has taken over: it speaks as the real one does, and then does what follows."""


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return clips.write(tmp_path.resolve() / "a.mp4", clips.levels(6))


@pytest.fixture
def taken(tmp_path: Path) -> Taken:
    """Decoders that do `code` when they are asked."""
    made: list[Decoder] = []

    def make(code: str, **limits: float) -> Decoder:
        program = tmp_path / "decoder.py"
        program.write_text(ANSWER + textwrap.dedent(code))
        made.append(Decoder(Limits(**limits), [sys.executable, str(program)]))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for decoder in made:
        decoder.stop()


def refused(decoder: Decoder, path: Path) -> Problem:
    with pytest.raises(DataError) as found:
        decoder.look(path, "row 2")
    (problem,) = found.value.problems
    assert problem.where == "row 2"
    assert path.name in problem.what
    assert problem.remedy
    return problem


def test_pictures_come_from_another_process_that_serves_on(clip: Path) -> None:
    decoder = shared_decoder()
    assert decoder.look(clip, "row 2").frames == 6
    first = decoder.running
    assert first is not None
    assert first.process.pid != os.getpid()
    assert [pixels.shape for pixels in decoder.clip(clip, WINDOW, "row 2")] == 3 * [(48, 64, 3)]
    assert decoder.running is first


def test_a_picture_that_takes_too_long_is_given_up(taken: Taken, clip: Path) -> None:
    loop = """
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, (1, resource.RLIM_INFINITY))
    while True: pass
    """
    problem = refused(taken(loop, processor_seconds=1), clip)
    assert problem.code == "decode-time"
    assert "more than 1 s of processor time" in problem.what


def test_each_picture_has_its_time(clip: Path) -> None:
    decoder = Decoder(Limits(processor_seconds=1000))
    pictures = decoder.clip(clip, WINDOW, "row 2")
    next(pictures)
    assert decoder.running is not None
    process = psutil.Process(decoder.running.process.pid)
    during = process.rlimit(psutil.RLIMIT_CPU)[0]
    assert 1000 < during < 1100
    assert len(list(pictures)) == 2
    decoder.look(clip, "row 2")
    assert process.rlimit(psutil.RLIMIT_AS)[0] == Limits().memory_bytes
    decoder.stop()


def test_a_disk_that_does_not_answer_is_given_up(taken: Taken, clip: Path) -> None:
    started = time.monotonic()
    problem = refused(taken("signal.pause()", silence_seconds=0.3), clip)
    assert problem.code == "decode-silent"
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("sys.exit('something broke')", "exit status 1, something broke"),
        ("say(b'no json')", "answer nonsense"),
        ("say([1, 2])", "no message"),
        ("connection.sendall(struct.pack('>I', 2**31)); time.sleep(60)", "a long message"),
        ("say({'picture': [10**6, 10**6]}); time.sleep(60)", "too large a picture"),
        ("say({'picture': [-1, 5]}); time.sleep(60)", "too large a picture"),
        ("say({'picture': [4, 4]}); connection.sendall(bytes(7))", "makes the decoder fail"),
    ],
)
def test_a_decoder_that_fails_or_is_taken_over_is_ended_and_named(
    taken: Taken, clip: Path, code: str, said: str
) -> None:
    decoder = taken(code)
    problem = refused(decoder, clip)
    assert problem.code == "decode-crash"
    assert said in problem.what
    assert decoder.running is None


@pytest.mark.parametrize(
    "code",
    [
        "for _ in 'more': say({'picture': [1, 1]}), connection.sendall(bytes(3))\nsay({'done': True}), time.sleep(60)",
        "say({'picture': [1, 1]}); connection.sendall(bytes(3)); say({'done': True}); time.sleep(60)",
        "say({'again': True}); say({'done': True}); time.sleep(60)",
    ],
)
def test_a_decoder_that_shows_too_many_or_too_few_pictures_is_not_believed(taken: Taken, clip: Path, code: str) -> None:
    with pytest.raises(DataError, match=r"has shown \d+ frames of a\.mp4 instead of 3"):
        list(taken(code).clip(clip, WINDOW, "row 2"))


def test_pictures_that_fill_the_memory_are_refused_and_the_decoder_serves_on(tmp_path: Path, clip: Path) -> None:
    large = tmp_path.resolve() / "large.png"
    Image.fromarray(np.zeros((8000, 8000, 3), np.uint8)).save(large)
    decoder = Decoder(Limits(memory_bytes=600_000_000))
    try:
        with pytest.raises(DataError) as found:
            decoder.image(large, "row 2")
        assert found.value.problems[0].code == "decode-memory"
        assert "0.6 GB" in found.value.problems[0].what
        assert len(list(decoder.clip(clip, WINDOW, "row 2"))) == 3
    finally:
        decoder.stop()


def test_a_killed_decoder_is_replaced(clip: Path) -> None:
    decoder = Decoder()
    decoder.look(clip, "row 2")
    assert decoder.running is not None
    os.kill(decoder.running.process.pid, signal.SIGKILL)
    assert "SIGKILL" in refused(decoder, clip).what
    assert decoder.look(clip, "row 2").frames == 6
    decoder.stop()


def test_who_stops_reading_in_the_middle_leaves_no_pictures_for_the_next(clip: Path) -> None:
    decoder = Decoder()
    pictures = decoder.clip(clip, WINDOW, "row 2")
    first = next(pictures)
    pictures.close()
    assert np.array_equal(next(decoder.clip(clip, WINDOW, "row 2")), first)
    decoder.stop()


def test_a_process_that_was_forked_has_a_decoder_of_its_own(clip: Path) -> None:
    decoder = Decoder()
    decoder.look(clip, "row 2")
    child = os.fork()
    if child == 0:
        fine = decoder.look(clip, "row 2").frames == 6
        decoder.stop()
        os._exit(0 if fine else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert decoder.look(clip, "row 2").frames == 6
    decoder.stop()


def test_a_decoder_does_not_outlive_the_process_that_it_serves(clip: Path) -> None:
    decoder = Decoder()
    decoder.look(clip, "row 2")
    running = decoder.running
    assert running is not None
    running.connection.close()
    assert running.process.wait(10) == 0
    decoder.stop()


def test_a_system_that_cannot_hand_over_files_is_named(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("socket.send_fds")
    with pytest.raises(RunError, match="use Linux, macOS or WSL2"):
        Decoder().look(clip, "row 2")
