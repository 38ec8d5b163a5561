"""Conditioning: what the transformer is given equals what diffusers' own pipelines give it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from PIL import Image

from longtake.errors import ModelError
from longtake.models.wan import encoders
from longtake.models.wan.conditioning import (
    Conditioning,
    dit_inputs,
    image_condition,
    image_mask,
    loss_mask,
    pad_prompt,
)
from longtake.models.wan.variants import variant

NAMES = ("tiny-t2v", "tiny-i2v", "tiny-flf2v", "tiny-ti2v")
FRAMES, HEIGHT, WIDTH = 9, 32, 64


@pytest.fixture(scope="module")
def roots(tiny_root: Callable[[str], Path]) -> dict[str, Path]:
    return {name: tiny_root(name) for name in NAMES}


@pytest.fixture(scope="module")
def vae(roots: dict[str, Path]) -> AutoencoderKLWan:
    return encoders.load_vae(roots["tiny-i2v"], "cpu")


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _pixels(seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (3, HEIGHT, WIDTH), dtype=torch.uint8, generator=_generator(seed))


def _as_pil(pixels: torch.Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def _latent_shape(name: str) -> tuple[int, int, int, int]:
    return variant(name).spec.latent_shape(FRAMES, HEIGHT, WIDTH)


def _conditioning(name: str, root: Path, prompt: str = "a rabbit") -> Conditioning:
    """Conditioning of the images 0 and 1 as the data stage makes it, for one sample."""
    spec = variant(name).spec
    prompt_embeds = pad_prompt(encoders.encode_prompt(encoders.load_text_encoder(root, "cpu"), prompt), 512)[None]
    if name == "tiny-t2v":
        return Conditioning(prompt_embeds)
    vae = encoders.load_vae(root, "cpu")
    if name == "tiny-ti2v":
        first = encoders.encode_video(vae, encoders.normalise_pixels(_pixels(0))[None, :, None])
        return Conditioning(prompt_embeds, first_latents=first)
    images = [_pixels(0), _pixels(1)] if spec.task == "flf2v" else [_pixels(0)]
    clip = encoders.load_image_encoder(root, "cpu")
    image_embeds = torch.cat([encoders.encode_image(clip, image) for image in images])[None]
    condition = image_condition(vae, images[0], images[1] if len(images) > 1 else None, FRAMES)[None]
    return Conditioning(prompt_embeds, image_embeds, condition)


def _pipelines_inputs(name: str, root: Path, noise: torch.Tensor, with_image: bool) -> dict[str, Any]:
    """Keyword arguments of the first call that diffusers' pipeline makes of its transformer."""
    pipeline = (WanImageToVideoPipeline if with_image else WanPipeline).from_pretrained(str(root))
    pipeline.set_progress_bar_config(disable=True)
    calls: list[dict[str, Any]] = []
    pipeline.transformer.register_forward_pre_hook(
        lambda module, arguments, keywords: calls.append(keywords), with_kwargs=True
    )
    images = {"image": _as_pil(_pixels(0)), "last_image": _as_pil(_pixels(1))} if with_image else {}
    if name != "tiny-flf2v":
        images.pop("last_image", None)
    # the image pipeline's own method fails where ftfy is not installed
    with torch.no_grad():
        embeds = WanPipeline._get_t5_prompt_embeds(pipeline, "a rabbit", max_sequence_length=512)
    shape = {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES}
    steps = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent"}
    pipeline(prompt_embeds=embeds, latents=noise, **images, **shape, **steps)
    return calls[0]


@pytest.mark.parametrize("name", NAMES)
def test_the_transformer_is_given_what_diffusers_gives_it(name: str, roots: dict[str, Path]) -> None:
    noise = torch.randn(1, *_latent_shape(name), generator=_generator())
    expected = _pipelines_inputs(name, roots[name], noise, with_image=name != "tiny-t2v")
    sigma = expected["timestep"].float().max().reshape(1) / 1000
    inputs = dit_inputs(variant(name).spec, noise, sigma, _conditioning(name, roots[name]))
    assert torch.equal(inputs["hidden_states"], expected["hidden_states"])
    assert torch.equal(inputs["encoder_hidden_states"], expected["encoder_hidden_states"])
    torch.testing.assert_close(inputs["timestep"], expected["timestep"].float(), rtol=1e-6, atol=0)
    image_embeds = expected["encoder_hidden_states_image"] if name in ("tiny-i2v", "tiny-flf2v") else None
    if image_embeds is None:
        assert "encoder_hidden_states_image" not in inputs
    else:
        assert torch.equal(inputs["encoder_hidden_states_image"], image_embeds)


