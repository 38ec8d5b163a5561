"""Rows of a dataset are read from every format and encoding, and each bad row says what is wrong with it."""

import json
from pathlib import Path

import pytest

from longtake.data.metadata import ClipRecord, read_source, usable
from longtake.errors import DataError, Problem

CHINESE = "一只灰色的兔子在森林里醒来，阳光照在草地上。"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A dataset's folder with files that stand for clips: metadata never opens them."""
    folder = tmp_path / "set"
    (folder / "more").mkdir(parents=True)
    for name in ("a.mp4", "b.mp4", "more/c.mov", "still.png"):
        (folder / name).write_bytes(b"content")
    return folder


def good(source: Path, image_allowed: bool = False) -> list[ClipRecord]:
    records, problems = read_source(source, image_allowed)
    assert problems == []
    return records


def written(root: Path, name: str, content: str | bytes) -> Path:
    path = root / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_a_csv_gives_a_record_a_row(root: Path) -> None:
    text = 'video,prompt,start,frames,fps,artist\na.mp4,"A hill, ""green""",1.5,81,16,x\nmore/c.mov,A town,,,,\n'
    first, second = good(written(root, "clips.csv", text))
    assert first == ClipRecord(root / "a.mp4", 'A hill, "green"', 1.5, 81, 16.0, "clips.csv:row 2")
    assert second == ClipRecord(root / "more/c.mov", "A town", None, None, None, "clips.csv:row 3")


def test_a_caption_may_hold_line_breaks_and_rows_are_counted_as_a_spreadsheet_does(root: Path) -> None:
    text = 'Video, Caption\r\na.mp4,"one\r\ntwo\r\nthree"\r\n\r\nb.mp4,"x"\r\n'
    first, second = good(written(root, "clips.csv", text))
    assert first.prompt == "one\r\ntwo\r\nthree"
    assert second.where == "clips.csv:row 4"


def test_json_and_jsonl_give_the_same_records(root: Path) -> None:
    rows = [
        {"video": "a.mp4", "caption": "A", "start": 2, "tags": ["x"]},
        {"video": "b.mp4", "caption": "B", "fps": 24},
    ]
    listed = good(written(root, "clips.json", json.dumps(rows)))
    lines = good(written(root, "clips.jsonl", "\n".join(json.dumps(row) for row in rows) + "\n\n"))
    assert [(r.path, r.prompt, r.start, r.fps) for r in listed] == [(r.path, r.prompt, r.start, r.fps) for r in lines]
    assert [record.where for record in listed + lines] == [
        "clips.json:item 1",
        "clips.json:item 2",
        "clips.jsonl:line 1",
        "clips.jsonl:line 2",
    ]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "gbk", "gb18030"])
@pytest.mark.parametrize("name", ["clips.csv", "clips.jsonl"])
def test_the_encodings_in_use_are_read_right(root: Path, encoding: str, name: str) -> None:
    row = json.dumps({"video": "a.mp4", "prompt": CHINESE}, ensure_ascii=False)
    text = f"video,prompt\na.mp4,{CHINESE}\n" if name.endswith("csv") else row
    (record,) = good(written(root, name, text.encode(encoding)))
    assert record.prompt == CHINESE


@pytest.mark.parametrize(
    "content",
    [
        "video,prompt\na.mp4,Un café à l'été près de la forêt\n".encode("latin-1"),
        "video,prompt\na.mp4,兔子\n".encode("utf-16-le"),
        b"\xff\xfevideo,prompt\n12",
        b"video,prompt\na.mp4,\xff\xff\xff\n",
        "video,prompt\na.mp4,森林里的兔子".encode()[:-1],
    ],
)
def test_another_encoding_is_named_and_not_guessed(root: Path, content: bytes) -> None:
    with pytest.raises(DataError, match=r"clips\.csv: .*save it as UTF-8"):
        read_source(written(root, "clips.csv", content), False)


def test_a_folder_pairs_clips_and_captions(root: Path) -> None:
    for name, text in (("a.txt", "A hill\n"), ("b.txt", CHINESE), ("still.txt", "A still")):
        (root / name).write_text(text, encoding="gbk")
    assert [(r.path.name, r.prompt, r.where) for r in good(root, True)] == [
        ("a.mp4", "A hill", "set/a.mp4"),
        ("b.mp4", CHINESE, "set/b.mp4"),
        ("still.png", "A still", "set/still.png"),
    ]


