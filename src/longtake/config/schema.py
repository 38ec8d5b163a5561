"""Every section and key of a run's TOML, frozen and typed; the docstring under each field is its manual."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

# Strict: `true` and "2" are no numbers. TOML can write inf and nan; no key has a use for them.
Whole = Annotated[int, Field(ge=0, strict=True)]
Positive = Annotated[int, Field(gt=0, strict=True)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0, strict=True)]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0, strict=True)]
NonNegative = Annotated[float, Field(ge=0.0, strict=True, allow_inf_nan=False)]
AboveZero = Annotated[float, Field(gt=0.0, strict=True, allow_inf_nan=False)]
Filled = Annotated[str, Field(min_length=1)]
Switch = Annotated[bool, Field(strict=True)]

Precision = Literal["bf16", "fp16", "fp32"]
ParallelStrategy = Literal[
    "auto", "single", "ddp", "fsdp2", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3"
]
LoraFormat = Literal["comfyui", "diffusers", "kohya"]


class Section(BaseModel):
    """A frozen section that refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())


class ModelConfig(Section):
    """[model]: which weights are trained: `name`, or `path`, or both where a file alone cannot tell the variant."""

    name: str = ""
    """A variant's name (`wan2.1-i2v-14b-480p`, `tiny-i2v`) or a hub id (`owner/name`, ModelScope: `ms://owner/name`)."""
    path: str = ""
    """A diffusers folder or an original release, or a safetensors file in the original or ComfyUI's layout."""
    low_noise_path: str = ""
    """The low-noise transformer of an A14B model, where `path` is a file of the high-noise one."""
    components: str = ""
    """Folder (diffusers, original release, ComfyUI's `models`) or hub id of VAE and encoders where `path` has none."""
    dtype: Precision = "bf16"
    """Type of the frozen weights. Trained weights are always fp32. fp32 doubles the weights' memory."""
    expert: Literal["both", "high", "low"] = "both"
    """Which of the two transformers of a Wan2.2 A14B model is trained; a step of "both" is of one of them."""

    @model_validator(mode="after")
    def _has_source(self) -> "ModelConfig":
        if not (self.name or self.path):
            raise ValueError("give name or path")
        if self.low_noise_path and not self.path:
            raise ValueError("give path, the high-noise transformer's, beside low_noise_path")
        return self


class DataConfig(Section):
    """[data]: clips, captions, and the shape in which training sees them."""

    source: Filled
    """A folder of `clip.mp4` + `clip.txt`, or a CSV, JSON or JSONL file with columns `video` and `prompt`."""
    allow_links: Switch = False
    """Let links, `..` and absolute paths lead out of the source's folder. For data that you trust."""
    cache: Filled = "cache/"
    """Folder of the conditioning cache that `longtake prepare` fills."""
    validation: Fraction | Filled = 0.05
    """Fraction of the clips held out for the validation loss, or a source of its own. 0 switches validation off."""
    caption_dropout: Fraction = 0.1
    """Share of samples trained with the empty caption, which trains the unconditional branch of guidance."""
    num_frames: Positive = 81
    """Frames a clip, 4n+1. Memory of activations grows in proportion."""
    size: tuple[Positive, Positive] = (832, 480)
    """Width and height in pixels; each divides by 16 (by 32 for the 5B)."""
    frames_schedule: tuple[tuple[Whole, Positive], ...] = ()
    """Curriculum: pairs of (from this step on, frames). Empty: `num_frames` from the first step."""
    workers: Whole = 0
    """Processes that read clips ahead, each with a batch in host memory; 0: one thread. Changes no result."""


class LoraConfig(Section):
    """[lora]: low-rank adapters on frozen weights. Without this section all weights are trained."""

    rank: Positive = 32
    """Rank r of the adapters. Trained parameters, gradients and Adam states grow in proportion."""
    alpha: AboveZero = 32.0
    """The adapter's output is scaled by alpha / rank."""
    rslora: Switch = False
    """Scale by alpha / sqrt(rank) (rsLoRA): a high rank learns as fast as a low one."""
    dora: Switch = False
    """Train the length of each row of the weights apart from its direction (DoRA); takes more memory and time."""
    targets: Annotated[tuple[Filled, ...], Field(min_length=1)] = ("attention", "ffn")
    """Groups `attention`, `ffn`, `image` (the image branch's `add_k_proj`, `add_v_proj`), or ends of module names."""
    block_ranks: tuple[tuple[Whole, Whole, Positive], ...] = ()
    """Other ranks for some blocks: triples of first block, last block, rank; blocks count from 0, alpha stays."""
    dropout: BelowOne = 0.0
    """Dropout on the adapters' input."""
    start_from: tuple[Filled, ...] = ()
    """LoRA files to go on from, in any format, one for each expert trained, high-noise first; empty: fresh ones."""


