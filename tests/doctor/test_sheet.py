"""The contact sheet: pictures as training sees them, and a page that nothing in a dataset can break."""

import base64
import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

import clips
from doctor.conftest import HOSTILE_CAPTION, HOSTILE_NAME
from longtake.config.load import load_config
from longtake.config.schema import RunConfig
from longtake.data.buckets import Bucket
from longtake.data.dataset import Placed, place, read_sources
from longtake.data.video import read_clip, read_image
from longtake.doctor.command import diagnose
from longtake.doctor.pictures import SIDE, frames_of, pictures_of
from longtake.doctor.sheet import evenly, write_sheet
from longtake.errors import RunError
from longtake.models.wan.variants import variant
from longtake.planner.words import plain
from pages import Page
from runs import Recorder, Scene, scene, with_a_clip_that_breaks_off


def placed(config: RunConfig) -> list[Placed]:
    spec = variant("tiny-t2v").spec
    return place(read_sources(config.data, spec, print), config.data, spec, config.training.seed, print)


def sheet(config: RunConfig, path: Path, most: int = 200) -> Page:
    write_sheet(diagnose(config, Recorder()), path, most, Recorder())
    return Page(path.read_text(encoding="utf-8"))


def test_the_frames_are_those_that_prepare_reads(config: RunConfig) -> None:
    for item in placed(config):
        clip, found = item.clip, frames_of(item)
        size = (clip.bucket.width, clip.bucket.height)
        if clip.info.is_image:
            assert found[0].equal(read_image(clip.record.path, size))
            continue
        whole = read_clip(clip.record.path, clip.window, size)
        assert [*found] == [0, clip.bucket.frames // 2, clip.bucket.frames - 1]
        assert all(frame.equal(whole[index]) for index, frame in found.items())


def test_frames_far_into_a_long_clip_are_sought_and_the_same(tmp_path: Path, config_file: Callable[..., Path]) -> None:
    (tmp_path / "clips").mkdir()
    clips.write(tmp_path / "clips" / "long.mp4", clips.levels(240), fps=24)
    (tmp_path / "clips" / "long.txt").write_text("long")
    changes = {"num_frames": 81, "frames_schedule": [], "size": [32, 32], "validation": 0}
    (item,) = placed(load_config(config_file(tmp_path / "clips", **changes), []))
    whole = read_clip(item.clip.record.path, item.clip.window, (32, 32))
    assert all(frame.equal(whole[index]) for index, frame in frames_of(item).items())
    assert not whole[0].equal(whole[40])


def test_pictures_are_small_and_upright_clips_stay_upright(config: RunConfig) -> None:
    turned = next(each for each in placed(config) if each.clip.record.path.stem == "turned")
    clip = turned.clip
    large = Placed(type(clip)(clip.record, clip.info, Bucket(5, 512, 256), clip.window), (5,), "train")
    first = pictures_of(large)[0]
    image = Image.open(io.BytesIO(base64.b64decode(first.uri.removeprefix("data:image/jpeg;base64,"))))
    assert image.size == (first.width, first.height) == (SIDE // 2, SIDE)
    corners = [image.getpixel((x, y)) for y in (20, SIDE - 20) for x in (20, first.width - 20)]
    strongest = [max(range(3), key=pixel.__getitem__) for pixel in corners if max(pixel) - min(pixel) > 60]  # type: ignore[arg-type,union-attr]  # RGB
    assert strongest == [1, 0, 2], "green, white above red, blue: a quarter turn counter-clockwise"


def test_every_clip_is_on_the_page_with_its_bucket_and_pictures_that_are_in_it(
    config: RunConfig, tmp_path: Path
) -> None:
    page = sheet(config, tmp_path / "sheet.html")
    assert len(page.all("article")) == 17
    assert len(page.all("img")) == 16 * 3 + 1
    for image in page.all("img"):
        assert (image["src"] or "").startswith("data:image/jpeg;base64,")
        assert 0 < int(image["width"] or 0) <= SIDE
    for words in ("5, 17 frames of 32x64", "5, 17 frames of 64x32", "the same content as clips/1.mp4", "turned 90°"):
        assert words in page.text
    assert "give a clip of 5 or more" in page.text
    assert "all 17 clips" in page.text


def test_nothing_in_a_dataset_gets_out_of_its_text(config: RunConfig, tmp_path: Path) -> None:
    page = sheet(config, tmp_path / "sheet.html")
    text = (tmp_path / "sheet.html").read_text(encoding="utf-8")
    assert plain(HOSTILE_CAPTION) in page.text
    assert plain(HOSTILE_NAME) in page.text
    assert "🎈" in page.text
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)
    assert page.all("script") == []
    assert not [attributes for _, attributes in page.tags if any(name.startswith("on") for name in attributes)]
    (policy,) = [each["content"] or "" for each in page.all("meta") if each.get("http-equiv")]
    assert "default-src 'none'" in policy
    assert not re.search(r"(?:src|href)=\"(?!data:)", text)
    assert "prefers-color-scheme: dark" in text


def test_a_few_clips_are_chosen_evenly_and_the_page_says_so(config: RunConfig, tmp_path: Path) -> None:
    page = sheet(config, tmp_path / "sheet.html", most=3)
    assert len(page.all("article")) == 3
    assert "3 of 17 clips, evenly chosen" in page.text


@pytest.mark.parametrize(
    ("count", "most", "chosen"), [(5, 9, [0, 1, 2, 3, 4]), (10, 4, [0, 3, 6, 9]), (7, 1, [0]), (0, 3, [])]
)
def test_what_is_chosen_begins_at_the_first_and_ends_at_the_last(count: int, most: int, chosen: list[int]) -> None:
    assert evenly(range(count), most) == chosen


@pytest.fixture
def broken(tmp_path: Path, tiny_root: Callable[[str], Path]) -> Scene:
    return with_a_clip_that_breaks_off(scene("tiny-t2v", tiny_root("tiny-t2v"), tmp_path, count=12))


def test_a_clip_that_breaks_off_has_no_picture_and_a_warning(broken: Scene, tmp_path: Path) -> None:
    config = broken.config(tmp_path / "run", data={"num_frames": 129})
    seen = write_sheet(diagnose(config, Recorder()), tmp_path / "sheet.html", 200, Recorder())
    warned = [
        line for lines in seen.warnings.values() for line in lines if line.startswith("prepare will leave it out")
    ]
    assert warned
    page = Page((tmp_path / "sheet.html").read_text(encoding="utf-8"))
    assert warned[0] in page.text
    assert "no picture" in page.text


def test_a_page_that_cannot_be_written_is_an_error_and_nothing_is_left_beside_it(
    config: RunConfig, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(RunError):
        sheet(config, tmp_path / "file" / "sheet.html", most=1)
    sheet(config, tmp_path / "sheet.html", most=1)
    assert [path for path in tmp_path.iterdir() if "staged" in path.name] == []
