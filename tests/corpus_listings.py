"""Malformed captions, rows and tables: how each is written, and with which code it is refused."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CAPTION = "ein Hügel, grün"
CLIP = "clip.mp4"
"""A clip that is well, beside every table and for every row."""


@dataclass(frozen=True)
class Caption:
    """What makes the caption's file of a clip, in a folder beside that of the clips."""

    name: str
    code: str
    make: Callable[[Path], object]
    orphan: bool = False


@dataclass(frozen=True)
class Line:
    """A row as a JSONL file has it."""

    name: str
    code: str
    text: str


@dataclass(frozen=True)
class Table:
    """A table that is refused at `place` in it, or as a whole."""

    name: str
    code: str
    make: Callable[[Path], object]
    place: str = ""


def written(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def linked(target: str) -> Callable[[Path], object]:
    return lambda path: path.symlink_to(target)


def sparse(size: int) -> Callable[[Path], object]:
    """A file of that size which takes no space."""

    def make(path: Path) -> None:
        path.touch()
        os.truncate(path, size)

    return make


def row(**values: Any) -> str:
    """A row that is well but for `values`."""
    return json.dumps({"video": CLIP, "prompt": CAPTION, **values})


def csv(text: str, start: str = "video,prompt\n", encoding: str = "utf-8") -> bytes:
    return (start + text).encode(encoding)


def array(*lines: str) -> bytes:
    return f"[{','.join(lines)}]".encode()


CAPTIONS = (
    Caption("none", "clip-without-caption", lambda path: None),
    Caption("orphan", "caption-without-clip", written(b"a hill"), orphan=True),
    Caption("nothing", "caption-empty", Path.touch),
    Caption("mark-only", "caption-empty", written(b"\xef\xbb\xbf")),
    Caption("blank", "caption-empty", written(" \n\t\u3000".encode())),
    Caption("latin", "text-encoding", written(CAPTION.encode("latin-1"))),
    Caption("broken-utf-8", "text-encoding", written(b"\xef\xbb\xbfa h\xffll")),
    Caption("broken-utf-16", "text-encoding", written(CAPTION.encode("utf-16") + b"!")),
    Caption("broken-utf-32", "text-encoding", written(b"\xff\xfe\0\0a\0\0\0\0\xd8\0\0")),
    Caption("without-mark", "text-without-mark", written(CAPTION.encode("utf-16-le"))),
    Caption("nul", "caption-nul", written(b"a hill\0 green")),
    Caption("outside", "path-outside", linked("../../elsewhere.txt")),
    Caption("circle", "path-unusable", linked("circle.txt")),
    Caption("dangling", "file-missing", linked("gone.txt")),
    Caption("folder", "file-irregular", Path.mkdir),
    Caption("pipe", "file-irregular", os.mkfifo),
    Caption("long", "caption-too-long", written(b"a hill " * 10_000)),
    Caption("huge", "caption-too-long", sparse(50 * 2**20)),
)

LINES = (
    Line("caption-null", "caption-missing", row(prompt=None)),
    Line("caption-absent", "caption-missing", json.dumps({"video": CLIP})),
    Line("caption-number", "caption-no-text", row(prompt=3)),
    Line("caption-list", "caption-no-text", row(prompt=["a hill", "a lake"])),
    Line("caption-object", "caption-no-text", row(prompt={"en": "a hill"})),
    Line("caption-blank", "caption-empty", row(prompt=" \u00a0")),
    Line("caption-nul", "caption-nul", row(prompt="a\0hill")),
    Line("caption-half", "caption-half-pair", '{"video": "clip.mp4", "prompt": "a \\ud83d kite"}'),
    Line("caption-long", "caption-too-long", row(prompt="a hill " * 10_000)),
    Line("start-negative", "row-start", row(start=-0.5)),
    Line("start-text", "row-start", row(start="0:03")),
    Line("start-nan", "row-start", row(start=float("nan"))),
    Line("start-infinite", "row-start", row(start=float("inf"))),
    Line("start-late", "row-start-late", row(start=99)),
    Line("frames-fraction", "row-frames", row(frames=4.5)),
    Line("frames-none", "row-frames", row(frames=0)),
    Line("frames-text", "row-frames", row(frames="all")),
    Line("frames-true", "row-frames", row(frames=True)),
    Line("frames-few", "clip-too-short", row(frames=3)),
    Line("frames-many", "row-frames", row(frames=10**30)),
    Line("fps-none", "row-fps", row(fps=0)),
    Line("fps-text", "row-fps", row(fps="30000/1001")),
    Line("fps-huge", "row-fps", row(fps=1e300)),
    Line("path-null", "path-missing", row(video=None)),
    Line("path-empty", "path-missing", row(video="")),
    Line("path-blank", "path-missing", row(video=" ")),
    Line("path-number", "path-no-text", row(video=7)),
    Line("path-list", "path-no-text", row(video=[CLIP])),
    Line("path-above", "path-outside", row(video="../elsewhere.mp4")),
    Line("path-absolute", "path-outside", row(video="/etc/passwd")),
    Line("path-link", "path-outside", row(video="link.mp4")),
    Line("path-url", "path-url", row(video="https://example.org/a.mp4")),
    Line("path-protocol", "path-url", row(video="concat:a.mp4|b.mp4")),
    Line("path-nul", "path-unusable", row(video="a\0.mp4")),
    Line("path-long", "path-unusable", row(video="a" * 5000)),
    Line("path-half", "path-encoding", '{"video": "\\udcff.mp4", "prompt": "a hill"}'),
    Line("path-gone", "file-missing", row(video="gone.mp4")),
    Line("path-case", "file-missing", row(video="CLIP.mp4")),
    Line("path-backslash", "file-missing", row(video="clips\\clip.mp4")),
    Line("path-folder", "file-irregular", row(video=".")),
    Line("array", "row-no-object", "[1, 2]"),
    Line("null", "row-no-object", "null"),
    Line("broken", "table-broken-json", '{"video": "clip.mp4", "prompt"'),
    Line("key-twice", "table-doubled-key", '{"video": "clip.mp4", "prompt": "a hill", "prompt": "a lake"}'),
    Line("deep", "table-nested", "[" * 100_000),
    Line("digits", "table-broken-json", '{"video": "clip.mp4", "prompt": "a hill", "start": ' + "1" * 5000 + "}"),
)

TABLES = (
    Table("empty.csv", "file-empty", written(b"")),
    Table("blank.csv", "table-no-rows", written(b"\n \n")),
    Table("head.csv", "table-no-rows", written(csv(""))),
    Table("no-caption.csv", "table-no-column", written(csv(f"{CLIP}\n", "video\n"))),
    Table("misnamed.csv", "table-no-column", written(csv(f"{CLIP},a hill\n", "vidoe,prompt\n"))),
    Table("headless.csv", "table-no-column", written(csv(f"{CLIP},a hill\n{CLIP},a lake\n", ""))),
    Table("column-twice.csv", "table-doubled-column", written(csv(f"{CLIP},a,b\n", "video,prompt,Prompt\n")), "row 1"),
    Table("semicolons.csv", "table-no-commas", written(csv(f"{CLIP};a hill\n", "video;prompt\n")), "row 1"),
    Table("tabs.csv", "table-no-commas", written(csv(f"{CLIP}\ta hill, green\n", "video\tprompt\n")), "row 1"),
    Table("quote.csv", "table-broken-csv", written(csv(f'{CLIP},"a hill\n{CLIP},a lake\n')), "line 3"),
    Table("quotes.csv", "table-broken-csv", written(csv(f'{CLIP},"a "big" hill"\n')), "line 2"),
    Table("many-fields.csv", "row-fields", written(csv(f"{CLIP},a hill, green\n")), "row 2"),
    Table("few-fields.csv", "row-fields", written(csv(f"{CLIP},a hill\n{CLIP}\n")), "row 3"),
    Table("latin.csv", "text-encoding", written(csv(f"{CLIP},{CAPTION}\n", encoding="latin-1"))),
    Table(
        "broken-mark.csv", "text-encoding", written(b"\xef\xbb\xbf" + csv(f"{CLIP},{CAPTION}\n", encoding="latin-1"))
    ),
    Table("without-mark.csv", "text-without-mark", written(csv(f"{CLIP},a hill\n", encoding="utf-16-le"))),
    Table("nul.csv", "caption-nul", written(csv(f"{CLIP},a\0hill\n")), "row 2"),
    Table("object.json", "table-no-list", written(row().encode())),
    Table("nothing.json", "table-no-rows", written(b"[]")),
    Table("comma.json", "table-broken-json", written(f"[{row()},]".encode())),
    Table("cut.json", "table-broken-json", written(array(row(), row())[:-20])),
    Table("key-twice.json", "table-doubled-key", written(b'[{"video": "clip.mp4", "video": "b.mp4", "prompt": "a"}]')),
    Table("deep.json", "table-nested", written(b"[" * 100_000)),
    Table("texts.json", "row-no-object", written(array('"clip.mp4"')), "item 1"),
    Table("zeros.json", "text-without-mark", written(bytes(4000))),
    Table("list.txt", "source-kind", written(b"clip.mp4 a hill")),
    Table("list.xlsx", "source-kind", written(b"PK\3\4")),
    Table("list", "source-kind", written(b"clip.mp4 a hill")),
)
HUGE_TABLE = Table("huge.csv", "table-too-large", sparse(2**30 + 1))