def test_a_still_beside_its_clip_is_a_poster(root: Path) -> None:
    (root / "still.png").rename(root / "a.png")
    for name in ("a.txt", "b.txt"):
        (root / name).write_text("x")
    assert [record.path.name for record in good(root)] == ["a.mp4", "b.mp4"]


def test_stills_are_refused_where_the_model_needs_clips(root: Path) -> None:
    source = written(root, "clips.csv", "video,prompt\na.mp4,A\nstill.png,B\n")
    assert len(good(source, True)) == 2
    records, (problem,) = read_source(source, False)
    assert len(records) == 1
    assert str(problem).startswith("clips.csv:row 3: still.png is a still image; leave it out")


@pytest.mark.parametrize("in_a_table", [True, False])
def test_stills_alone_are_refused_in_one_line(root: Path, in_a_table: bool) -> None:
    source = root / "stills"
    source.mkdir()
    for name in ("one", "two"):
        (source / f"{name}.png").write_bytes(b"content")
        (source / f"{name}.txt").write_text("A still")
    if in_a_table:
        source = written(source, "clips.csv", "video,prompt\none.png,A\ntwo.png,B\n")
    assert len(good(source, True)) == 2
    with pytest.raises(DataError) as raised:
        read_source(source, False)
    assert str(raised.value).startswith(f"{source}: all 2 of its clips are still images; give clips: ")


def test_stills_beside_rows_that_are_wrong_otherwise_are_named_row_by_row(root: Path) -> None:
    source = written(root, "clips.csv", "video,prompt\nlost.mp4,A\nstill.png,B\n")
    records, problems = read_source(source, False)
    assert (records, len(problems)) == ([], 2)


def test_what_is_lacking_in_a_folder_is_said_of_each_file(root: Path) -> None:
    (root / "a.txt").write_text("A")
    (root / "lost.txt").write_text("nothing to describe")
    (root / "b.txt").write_text(" \n")
    records, problems = read_source(root, True)
    assert [record.path.name for record in records] == ["a.mp4"]
    assert [str(problem) for problem in problems] == [
        "set/b.mp4: the caption is empty; describe the clip, or leave it out [caption-empty]",
        "set/still.png: has no caption; write one into still.txt [clip-without-caption]",
        "set/lost.txt: a caption without a clip; add the clip or remove it [caption-without-clip]",
    ]


def test_links_may_stay_inside_and_not_lead_out(root: Path) -> None:
    (root.parent / "outside.mp4").write_bytes(b"content")
    (root / "within.mp4").symlink_to("more/c.mov")
    (root / "out.mp4").symlink_to("../outside.mp4")
    (root / "loop.mp4").symlink_to("loop.mp4")
    names = ["within.mp4", "more/../a.mp4", "out.mp4", "../outside.mp4", "loop.mp4"]
    source = written(root, "clips.csv", "video,prompt\n" + "".join(f"{name},x\n" for name in names))
    records, problems = read_source(source, False)
    assert [record.path for record in records] == [root / "more/c.mov", root / "a.mp4"]
    assert [problem.where for problem in problems] == [f"clips.csv:row {row}" for row in (4, 5, 6)]
    assert all("outside the dataset's folder" in problem.what for problem in problems[:2])


def test_links_may_lead_out_where_that_is_allowed(root: Path) -> None:
    (root.parent / "outside.mp4").write_bytes(b"content")
    (root / "out.mp4").symlink_to("../outside.mp4")
    (root / "loop.mp4").symlink_to("loop.mp4")
    names = ["out.mp4", "../outside.mp4", str(root.parent / "outside.mp4"), "loop.mp4", "/dev/null", "http://h/a.mp4"]
    source = written(root, "clips.csv", "video,prompt\n" + "".join(f"{name},x\n" for name in names))
    records, problems = read_source(source, False, allow_links=True)
    assert [record.path for record in records] == 3 * [root.parent / "outside.mp4"]
    assert [problem.where for problem in problems] == [f"clips.csv:row {row}" for row in (5, 6, 7)]


def test_the_dataset_itself_may_be_reached_through_a_link(root: Path, tmp_path: Path) -> None:
    written(root, "clips.csv", "video,prompt\na.mp4,A\n")
    (tmp_path / "link").symlink_to(root)
    assert good(tmp_path / "link" / "clips.csv")[0].path == root / "a.mp4"