class TrainingConfig(Section):
    """[training]: length, batch, optimiser, objective."""

    steps: Positive = 2000
    """Optimiser steps."""
    global_batch_size: Positive = 4
    """Clips an optimiser step, over all ranks and accumulation."""
    micro_batch_size: Positive = 1
    """Clips a forward pass on one rank; activations grow in proportion. Accumulation follows from it."""
    precision: Precision = "bf16"
    """Compute type of the forward pass (autocast). fp16 uses a gradient scaler. Adapters and Adam states stay fp32."""
    seed: Whole = 0
    """Noise, sigma, dropout and order are functions of (seed, epoch, sample)."""
    ema: BelowOne = 0.0
    """Decay of an exponential moving average of the trained weights; 0 switches it off. One fp32 copy of them."""
    learning_rate: AboveZero = 1e-4
    """Peak learning rate of AdamW."""
    lora_plus_ratio: AboveZero = 1.0
    """Learning rate of the adapters' B matrices over that of A (LoRA+, 16 in its paper); 1 for plain LoRA."""
    weight_decay: NonNegative = 0.01
    """Decoupled weight decay of AdamW."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """What the learning rate does after the warm-up: stays, or falls to zero along a half cosine."""
    warmup_steps: Whole = 50
    """Steps over which the learning rate rises linearly to its peak."""
    clip_norm: NonNegative = 1.0
    """Greatest norm of the whole gradient; 0 switches clipping off."""
    sigmas: Literal["uniform", "logit_normal"] = "logit_normal"
    """Distribution that sigma is drawn from before the shift."""
    shift: AboveZero = 3.0
    """sigma = shift u / (1 + (shift - 1) u); the models' authors use 3 for 480p, 5 for 720p and the 5B."""
    loss_weighting: Literal["none", "bell"] = "none"
    """`bell` weights the loss by a bell over the timestep with mean 1, `none` by 1."""


class MemoryStrategy(Section):
    """[memory]: where bytes live and when they are computed. No field but `quantization` changes a gradient's value.

    A plan is written in these fields, and a plan's file can be trained as it is.
    """

    budget: str = "auto"
    """Device memory that the run may use (`24GiB`); `auto` is what is free."""
    gradient_checkpointing: Literal["none", "block", "block_keep_attention"] = "block"
    """`block` keeps only each block's input and recomputes the block in backward: about a third more compute.

    `block_keep_attention` keeps attention's output too: an eighth more compute, and as many bytes again to keep.
    """
    checkpoint_every: Positive = 1
    """Checkpoint segments of this many blocks: fewer kept inputs, larger recomputed segments."""
    activation_offload: Literal["none", "host", "disk"] = "none"
    """Where what checkpointing keeps waits for the backward pass; copied beside the computation."""
    activation_offload_fraction: Fraction = 1.0
    """Share of what is kept that is moved, the first blocks' first."""
    block_swap: Whole = 0
    """Blocks whose frozen weights are streamed in for use and not kept on the device; costs time on short clips."""
    block_swap_from: Literal["host", "disk"] = "host"
    """Where the streamed weights come from: pinned host memory, or the safetensors file.

    Of two experts, the weights of the one that a step does not train wait there too.
    """
    slices: Positive = 1
    """Slices of the token axis over which a block is evaluated; 16 need a third of its memory, 3 % more compute."""
    attention_head_groups: Positive = 1
    """Groups of heads over which self-attention is evaluated; with slices, 4 save a quarter of a block's memory."""
    quantization: Literal["none", "int8", "fp8", "nf4"] = "none"
    """Type of the blocks' frozen weights under a LoRA: one byte a weight, nf4 half of one. The one inexact setting."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """AdamW with fp32 states, or 8-bit ones in a quarter of the memory, which round."""
    optimizer_offload: Switch = False
    """Keep AdamW's states in host memory and stream them through the device at each update."""
    fallbacks: tuple["MemoryStrategy", ...] = ()
    """Strategies to go on with after running out of memory, in order; empty: a fixed ladder."""


class ParallelConfig(Section):
    """[parallel]: how ranks share the work."""

    strategy: ParallelStrategy = "auto"
    """Engine that shares the work among ranks."""
    sp: Positive = 1
    """Degree of sequence parallelism: ranks that share one clip's tokens. The longer a clip, the more it saves."""
    dp_replicate: Positive = 1
    """Groups of ranks that each have all of fsdp2's shards (hybrid sharding): one a machine where networks are slow."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """What the engine keeps in host memory."""


class SampleConfig(Section):
    """One entry of [validation].samples."""

    prompt: str
    """Caption to sample."""
    image: str = ""
    """First frame, for image-to-video models."""
    last_image: str = ""
    """Last frame, for first-and-last-frame models."""


class ValidationConfig(Section):
    """[validation]: loss on held-out clips and sample videos while training."""

    every: Positive = 250
    """Steps between two validations."""
    samples: tuple[SampleConfig, ...] = ()
    """Videos to sample at each validation."""
    sample_steps: Positive = 30
    """Denoising steps of a sample."""
    guidance_scale: Annotated[float, Field(ge=1.0, strict=True, allow_inf_nan=False)] = 5.0
    """Classifier-free guidance of a sample; 1 switches it off."""


class OutputConfig(Section):
    """[output]: the run folder."""

    run: Filled
    """Folder of the run: config, metrics, checkpoints, samples, adapter, report."""
    save_every: Positive = 100
    """Steps between two checkpoints."""
    keep: Positive = 3
    """Checkpoints kept, newest first."""
    formats: tuple[LoraFormat, ...] = ("comfyui",)
    """Formats of the adapter written at the end; `adapter.safetensors` is always ComfyUI's."""
    wandb: str = ""
    """Project of Weights & Biases to log to; empty: none."""


class RunConfig(Section):
    """A whole run."""

    model: ModelConfig
    data: DataConfig
    lora: LoraConfig | None = None
    training: TrainingConfig = TrainingConfig()
    memory: MemoryStrategy = MemoryStrategy()
    parallel: ParallelConfig = ParallelConfig()
    validation: ValidationConfig = ValidationConfig()
    output: OutputConfig
