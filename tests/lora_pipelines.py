"""diffusers' own pipeline around a transformer, to load LoRA files as its users do."""

from typing import Any

from diffusers import UniPCMultistepScheduler, WanPipeline


def pipeline_of(transformer: Any) -> WanPipeline:
    """A pipeline with nothing but `transformer`."""
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    return WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=transformer)
