"""Sampling through diffusers' pipelines: the same video as theirs, and nothing left behind."""

import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from PIL import Image

from longtake.config.schema import LoraConfig
from longtake.errors import ConfigError, ModelError, RunError
from longtake.lora import adapter_state, attach, load_adapter_state, save_adapter, trained_adapter
from longtake.models.wan.conditioning import pad_prompt
from longtake.models.wan.encoders import encode_prompt, load_image_encoder, load_text_encoder, load_vae
from longtake.models.wan.variants import variant
from longtake.sampling import SampleRequest, check_request, encode_requests, sample, sample_encoded

LORA = LoraConfig(rank=4, alpha=8.0, targets=("attention", "ffn"), dropout=0.5)
SIZES = {"tiny-ti2v": (64, 32)}


def picture(size, seed=0):
    width, height = size
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def request(name, **changes):
    size = SIZES.get(name, (48, 32))
    task = variant(name).spec.task
    defaults = {
        "prompt": "a rabbit &amp; a bird",
        "image": picture(size) if task in ("i2v", "flf2v") else None,
        "last_image": picture(size, 1) if task == "flf2v" else None,
        "size": size,
        "num_frames": 5,
        "steps": 2,
        "guidance_scale": 4.0,
        "seed": 3,
        "shift": 3.0,
    }
    return SampleRequest(**(defaults | changes))


def load(root, dtype=torch.float32):
    return WanTransformer3DModel.from_pretrained(root / "transformer", torch_dtype=dtype)


def adapt(transformer):
    attach(transformer, LORA, seed=0)
    generator = torch.Generator().manual_seed(1)
    state = adapter_state(transformer)
    load_adapter_state(transformer, {k: torch.randn(v.shape, generator=generator) * 0.2 for k, v in state.items()})


def run(root, name, transformer=None, **changes):
    transformers = {"transformer": transformer or load(root)}
    return sample(root, variant(name).spec, transformers, request(name, **changes), "cpu")


def scheduler():
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def theirs(pipeline, asked, **inputs):
    """What diffusers' own pipeline samples."""
    pipeline.scheduler = scheduler()
    pipeline.set_progress_bar_config(disable=True)
    output = pipeline(
        width=asked.size[0],
        height=asked.size[1],
        num_frames=asked.num_frames,
        num_inference_steps=asked.steps,
        guidance_scale=asked.guidance_scale,
        generator=torch.Generator().manual_seed(asked.seed),
        output_type="pt",
        **inputs,
    )
    return (output.frames[0] * 255).round().to(torch.uint8)


def as_pillow(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy())


@pytest.mark.parametrize("name", ["tiny-t2v", "tiny-i2v", "tiny-flf2v", "tiny-ti2v"])
def test_a_seed_means_a_video(tiny_root, name):
    root = tiny_root(name)
    transformer = load(root)
    video = run(root, name, transformer)
    width, height = request(name).size
    assert (video.dtype, tuple(video.shape)) == (torch.uint8, (5, 3, height, width))
    assert torch.equal(run(root, name, transformer), video)
    assert not torch.equal(run(root, name, transformer, seed=4), video)


def test_a_text_to_video_sample_is_diffusers_own_of_the_same_folder(tiny_root, tmp_path):
    root = tiny_root("tiny-t2v")
    transformer = load(root)
    adapt(transformer)
    adapter = trained_adapter(adapter_state(transformer), LoraConfig(alpha=8.0), {})
    save_adapter(tmp_path / "adapter.safetensors", adapter, "comfyui")
    ours = run(root, "tiny-t2v", transformer)

    pipeline, asked = WanPipeline.from_pretrained(root), request("tiny-t2v")
    texts = {"prompt": asked.prompt, "negative_prompt": ""}
    assert not torch.equal(ours, theirs(pipeline, asked, **texts))
    pipeline.load_lora_weights(tmp_path, weight_name="adapter.safetensors")
    assert torch.equal(ours, theirs(pipeline, asked, **texts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["tiny-i2v", "tiny-flf2v", "tiny-ti2v"])
def test_an_image_to_video_sample_is_that_of_diffusers_with_its_encoders(tiny_root, name, dtype):
    root = tiny_root(name)
    asked = request(name, image=picture(SIZES.get(name, (48, 32))), num_frames=9)
    text = load_text_encoder(root, "cpu")
    clip = load_image_encoder(root, "cpu") if variant(name).has_image_encoder else None
    embeds = [pad_prompt(encode_prompt(text, prompt), 512)[None] for prompt in (asked.prompt, "")]
    pipeline = WanImageToVideoPipeline(
        tokenizer=text.tokenizer,
        text_encoder=text.model,
        vae=load_vae(root, "cpu"),
        scheduler=scheduler(),
        image_processor=clip and clip.processor,
        image_encoder=clip and clip.model,
        transformer=load(root, dtype),
        expand_timesteps=variant(name).spec.expand_timesteps,
    )
    images = {"image": as_pillow(asked.image), "last_image": None}
    if asked.last_image is not None:
        images["last_image"] = as_pillow(asked.last_image)
    expected = theirs(pipeline, asked, prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1], **images)
    assert torch.equal(sample(root, variant(name).spec, {"transformer": load(root, dtype)}, asked, "cpu"), expected)


