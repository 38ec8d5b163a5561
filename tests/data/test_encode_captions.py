"""The type in which captions are encoded: in the cache, in their keys, and read back."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from transformers import UMT5Config, UMT5EncoderModel

from longtake.data.cache import Cache
from longtake.data.encode import encoder_fingerprints, load_manifest
from longtake.data.loader import EntryReader
from longtake.models.wan.encoders import encode_prompt, load_text_encoder
from runs import CPU, scene


def test_captions_are_cached_in_the_type_they_are_computed_in_and_keyed_by_it(
    tiny_root: Callable[[str], Path], tmp_path: Path
) -> None:
    """A large text encoder with files in fp32 computes in bf16; what an earlier version made of them is another key."""
    small = scene("tiny-t2v", tiny_root("tiny-t2v"), tmp_path, 1)
    assert " in " not in encoder_fingerprints(small.root, small.spec)["text_encoder"]
    root = tmp_path / "large"
    shutil.copytree(small.root, root)
    config = UMT5Config(vocab_size=259, d_model=1024, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    UMT5EncoderModel(config).save_pretrained(root / "text_encoder")
    assert encoder_fingerprints(root, small.spec)["text_encoder"].endswith(" in bfloat16")
    large = replace(small, root=root)
    manifest = large.prepare(large.config(tmp_path / "run"))
    assert manifest is not None
    (entry,) = manifest.entries
    tensors = EntryReader(Cache(large.cache), manifest.empty_text).read(entry)
    assert tensors.prompt_embeds.dtype == tensors.empty_embeds.dtype == torch.bfloat16
    assert torch.equal(tensors.prompt_embeds, encode_prompt(load_text_encoder(root, CPU), entry.prompt))
    assert load_manifest(large.config(tmp_path / "run"), large.spec, root, print) == manifest
