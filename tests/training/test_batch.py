"""Micro-batches: what a sample brings into one, and that cutting a global batch up changes nothing."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from longtake.data.cache import Cache
from longtake.data.loader import BucketSampler, EntryReader
from longtake.training.batch import collate, summed_loss
from longtake.training.model import TrainedModel, build_model, find_model
from longtake.training.samples import Sample, read_sample
from runs import CPU, Scene

MODELS = ("tiny-t2v", "tiny-i2v", "tiny-ti2v")


def read(scene: Scene, folder: Path, dropout: float = 0.0) -> tuple[list[Sample], TrainedModel]:
    """The first global batch of four samples, and the model with a LoRA that is not the identity."""
    config = scene.config(folder, training={"global_batch_size": 4, "loss_weighting": "bell"})
    manifest = scene.prepare(config)
    assert manifest is not None
    reader = EntryReader(Cache(scene.cache), manifest.empty_text)
    visits = BucketSampler(manifest.entries, [(0, 5)], 0, 4).batch(0)
    model = build_model(config, find_model(config, print), CPU)
    for name, parameter in model.parameters.items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return [read_sample(visit, reader, config.training, dropout, (0.0, 1.0)) for visit in visits], model


@pytest.mark.parametrize("name", MODELS)
def test_micro_batches_of_any_size_give_the_loss_and_gradients_of_the_global_batch(
    scenes: Callable[[str], Scene], tmp_path: Path, name: str
) -> None:
    scene = scenes(name)
    training = scene.config(tmp_path, training={"loss_weighting": "bell"}).training
    samples, model = read(scene, tmp_path)
    losses, gradients = [], []
    for size in (4, 2, 1):
        model.transformer.zero_grad()
        total = torch.zeros(())
        for first in range(0, 4, size):
            batch = collate(samples[first : first + size], model.spec, training, CPU)
            loss = summed_loss(model.transformer, model.spec, batch) / 4
            loss.backward()
            total += loss.detach()
        losses.append(total)
        gradients.append({key: parameter.grad.clone() for key, parameter in model.parameters.items()})
    for loss, gradient in zip(losses[1:], gradients[1:], strict=True):
        torch.testing.assert_close(loss, losses[0], rtol=0, atol=1e-6)
        for key, value in gradient.items():
            torch.testing.assert_close(value, gradients[0][key], rtol=0, atol=1e-6)
    assert losses[0] > 0.1
    assert max(float(value.abs().max()) for value in gradients[0].values()) > 1e-4


def test_a_dropped_caption_is_the_empty_one_padded_with_zeros(scenes: Callable[[str], Scene], tmp_path: Path) -> None:
    scene = scenes("tiny-t2v")
    training = scene.config(tmp_path).training
    for dropout in (0.0, 1.0):
        samples, model = read(scene, tmp_path, dropout)
        embeds = collate(samples, model.spec, training, CPU).conditioning.prompt_embeds
        assert embeds.shape == (4, 512, 64)
        for sample, row in zip(samples, embeds, strict=True):
            wanted = sample.tensors.empty_embeds if dropout else sample.tensors.prompt_embeds
            assert torch.equal(row[: len(wanted)], wanted)
            assert not row[len(wanted) :].any()
    empty, caption = samples[0].tensors.empty_embeds, samples[0].tensors.prompt_embeds
    assert len(empty) == 1 < len(caption)


def test_each_task_brings_its_own_conditioning(scenes: Callable[[str], Scene], tmp_path: Path) -> None:
    found = {}
    for name in MODELS:
        samples, model = read(scenes(name), tmp_path / name)
        batch = collate(samples, model.spec, scenes(name).config(tmp_path).training, CPU)
        given = batch.conditioning
        parts = {"condition": given.condition, "image_embeds": given.image_embeds, "first_latents": given.first_latents}
        found[name] = {key: tuple(part.shape) for key, part in parts.items() if part is not None}
        assert batch.sigma.dtype == batch.latents.dtype == torch.float32
        assert batch.size == 4
        if given.first_latents is not None:
            assert torch.equal(given.first_latents, batch.latents[:, :, :1])
    assert found == {
        "tiny-t2v": {},
        "tiny-i2v": {"condition": (4, 20, 2, 4, 4), "image_embeds": (4, 17, 64)},
        "tiny-ti2v": {"first_latents": (4, 48, 1, 2, 2)},
    }


def test_ti2v_learns_nothing_from_the_frame_that_it_is_given(scenes: Callable[[str], Scene], tmp_path: Path) -> None:
    scene = scenes("tiny-ti2v")
    samples, model = read(scene, tmp_path)
    batch = collate(samples, model.spec, scene.config(tmp_path).training, CPU)
    before = summed_loss(model.transformer, model.spec, batch)
    batch.noise[:, :, 0] += 100
    assert torch.equal(summed_loss(model.transformer, model.spec, batch), before)