def test_a_ti2v_sample_of_a_prompt_alone_is_that_of_diffusers(tiny_root):
    root, asked = tiny_root("tiny-ti2v"), request("tiny-ti2v")
    pipeline = WanPipeline.from_pretrained(root, expand_timesteps=True)
    expected = theirs(pipeline, asked, prompt=asked.prompt, negative_prompt="")
    assert torch.equal(run(root, "tiny-ti2v"), expected)


@pytest.mark.parametrize("name", ["tiny-t2v", "tiny-i2v", "tiny-flf2v", "tiny-ti2v"])
def test_requests_encoded_together_sample_the_same_without_their_encoders(tiny_root, tmp_path, name):
    root, spec = tiny_root(name), variant(name).spec
    size = SIZES.get(name, (48, 32))
    asked = [request(name, negative_prompt="fog"), request(name, prompt="a bird", guidance_scale=1.0, seed=4)]
    if spec.task != "t2v":
        asked[1] = replace(asked[1], image=picture(size, 7))
    torch.manual_seed(11)
    before = torch.get_rng_state()
    encoded = encode_requests(root, spec, asked, "cpu")
    assert torch.equal(torch.get_rng_state(), before)
    assert [each.request for each in encoded] == asked
    assert encoded[1].negative_prompt_embeds is None
    assert [each.image_inputs is None for each in encoded] == [not each.images for each in asked]
    shutil.copytree(root / "vae", tmp_path / "vae")  # no other encoder is there any more
    transformers = {"transformer": load(root)}
    for each in encoded:
        alone = sample(root, spec, transformers, each.request, "cpu")
        assert torch.equal(sample_encoded(tmp_path, spec, transformers, each, "cpu"), alone)


def test_no_request_loads_no_encoder(tmp_path):
    assert encode_requests(tmp_path, variant("tiny-i2v").spec, [], "cpu") == []


def test_a_damaged_vae_is_said_before_the_denoising(tiny_root, tmp_path):
    root, spec = tiny_root("tiny-t2v"), variant("tiny-t2v").spec
    (encoded,) = encode_requests(root, spec, [request("tiny-t2v")], "cpu")
    steps = []
    with pytest.raises(ModelError, match="vae"):
        sample_encoded(tmp_path, spec, {"transformer": load(root)}, encoded, "cpu", steps.append)
    assert steps == []


@pytest.mark.parametrize("name", ["tiny-i2v", "tiny-ti2v"])
def test_the_image_decides(tiny_root, name):
    root, transformer = tiny_root(name), load(tiny_root(name))
    one, other = (run(root, name, transformer, image=picture(request(name).size, seed)) for seed in (5, 6))
    assert not torch.equal(one, other)


def test_ti2v_keeps_its_image_as_the_first_latent_frame(tiny_root):
    root = tiny_root("tiny-ti2v")
    image = picture(SIZES["tiny-ti2v"], 5)
    vae = load_vae(root, "cpu")
    with torch.no_grad():
        alone = vae.decode(vae.encode(image[None, :, None].float() / 255 * 2 - 1).latent_dist.mode()).sample[0, :, 0]
    first = run(root, "tiny-ti2v", image=image)[0]
    # through the latents' normalisation and back, and a byte's rounding
    assert (first.float() - (alone.clamp(-1, 1) + 1) * 127.5).abs().max() < 1.01


@pytest.mark.parametrize("image", [None, picture(SIZES["tiny-ti2v"])], ids=["no image", "image"])
def test_ti2v_embeds_two_timesteps_not_one_for_each_token(tiny_root, image):
    root, seen = tiny_root("tiny-ti2v"), []
    transformer = load(root)
    transformer.blocks[0].register_forward_pre_hook(lambda _, arguments: seen.append(arguments[2].rows.shape[1]))
    run(root, "tiny-ti2v", transformer, image=image)
    assert set(seen) == {2}


