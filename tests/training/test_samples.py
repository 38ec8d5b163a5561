"""What a rank trains on in a step: small enough for processes that read ahead, and said where it does not come."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from longtake.config.schema import TrainingConfig
from longtake.data.cache import Cache, Entry
from longtake.data.loader import BucketSampler, EntryReader
from longtake.training.samples import SampleReader


@pytest.fixture
def samples(tmp_path: Path) -> SampleReader:
    """Five clips in the cache, global batches of four."""
    cache = Cache(tmp_path)
    for text in ("empty", "t"):
        cache.write("texts", text, {"prompt_embeds": torch.randn(3, 4)})
    clips = [Entry(f"l{n}", "", "t", (5, 32, 32), (5,), f"c{n}", "", f"clips/{n}.mp4", "train") for n in range(5)]
    for entry in clips:
        cache.write("latents", entry.latents, {"latents": torch.randn(16, 2, 4, 4)})
    reader = EntryReader(cache, "empty")
    training = TrainingConfig()
    return SampleReader(BucketSampler(clips, [(0, 5)], 0, 4), (0, 1), reader, training, 0.5, ((0.0, 1.0),))


def test_a_copy_in_another_process_reads_the_same_to_the_bit(samples: SampleReader) -> None:
    copy = pickle.loads(pickle.dumps(samples))
    for step in range(6):
        for one, other in zip(samples(step), copy(step), strict=True):
            assert one.visit == other.visit
            assert torch.equal(one.tensors.latents, other.tensors.latents)
            assert torch.equal(one.draw.noise, other.draw.noise)
            assert (one.draw.sigma, one.draw.drop_caption) == (other.draw.sigma, other.draw.drop_caption)


def test_what_is_read_is_named_by_its_file_and_clips(samples: SampleReader) -> None:
    clips = [visit.entry.where for visit in samples.sampler.batch(0)]
    named = f"(of {', '.join(clips[:3])} and 1 more)"
    assert samples.described(0) == f"{samples.reader.cache.folder} {named}"
    samples.reader.reading = "the/file"
    assert samples.described(0) == f"the/file {named}"


def test_a_process_that_reads_imports_no_model() -> None:
    code = "import sys, longtake.training.samples; print(*{'diffusers', 'transformers', 'peft', 'av'} & {*sys.modules})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""
