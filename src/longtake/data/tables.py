"""Rows of a CSV, JSON or JSONL file, with the place of each in the file, whatever the file's encoding."""

import csv
import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any, NoReturn

from longtake.data.regular_files import open_regular, refusal
from longtake.errors import DataError, Problem

_BOMS = (
    (b"\xef\xbb\xbf", "utf-8-sig"),
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
_SAVE = "save it as UTF-8"
MAX_BYTES = 2**30
"""Of a table: its rows take several times as much of memory."""


@dataclass(frozen=True)
class Row:
    """One row: the place it has in the file, its values by column, and what is wrong with its form."""

    where: str
    values: Mapping[str, object] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def rows_of(source: Path) -> list[Row]:
    """The rows of a CSV, JSON (a list of objects) or JSONL file; raises DataError where the file as a whole is broken.

    Column names are in lower case and without blanks around them.
    """
    readers = {".csv": _csv_rows, ".json": _json_rows, ".jsonl": _jsonl_rows, ".ndjson": _jsonl_rows}
    reader = readers.get(source.suffix.lower())
    if reader is None:
        remedy = "give a folder of clips, or a .csv, .json or .jsonl file"
        what = f"a source may not be a {source.suffix or 'file without ending'}"
        raise refusal(what, source.name, remedy, code="source-kind")
    with open_regular(source.resolve(), source.name) as file:
        if os.fstat(file.fileno()).st_size > MAX_BYTES:
            what = f"has more than {MAX_BYTES / 2**30:.0f} GiB"
            raise refusal(what, source.name, "divide it, or take out columns", code="table-too-large")
        text = read_text(file, source.name)
    return reader(text, source.name)


def read_text(file: BufferedReader, where: str) -> str:
    """The file's text, from UTF-8, UTF-16 or UTF-32 with a byte order mark, or GBK; else raises DataError."""
    raw = file.read()
    encoding = next((name for mark, name in _BOMS if raw.startswith(mark)), "utf-8")
    if encoding == "utf-8" and raw.count(0) > len(raw) // 4:
        raise refusal("the text looks like UTF-16 without a byte order mark", where, _SAVE, code="text-without-mark")
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError:
        return _from_gbk(raw, where) if encoding == "utf-8" else _refuse_encoding(encoding, where)


def _from_gbk(raw: bytes, where: str) -> str:
    try:
        text = raw.decode("gb18030")
    except UnicodeDecodeError:
        return _refuse_encoding("UTF-8 or GBK", where)
    # Latin-1 can decode as GBK, but to rare characters: of a Chinese text nearly all are in the older GB 2312.
    foreign = [character for character in text if not character.isascii()]
    common = sum(bool(character.encode("gb2312", "ignore")) for character in foreign)
    return text if common >= 0.8 * len(foreign) else _refuse_encoding("UTF-8 or GBK", where)


def _refuse_encoding(encoding: str, where: str) -> NoReturn:
    raise refusal(f"the text is not valid {encoding}", where, _SAVE, code="text-encoding")


def _csv_rows(text: str, name: str) -> list[Row]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        lines = list(reader)
    except csv.Error as error:
        remedy = "close every quote, and double the quotes inside a caption"
        raise refusal(
            f"broken CSV ({error})", f"{name}:line {reader.line_num}", remedy, code="table-broken-csv"
        ) from None
    if not lines:
        return []
    header = [column.strip().lower() for column in lines[0]]
    _check_header(header, name)
    numbered = ((f"{name}:row {number}", line) for number, line in enumerate(lines[1:], 2))
    return [_csv_row(where, header, line) for where, line in numbered if any(cell.strip() for cell in line)]


def _check_header(header: list[str], name: str) -> None:
    doubled = sorted({column for column in header if column and header.count(column) > 1})
    if doubled:
        what = f"column {doubled[0]!r} is there twice"
        raise refusal(what, f"{name}:row 1", "rename or remove one", code="table-doubled-column")
    if len(header) == 1 and any(mark in header[0] for mark in ";\t|"):
        what = "the columns are not separated by commas"
        raise refusal(what, f"{name}:row 1", "save it with commas", code="table-no-commas")


def _csv_row(where: str, header: list[str], line: list[str]) -> Row:
    if len(line) != len(header):
        what = f"has {len(line)} fields, the header has {len(header)}"
        remedy = 'put captions that have commas in "quotes"'
        return Row(where, problems=[Problem(what, where, remedy, code="row-fields")])
    return Row(where, dict(zip(header, line, strict=True)))


def _jsonl_rows(text: str, name: str) -> list[Row]:
    lines = enumerate(text.split("\n"), 1)
    return [_jsonl_row(line, f"{name}:line {number}") for number, line in lines if line.strip()]


def _jsonl_row(line: str, where: str) -> Row:
    try:
        return _json_row(_parse(line, where), where)
    except DataError as error:
        return Row(where, problems=list(error.problems))


def _json_rows(text: str, name: str) -> list[Row]:
    if not text.strip():
        return []
    items = _parse(text, name)
    if not isinstance(items, list):
        raise refusal("is not a list", name, 'write [{"video": "a.mp4", "prompt": "..."}, ...]', code="table-no-list")
    return [_json_row(item, f"{name}:item {number}") for number, item in enumerate(items, 1)]


def _json_row(item: object, where: str) -> Row:
    if not isinstance(item, dict):
        remedy = 'write {"video": "a.mp4", "prompt": "..."}'
        return Row(
            where, problems=[Problem(f"is {str(item)[:80]!r}, not an object", where, remedy, code="row-no-object")]
        )
    return Row(where, {str(key).strip().lower(): value for key, value in item.items()})


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_without_doubles)
    except RecursionError:
        raise refusal("has lists in lists without end", where, "write one list", code="table-nested") from None
    except _DoubledKeyError as error:
        raise refusal(str(error), where, "rename or remove one", code="table-doubled-key") from None
    except ValueError as error:
        raise refusal(f"broken JSON ({error})", where, "correct it there", code="table-broken-json") from None


def _without_doubles(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        doubled = next(key for key in keys if keys.count(key) > 1)
        raise _DoubledKeyError(f"a key is there twice: {doubled[:80]!r}")
    return values


class _DoubledKeyError(ValueError):
    pass
