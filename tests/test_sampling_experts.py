"""Sampling from a model of two transformers: the video of diffusers' pipeline, each denoising its side of sigma."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from PIL import Image

from longtake.models.wan.variants import variant
from longtake.sampling import SampleRequest, sample
from seen import Call, transformer_calls

BOUNDARIES = {"tiny-t2v-a14b": 0.875, "tiny-i2v-a14b": 0.9}
SIZE, STEPS, SHIFT = (48, 32), 6, 5.0


def request(name: str) -> SampleRequest:
    """Of a picture of noise, where the model takes one."""
    image = torch.randint(0, 256, (3, *SIZE[::-1]), dtype=torch.uint8) if variant(name).spec.task == "i2v" else None
    return SampleRequest("a rabbit", image, None, SIZE, 9, STEPS, 4.0, 3, SHIFT, "fog")


def ours(root: Path, name: str, asked: SampleRequest) -> tuple[torch.Tensor, dict[str, list[Call]]]:
    """The video, and the forward passes of each transformer."""
    transformers = {
        component: WanTransformer3DModel.from_pretrained(root / component) for component in variant(name).spec.experts
    }
    with transformer_calls() as calls:
        video = sample(root, variant(name).spec, transformers, asked, "cpu")
    return video, {key: [call for call in calls if call.transformer is each] for key, each in transformers.items()}


def theirs(root: Path, asked: SampleRequest) -> torch.Tensor:
    """What the pipeline of the folder's own index makes, with its own encoders."""
    pipeline: Any = (WanPipeline if asked.image is None else WanImageToVideoPipeline).from_pretrained(root)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT
    )
    texts = (asked.prompt, asked.negative_prompt)
    with torch.no_grad():  # the image pipeline's own method fails where ftfy is not installed
        embeds = [WanPipeline._get_t5_prompt_embeds(pipeline, text, max_sequence_length=512) for text in texts]
    given = {} if asked.image is None else {"image": Image.fromarray(asked.image.permute(1, 2, 0).numpy())}
    output = pipeline(
        prompt_embeds=embeds[0],
        negative_prompt_embeds=embeds[1],
        width=SIZE[0],
        height=SIZE[1],
        num_frames=asked.num_frames,
        num_inference_steps=STEPS,
        guidance_scale=asked.guidance_scale,
        generator=torch.Generator().manual_seed(asked.seed),
        output_type="pt",
        **given,
    )
    return (output.frames[0] * 255).round().to(torch.uint8)


@pytest.mark.parametrize("name", BOUNDARIES)
def test_a_sample_of_two_experts_is_that_of_diffusers_pipeline(tiny_root: Callable[[str], Path], name: str) -> None:
    asked = request(name)
    video, _ = ours(tiny_root(name), name, asked)
    assert torch.equal(video, theirs(tiny_root(name), asked))


@pytest.mark.parametrize("name", BOUNDARIES)
def test_the_high_noise_expert_has_the_steps_at_and_above_the_boundary_and_the_other_the_rest(
    tiny_root: Callable[[str], Path], name: str
) -> None:
    _, seen = ours(tiny_root(name), name, request(name))
    high, low = (sorted({call.timestep for call in seen[key]}) for key in ("transformer", "transformer_2"))
    assert low[-1] < BOUNDARIES[name] * 1000 <= high[0]
    u = [1 - step / STEPS for step in range(STEPS)]  # the scheduler's own levels, before its shift
    above = [SHIFT * each / (1 + (SHIFT - 1) * each) >= BOUNDARIES[name] for each in u]
    assert (len(high), len(low)) == (sum(above), STEPS - sum(above))
    assert all(
        len(calls) == 2 * steps
        for calls, steps in ((seen["transformer"], len(high)), (seen["transformer_2"], len(low)))
    )
