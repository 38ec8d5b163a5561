"""What the doctor warns of, and how captions are measured."""

from collections.abc import Callable
from pathlib import Path

import pytest

from longtake.config.load import load_config
from longtake.config.schema import ModelConfig, RunConfig
from longtake.doctor.captions import CaptionLengths
from longtake.doctor.clips import examine
from longtake.doctor.totals import totals_of
from longtake.doctor.warnings import warnings_of
from longtake.models.wan.variants import variant
from runs import Recorder, draw_clip

SPEC = variant("tiny-t2v").spec


def warned(config: RunConfig) -> dict[str, list[str]]:
    lengths = CaptionLengths(config.model, SPEC.text_tokens)
    examination = examine(config.data, SPEC, config.training.seed, Recorder())
    return {Path(where).stem: found for (_, where), found in warnings_of(examination, SPEC, lengths.excess).items()}


def test_each_oddity_is_warned_of(config: RunConfig) -> None:
    found = warned(config)
    assert found["wide"] == [
        "52% of the picture is cut away",
        "it has 8 fps: frames repeat at the model's 16",
        "the caption has 1000 tokens: what goes beyond 512 is cut",
    ]
    of_copies = ["50% of the picture is cut away", "it is enlarged 2.0 times"]
    assert found["copy"] == [*of_copies, "the same content as clips/1.mp4", "2 clips have this caption"]
    assert found["1"] == [*of_copies, "the same content as clips/copy.mp4", "2 clips have this caption"]
    assert found["0"] == of_copies


def test_a_clip_that_is_trained_on_and_validated_is_named(tmp_path: Path, config_file: Callable[..., Path]) -> None:
    for name in ("train", "held"):
        (tmp_path / name).mkdir()
        draw_clip(tmp_path / name / f"{name}.mp4", 0)
    (tmp_path / "held" / "held.mp4").write_bytes((tmp_path / "train" / "train.mp4").read_bytes())
    config = load_config(config_file(tmp_path / "train", validation=str(tmp_path / "held")), [])
    assert "it is both trained on and in the validation" in warned(config)["held"]


@pytest.mark.parametrize(
    ("caption", "characters", "tokens"), [("word " * 500, 2500, 625), ("一二三四" * 200, 800, 600)]
)
def test_without_a_tokenizer_long_captions_are_told_by_their_size(caption: str, characters: int, tokens: int) -> None:
    said = CaptionLengths(ModelConfig(name="wan2.1-t2v-1.3b"), 512).excess(caption)
    assert said == f"the caption has {characters} characters, about {tokens} tokens: what goes beyond 512 is cut"


@pytest.mark.parametrize(("length", "said"), [(511, False), (512, True)])
def test_with_a_tokenizer_the_end_of_the_text_counts(tiny_root: Callable[[str], Path], length: int, said: bool) -> None:
    lengths = CaptionLengths(ModelConfig(path=str(tiny_root("tiny-t2v"))), 512)
    assert bool(lengths.excess("a" * length)) == said


def test_totals_count_clips_by_bucket_and_reasons_by_kind(config: RunConfig) -> None:
    examination = examine(config.data, SPEC, config.training.seed, Recorder())
    totals = totals_of(examination, config.data, 4)
    assert (totals.clips, totals.left_out, totals.uncounted, totals.stills) == (17, 2, 1, 1)
    assert totals.train + totals.validation == 17
    assert totals.seconds == pytest.approx(12 * 1.5 + 1.5 + 1.5 + 3 + 1.5, abs=0.1)
    assert dict(totals.reasons) == {"has … frames at … fps": 1, "is not a video, but text": 1}
    assert {bucket.stage for bucket in totals.buckets} == {5, 17}
    for stage in (5, 17):
        assert sum(bucket.clips + bucket.held_out for bucket in totals.buckets if bucket.stage == stage) == 17
    assert {bucket.repeats for bucket in totals.buckets if bucket.clips >= 4} == {False}
    assert {bucket.repeats for bucket in totals.buckets if 0 < bucket.clips < 4} == {True}
    assert totals.same_content == (("clips/1.mp4", "clips/copy.mp4"),)
    assert totals.same_caption == (("clip 1", ("clips/1.mp4", "clips/copy.mp4")),)