@pytest.mark.parametrize("last", [False, True])
def test_mask_and_condition_are_those_of_prepare_latents(last: bool, roots: dict[str, Path], vae: Any) -> None:
    pipeline = WanImageToVideoPipeline.from_pretrained(str(roots["tiny-i2v"]))
    first_image, last_image = (encoders.normalise_pixels(_pixels(seed))[None] for seed in (0, 1))
    noise = torch.zeros(1, *_latent_shape("tiny-i2v"))
    with torch.no_grad():
        _, expected = pipeline.prepare_latents(
            first_image,
            1,
            16,
            HEIGHT,
            WIDTH,
            FRAMES,
            torch.float32,
            torch.device("cpu"),
            latents=noise,
            last_image=last_image if last else None,
        )
    condition = image_condition(vae, _pixels(0), _pixels(1) if last else None, FRAMES)
    assert torch.equal(condition, expected[0])
    assert torch.equal(image_mask(FRAMES, _latent_shape("tiny-i2v"), last), expected[0, :4])


def test_the_mask_marks_the_given_frames_only() -> None:
    first = image_mask(9, (16, 3, 1, 1), last=False)[:, :, 0, 0]
    both = image_mask(9, (16, 3, 1, 1), last=True)[:, :, 0, 0]
    assert first.T.flatten().tolist() == [1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0]
    assert both.T.flatten().tolist() == [1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 1]


def test_bytes_and_floats_give_the_same_condition(vae: Any) -> None:
    from_bytes = image_condition(vae, _pixels(0), _pixels(1), FRAMES)
    from_floats = image_condition(vae, *(encoders.normalise_pixels(_pixels(seed)) for seed in (0, 1)), FRAMES)
    assert torch.equal(from_bytes, from_floats)


def test_the_condition_of_a_clips_first_frame_starts_as_the_clips_own_latents(vae: Any) -> None:
    clip = torch.stack([_pixels(seed) for seed in range(FRAMES)], dim=1)
    latents = encoders.encode_video(vae, encoders.normalise_pixels(clip)[None])[0]
    cropped_alike = image_condition(vae, clip[:, 0], None, FRAMES)
    cropped_elsewhere = image_condition(vae, clip[:, 0].roll(8, dims=-1), None, FRAMES)
    assert torch.equal(cropped_alike[4:, 0], latents[:, 0])
    assert not torch.allclose(cropped_elsewhere[4:, 0], latents[:, 0], atol=1e-3)


def test_flf2v_samples_of_a_batch_keep_their_own_images(roots: dict[str, Path]) -> None:
    spec = variant("tiny-flf2v").spec
    transformer = WanTransformer3DModel.from_pretrained(str(roots["tiny-flf2v"] / "transformer"))
    torch.nn.init.normal_(transformer.condition_embedder.image_embedder.pos_embed, generator=_generator(9))
    noise = torch.randn(2, *_latent_shape("tiny-flf2v"), generator=_generator())
    rows = {
        "prompt_embeds": torch.randn(2, 512, 64, generator=_generator(1)),
        "image_embeds": torch.randn(2, 34, 64, generator=_generator(2)),
        "condition": torch.randn(2, 20, *noise.shape[2:], generator=_generator(3)),
    }
    sigma = torch.tensor([0.9, 0.3])

    def velocity(samples: slice) -> torch.Tensor:
        conditioning = Conditioning(**{key: value[samples] for key, value in rows.items()})
        with torch.no_grad():
            return transformer(**dit_inputs(spec, noise[samples], sigma[samples], conditioning)).sample

    alone = torch.cat([velocity(slice(0, 1)), velocity(slice(1, 2))])
    # matrix products over another number of rows add up in another order
    torch.testing.assert_close(velocity(slice(0, 2)), alone, rtol=1e-4, atol=1e-5)


