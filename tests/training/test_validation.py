"""Validation: a loss that depends on the weights alone, and videos sampled on the way."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from longtake.data.cache import Cache
from longtake.data.loader import EntryReader
from longtake.data.video import probe
from longtake.errors import ConfigError
from longtake.sampling import sample, sample_encoded
from longtake.training.model import Expert, TrainedModel, build_model, find_model
from longtake.training.validation import SIGMAS, Validation
from runs import CPU, SIDE, Scene

Scenes = Callable[[str], Scene]


def build(scene: Scene, folder: Path, **sections: Any) -> tuple[Validation, TrainedModel]:
    """Validation on all clips of the scene, and the model."""
    config = scene.config(folder, **sections)
    manifest = scene.prepare(config)
    assert manifest is not None
    reader = EntryReader(Cache(scene.cache), manifest.empty_text)
    entries = [entry for entry in manifest.entries if 5 in entry.stages]
    model = build_model(config, find_model(config, print), CPU)
    for name, parameter in model.parameters.items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return Validation(config, entries, reader, scene.root, CPU), model


@pytest.mark.parametrize("name", ["tiny-i2v", "tiny-ti2v"])
def test_the_loss_is_the_same_at_every_call_whatever_was_drawn_before(
    scenes: Scenes, tmp_path: Path, name: str
) -> None:
    dropouts = {"lora": {"dropout": 0.5}, "data": {"caption_dropout": 1.0}}
    validation, model = build(scenes(name), tmp_path, **dropouts)
    first = validation.loss([model])
    torch.manual_seed(123)
    assert validation.loss([model]) == first
    other, _ = build(scenes(name), tmp_path)
    assert other.loss([model]) == first, "nothing is dropped in validation"
    assert model.transformer.training, "the model goes on training"


def test_the_loss_follows_the_weights(scenes: Scenes, tmp_path: Path) -> None:
    validation, model = build(scenes("tiny-i2v"), tmp_path)
    before = validation.loss([model])
    with torch.no_grad():
        for parameter in model.parameters.values():
            parameter.mul_(1.5)
    assert validation.loss([model]) != before


def test_it_is_the_mean_over_clips(scenes: Scenes, tmp_path: Path) -> None:
    validation, model = build(scenes("tiny-i2v"), tmp_path)
    assert len(validation.entries) == 4
    apart = [replace(validation, entries=[entry]).loss([model]) for entry in validation.entries]
    assert validation.loss([model]) == pytest.approx(sum(apart) / 4, rel=1e-6)
    assert len(set(apart)) == 4


def test_sigmas_are_spread_over_the_experts_share(scenes: Scenes, tmp_path: Path) -> None:
    validation, model = build(scenes("tiny-i2v"), tmp_path)
    timesteps: list[float] = []
    hook = model.transformer.register_forward_pre_hook(
        lambda _m, _a, keywords: timesteps.extend(keywords["timestep"].tolist()), with_kwargs=True
    )
    one = replace(validation, entries=validation.entries[:1])
    for sigma_range in ((0.0, 1.0), (0.9, 1.0), (0.0, 0.9)):
        timesteps.clear()
        one.loss([replace(model, expert=Expert("transformer", sigma_range))])
        assert len(timesteps) == SIGMAS
        assert timesteps == sorted(timesteps)
        assert sigma_range[0] * 1000 < timesteps[0] < timesteps[-1] < sigma_range[1] * 1000
    hook.remove()


def test_samples_are_written_with_what_made_them(scenes: Scenes, tmp_path: Path) -> None:
    image = tmp_path / "first.png"
    Image.new("RGB", (80, 60), (200, 40, 40)).save(image)
    samples = [{"prompt": "a red wall", "image": str(image)}]
    sections = {"validation": {"samples": samples, "sample_steps": 2, "guidance_scale": 1.0}}
    validation, model = build(scenes("tiny-i2v"), tmp_path, **sections)
    (path,) = validation.sample([model], 100, tmp_path / "samples")
    assert path == tmp_path / "samples" / "step-00000100-0.mp4"
    info = probe(path, "sample")
    assert (info.width, info.height) == (SIDE, SIDE)
    assert info.duration == pytest.approx(5 / 16)
    assert json.loads(path.with_suffix(".json").read_text()) == {"step": 100, "prompt": "a red wall", "seed": 0}
    assert model.transformer.training


@pytest.mark.parametrize("name", ["tiny-t2v", "tiny-i2v", "tiny-ti2v"])
def test_what_is_encoded_once_samples_at_every_validation_without_an_encoder(
    scenes: Scenes, tmp_path: Path, name: str
) -> None:
    """Frames are compared, since x264 writes them in other bytes each time."""
    image = tmp_path / "first.png"
    Image.new("RGB", (80, 60), (200, 40, 40)).save(image)
    samples = [{"prompt": "a red wall"}, {"prompt": "a wall"}]
    if name != "tiny-t2v":
        samples = [{**each, "image": str(image)} for each in samples]
    validation, model = build(scenes(name), tmp_path, validation={"samples": samples, "sample_steps": 2})
    late = replace(validation)
    late.sample([model], 0, tmp_path / "late")  # which encodes what nobody has prepared
    validation.prepare(model.spec)
    transformers, root = {model.expert.component: model.transformer}, validation.root
    shutil.copytree(root / "vae", tmp_path / "vae")
    validation.root = tmp_path  # the VAE alone is there
    validation.prepare(model.spec)
    assert len(validation.sample([model], 0, tmp_path / "samples")) == 2
    assert len(validation.sample([model], 100, tmp_path / "samples")) == 2
    for request, *both in zip(validation.requests(model), late.encoded, validation.encoded, strict=True):
        expected = sample(root, model.spec, transformers, request, CPU)
        for encoded in both:
            assert torch.equal(sample_encoded(tmp_path, model.spec, transformers, encoded, CPU), expected)


def test_without_samples_no_encoder_is_looked_for(scenes: Scenes, tmp_path: Path) -> None:
    validation, model = build(scenes("tiny-i2v"), tmp_path)
    validation.root = tmp_path / "nowhere"
    validation.prepare(model.spec)
    assert validation.sample([model], 0, tmp_path) == []


@pytest.mark.parametrize(
    ("name", "wanted", "what"),
    [
        ("tiny-i2v", {"prompt": "a"}, "makes a video from an image"),
        ("tiny-t2v", {"prompt": "a", "image": "x.png"}, "x.png"),
    ],
)
def test_samples_that_cannot_be_made_are_refused_before_training(
    scenes: Scenes, tmp_path: Path, name: str, wanted: dict[str, str], what: str
) -> None:
    validation, model = build(scenes(name), tmp_path, validation={"samples": [wanted]})
    with pytest.raises(Exception, match=what) as raised:
        validation.prepare(model.spec)
    assert raised.value.exit_status == 2


def test_an_image_that_the_model_would_ignore_is_refused(scenes: Scenes, tmp_path: Path) -> None:
    image = tmp_path / "first.png"
    Image.new("RGB", (80, 60)).save(image)
    samples = {"samples": [{"prompt": "a", "image": str(image)}]}
    validation, model = build(scenes("tiny-t2v"), tmp_path, validation=samples)
    with pytest.raises(ConfigError, match="would ignore the image"):
        validation.requests(model)