def test_guidance_1_needs_no_negative_prompt(tiny_root):
    root, transformer = tiny_root("tiny-t2v"), load(tiny_root("tiny-t2v"))
    one, other = (run(root, "tiny-t2v", transformer, guidance_scale=1.0, negative_prompt=text) for text in ("", "fog"))
    assert torch.equal(one, other)
    one, other = (run(root, "tiny-t2v", transformer, negative_prompt=text) for text in ("", "fog"))
    assert not torch.equal(one, other)


def test_the_model_and_the_random_state_are_given_back_as_they_were(tiny_root):
    root = tiny_root("tiny-i2v")
    transformer = load(root)
    adapt(transformer)
    transformer.enable_gradient_checkpointing()
    transformer.train()
    transformer.blocks[1].eval()
    modes = [module.training for module in transformer.modules()]
    trained = {name for name, weight in transformer.named_parameters() if weight.requires_grad}
    weights = {name: weight.detach().clone() for name, weight in transformer.state_dict().items()}
    torch.manual_seed(11)
    before = torch.get_rng_state()
    steps = []
    video = sample(
        root, variant("tiny-i2v").spec, {"transformer": transformer}, request("tiny-i2v"), "cpu", steps.append
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in transformer.modules()] == modes
    assert {name for name, weight in transformer.named_parameters() if weight.requires_grad} == trained
    assert all(torch.equal(weight, weights[name]) for name, weight in transformer.state_dict().items())
    assert transformer.is_gradient_checkpointing
    assert steps == [1, 2]
    assert torch.equal(run(root, "tiny-i2v", transformer.eval()), video)  # no dropout while it was training


def test_a_model_that_fails_on_the_way_is_given_back_too(tiny_root):
    root = tiny_root("tiny-t2v")
    transformer = load(root).train()
    with torch.no_grad():
        transformer.proj_out.bias.fill_(float("nan"))
    with pytest.raises(RunError, match="not finite"):
        run(root, "tiny-t2v", transformer)
    assert all(module.training for module in transformer.modules())


def test_bf16_weights_with_fp32_adapters_sample(tiny_root):
    root = tiny_root("tiny-i2v")
    transformer = load(root, torch.bfloat16)
    adapt(transformer)
    assert run(root, "tiny-i2v", transformer).float().std() > 0


def test_each_expert_denoises_its_own_side_of_the_boundary(tiny_root):
    root = tiny_root("tiny-t2v")
    spec = replace(variant("tiny-t2v").spec, experts=("transformer", "transformer_2"), boundary_ratio=0.875)
    experts = {name: load(root) for name in spec.experts}
    seen = {name: [] for name in experts}
    for name, expert in experts.items():
        expert.register_forward_pre_hook(
            lambda _, __, inputs, name=name: seen[name].append(float(inputs["timestep"][0])), with_kwargs=True
        )
    sample(root, spec, experts, request("tiny-t2v", steps=6), "cpu")
    assert min(seen["transformer"]) >= 875 > max(seen["transformer_2"])
    assert len(seen["transformer"]) + len(seen["transformer_2"]) == 2 * 6


@pytest.mark.parametrize(
    ("name", "changes", "messages"),
    [
        ("tiny-t2v", {"num_frames": 6}, ["use 5 or 9"]),
        ("tiny-t2v", {"num_frames": 0, "size": (50, 8), "steps": 0}, ["4n+1", "use 48", "use 16", "no video"]),
        ("tiny-ti2v", {"size": (48, 32)}, ["does not divide by 32"]),
        ("tiny-t2v", {"image": picture((48, 32))}, ["would ignore the image"]),
        ("tiny-i2v", {"image": None}, ["none is given"]),
        ("tiny-i2v", {"last_image": picture((48, 32))}, ["last_image: tiny-i2v would ignore"]),
        ("tiny-flf2v", {"last_image": None}, ["last_image: tiny-flf2v makes"]),
        ("tiny-i2v", {"image": picture((64, 48))}, ["[3, 48, 64], not [3, 32, 48]"]),
    ],
)
def test_what_the_model_cannot_follow_is_refused_all_at_once(name, changes, messages):
    with pytest.raises(ConfigError) as caught:
        check_request(request(name, **changes), variant(name).spec)
    lines = str(caught.value).splitlines()
    assert len(lines) == len(messages)
    assert all(message in line for message, line in zip(messages, lines, strict=True))


def test_a_folder_without_encoders_is_refused(tmp_path, tiny_root):
    transformer = load(tiny_root("tiny-t2v"))
    with pytest.raises(ModelError, match="text_encoder"):
        run(tmp_path, "tiny-t2v", transformer)