def test_ti2v_has_a_clean_first_frame_at_timestep_0_that_the_loss_leaves_out(roots: dict[str, Path]) -> None:
    spec = variant("tiny-ti2v").spec
    conditioning = _conditioning("tiny-ti2v", roots["tiny-ti2v"])
    assert conditioning.first_latents is not None
    noise = torch.randn(1, *_latent_shape("tiny-ti2v"), generator=_generator())
    inputs = dit_inputs(spec, noise, torch.tensor([0.25]), conditioning)
    a_frame = noise.shape[3] * noise.shape[4] // 4
    assert torch.equal(inputs["hidden_states"][:, :, :1], conditioning.first_latents)
    assert torch.equal(inputs["hidden_states"][:, :, 1:], noise[:, :, 1:])
    assert inputs["timestep"].shape == (1, spec.tokens(FRAMES, HEIGHT, WIDTH))
    assert inputs["timestep"].unique_consecutive().tolist() == [0, 250]
    assert inputs["timestep"][0, :a_frame].eq(0).all()
    mask = loss_mask(spec, conditioning, noise)
    assert mask is not None
    assert mask.flatten().tolist() == [0, 1, 1]


def test_ti2v_without_an_image_is_plain_text_to_video(roots: dict[str, Path]) -> None:
    spec = variant("tiny-ti2v").spec
    conditioning = Conditioning(torch.zeros(2, 512, 64))
    noise = torch.randn(2, *_latent_shape("tiny-ti2v"), generator=_generator())
    inputs = dit_inputs(spec, noise, torch.tensor([0.25, 0.5]), conditioning)
    assert inputs["timestep"].tolist() == [250, 500]
    assert torch.equal(inputs["hidden_states"], noise)
    assert loss_mask(spec, conditioning, noise) is None


def test_ti2v_timesteps_per_token_equal_diffusers_without_an_image_too(roots: dict[str, Path]) -> None:
    noise = torch.randn(1, *_latent_shape("tiny-ti2v"), generator=_generator())
    theirs = _pipelines_inputs("tiny-ti2v", roots["tiny-ti2v"], noise, with_image=False)
    sigma = theirs["timestep"].float().max().reshape(1) / 1000
    conditioning = Conditioning(theirs["encoder_hidden_states"])
    ours = dit_inputs(variant("tiny-ti2v").spec, noise, sigma, conditioning)
    transformer = WanTransformer3DModel.from_pretrained(str(roots["tiny-ti2v"] / "transformer"))
    with torch.no_grad():
        expected = transformer(**theirs)[0]
        # one row of the time embedding against one a token: matrix products of other shapes
        torch.testing.assert_close(transformer(**ours).sample, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_thousand_noise_levels_are_a_thousand_timesteps(dtype: torch.dtype) -> None:
    sigma = torch.arange(1, 1001) / 1000
    noise = torch.zeros(1000, 16, 1, 2, 2, dtype=dtype)
    inputs = dit_inputs(variant("tiny-t2v").spec, noise, sigma, Conditioning(torch.zeros(1000, 512, 1)))
    assert inputs["timestep"].dtype == torch.float32
    assert len(inputs["timestep"].unique()) == 1000
    assert inputs["hidden_states"].dtype == inputs["encoder_hidden_states"].dtype == dtype


def test_padding_adds_rows_of_zeros() -> None:
    embeds = torch.ones(3, 4)
    padded = pad_prompt(embeds, 512)
    assert padded.shape == (512, 4)
    assert torch.equal(padded[:3], embeds)
    assert not padded[3:].any()


def test_an_i2v_model_without_its_image_is_refused() -> None:
    noise = torch.zeros(1, *_latent_shape("tiny-i2v"))
    with pytest.raises(ModelError) as caught:
        dit_inputs(variant("tiny-i2v").spec, noise, torch.ones(1), Conditioning(torch.zeros(1, 512, 64)))
    assert [problem.what for problem in caught.value.problems] == [
        "tiny-i2v needs image latents and got none",
        "tiny-i2v needs CLIP image embeddings and got none",
    ]


def test_conditioning_that_a_model_would_ignore_is_refused() -> None:
    noise = torch.zeros(1, *_latent_shape("tiny-t2v"))
    images = {"image_embeds": torch.zeros(1, 17, 64), "condition": torch.zeros(1, 20, 3, 4, 8)}
    everything = Conditioning(torch.zeros(1, 512, 64), first_latents=noise[:, :, :1], **images)
    with pytest.raises(ModelError) as caught:
        dit_inputs(variant("tiny-t2v").spec, noise, torch.ones(1), everything)
    assert len(caught.value.problems) == 3