def test_every_bad_row_is_told_at_once(root: Path) -> None:
    rows = ["a.mp4,A,,", "b.mp4,,-1,", "gone.mp4,C,,x", ",D,,", "b.mp4,E,3,4"]
    source = written(root, "clips.csv", "video,prompt,start,frames\n" + "\n".join(rows))
    records, problems = read_source(source, False)
    assert len(records) == 2
    assert [problem.where[-1] for problem in problems] == ["3", "3", "4", "4", "5"]


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_tenth_of_bad_rows_is_borne_and_no_more(bad: int) -> None:
    records = [ClipRecord(Path("a.mp4"), "A", None, None, None, f"row {row}") for row in range(10 - bad)]
    problems = [Problem(what, f"row {10 + row}") for row in range(bad) for what in ("one", "two")]
    if bad <= 1:
        assert usable(records, problems) == records
    else:
        with pytest.raises(DataError, match="2 of 10 clips cannot be used") as raised:
            usable(records, problems)
        assert raised.value.problems[:4] == tuple(problems)


def test_nothing_left_is_an_error_even_without_problems() -> None:
    with pytest.raises(DataError, match="0 of 0"):
        usable([], [])


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"prompt": "A"}, "video is missing"),
        ({"video": None, "prompt": "A"}, "video is missing"),
        ({"video": ["a.mp4"], "prompt": "A"}, "not a path"),
        ({"video": "", "prompt": "A"}, "video is missing"),
        ({"video": "a\0.mp4", "prompt": "A"}, "cannot be opened"),
        ({"video": "x" * 5000, "prompt": "A"}, "cannot be opened"),
        ({"video": "http://example.org/a.mp4", "prompt": "A"}, "is a URL"),
        ({"video": "file:///etc/passwd", "prompt": "A"}, "is a URL"),
        ({"video": "concat:a.mp4|b.mp4", "prompt": "A"}, "is a URL"),
        ({"video": "/etc/passwd", "prompt": "A"}, "outside the dataset's folder"),
        ({"video": "../set2/a.mp4", "prompt": "A"}, "outside the dataset's folder"),
        ({"video": "gone.mp4", "prompt": "A"}, "does not exist"),
        ({"video": "more\\c.mov", "prompt": "A"}, "write / between folders"),
        ({"video": "more", "prompt": "A"}, "is a folder"),
        ({"video": "a.mp4"}, "prompt is missing"),
        ({"video": "a.mp4", "caption": None}, "caption is missing"),
        ({"video": "a.mp4", "prompt": ["A", "B"]}, "not a text"),
        ({"video": "a.mp4", "prompt": 7}, "prompt is '7', not a text"),
        ({"video": "a.mp4", "prompt": "  \n"}, "caption is empty"),
        ({"video": "a.mp4", "prompt": "a\0b"}, "NUL"),
        ({"video": "a.mp4", "prompt": "\ud83d"}, "half of a UTF-16 pair"),
        ({"video": "a.mp4", "prompt": "A", "start": -0.5}, "start is '-0.5'"),
        ({"video": "a.mp4", "prompt": "A", "start": float("nan")}, "start is 'nan'"),
        ({"video": "a.mp4", "prompt": "A", "start": "soon"}, "start is 'soon'"),
        ({"video": "a.mp4", "prompt": "A", "start": True}, "start is 'True'"),
        ({"video": "a.mp4", "prompt": "A", "start": [1]}, "start is '[1]'"),
        ({"video": "a.mp4", "prompt": "A", "frames": 0}, "frames is '0'"),
        ({"video": "a.mp4", "prompt": "A", "frames": 80.5}, "frames is 80.5"),
        ({"video": "a.mp4", "prompt": "A", "fps": 0}, "fps is '0'"),
        ({"video": "a.mp4", "prompt": "A", "fps": float("inf")}, "fps is 'inf'"),
        ("a.mp4", "is 'a.mp4', not an object"),
        (None, "is 'None', not an object"),
    ],
)
def test_a_bad_row_gives_one_line(root: Path, row: object, what: str) -> None:
    source = written(root, "clips.json", json.dumps([row, {"video": "b.mp4", "prompt": "sound"}]))
    records, problems = read_source(source, False)
    assert [record.prompt for record in records] == ["sound"]
    (line,) = map(str, problems)
    assert line.startswith("clips.json:item 1: ")
    assert what in line
    assert ";" in line
    assert "\n" not in line
    assert len(line) < 500
