"""What other trainers call a key, a section or a value of ours, where no likeness of letters would find it.

The words of diffusers' and Hugging Face's scripts, kohya's and musubi-tuner, finetrainers, diffusion-pipe and
DiffSynth-Studio. A word that means several things there, or that Longtake has nothing for, is left out.
"""

KEYS = {
    "model.name": "pretrained_model_name_or_path model_id base_model hub_id model.variant",
    "model.path": "dit dit_path transformer_path ckpt_path model_paths",
    "model.low_noise_path": "dit_low_noise",
    "model.components": "vae vae_path t5 t5_path clip_path llm_path text_encoder_path",
    "model.dtype": "transformer_dtype dit_dtype torch_dtype weight_dtype",
    "data.source": "instance_data_root instance_data_dir train_data_dir dataset dataset_path dataset_base_path"
    " dataset_metadata_path dataset_config data_root data_dir video_dir video_directory"
    " data.path data.directory data.folder data.root data.clips data.videos",
    "data.cache": "cache_dir cache_directory precomputation_dir",
    "data.caption_dropout": "proportion_empty_prompts",
    "data.num_frames": "frames video_length clip_length target_frames max_frames frame_buckets",
    "data.size": "resolution resolutions video_resolution_buckets width height",
    "lora.rank": "network_dim lora_dim lora_r lora.r",
    "lora.alpha": "network_alpha",
    "lora.dropout": "network_dropout",
    "lora.targets": "target_modules lora_target_modules",
    "lora.start_from": "network_weights init_from_existing lora_checkpoint lora.path",
    "training.steps": "max_train_steps max_steps num_train_steps total_steps iterations"
    " epochs num_epochs num_train_epochs max_train_epochs",
    "training.global_batch_size": "gradient_accumulation_steps gradient_accumulation grad_accum",
    "training.micro_batch_size": "batch_size train_batch_size per_device_train_batch_size micro_batch_size_per_gpu",
    "training.precision": "mixed_precision fp16 bf16 amp",
    "training.ema": "use_ema ema_decay",
    "training.learning_rate": "lr unet_lr",
    "training.lora_plus_ratio": "loraplus_lr_ratio",
    "training.schedule": "lr_scheduler lr_scheduler_type",
    "training.clip_norm": "max_grad_norm max_norm gradient_clipping gradient_clip_val grad_clip gradient_clip"
    " clip_grad_norm",
    "training.sigmas": "weighting_scheme flow_weighting_scheme timestep_sampling timestep_sample_method",
    "training.shift": "flow_shift discrete_flow_shift timestep_shift sigma_shift",
    "memory.budget": "vram max_vram",
    "memory.gradient_checkpointing": "activation_checkpointing use_gradient_checkpointing",
    "memory.activation_offload": "use_gradient_checkpointing_offload gradient_checkpointing_offload"
    " gradient_checkpointing_cpu_offload cpu_offload_checkpointing activation_cpu_offloading",
    "memory.block_swap": "blocks_to_swap",
    "memory.quantization": "fp8_base fp8_scaled quantize load_in_4bit load_in_8bit",
    "memory.optimizer": "optimizer_type use_8bit_adam optimizer.type optimizer.name",
    "parallel.strategy": "training_strategy distributed_type parallel_backend deepspeed fsdp zero_stage"
    " parallel.engine",
    "parallel.sp": "cp_degree context_parallel_size sequence_parallel_size sp_size ulysses_degree sequence_parallel",
    "validation.every": "validation_steps validation_epochs eval_steps eval_every_n_steps sample_every_n_steps"
    " validation.steps validation.interval",
    "validation.samples": "prompts prompt sample_prompts validation_prompt validation_prompts",
    "validation.sample_steps": "num_inference_steps",
    "validation.guidance_scale": "cfg cfg_scale",
    "output.run": "output_dir output_path logging_dir save_path output.path output.dir output.name",
    "output.save_every": "checkpointing_steps save_steps save_interval output.checkpoint_every",
    "output.keep": "checkpoints_total_limit save_total_limit",
    "output.wandb": "report_to wandb_project tracker_project_name wandb.project",
}
SECTIONS = {
    "model": "transformer",
    "data": "dataset datasets general",
    "lora": "network adapter peft",
    "training": "optimizer scheduler hyperparameters",
    "memory": "vram offload",
    "parallel": "distributed deepspeed fsdp",
    "validation": "eval evaluation sample sampling",
    "output": "checkpoint checkpoints save logging",
}
VALUES = {
    "bf16": "bfloat16",
    "fp16": "float16 half",
    "fp32": "float32 float no",
    "none": "false off no",
    "block": "true full",
    "host": "true cpu ram",
    "disk": "nvme ssd",
    "nf4": "4bit int4",
    "int8": "8bit",
    "fp8": "fp8_e4m3fn float8 float8_e4m3fn",
    "adamw8bit": "adam8bit adamw_bnb_8bit paged_adamw8bit",
    "logit_normal": "sigmoid",
    "fsdp2": "fsdp fully_sharded",
    "deepspeed_stage_1": "zero1",
    "deepspeed_stage_2": "zero2 deepspeed",
    "deepspeed_stage_3": "zero3",
}
NOTES = {
    "data.size": "width and height: [832, 480]",
    "training.steps": "a run's length is in steps",
    "training.global_batch_size": "the clips of a step, over accumulation and ranks",
    "training.micro_batch_size": "the clips of a forward pass; global_batch_size counts those of a step",
}
"""What is to be said with the key, because its values are not those of the other trainer's word."""


def key_for(word: str) -> str:
    """`section.key` for another trainer's `word`, or for its `section.word`; empty where it is in no table."""
    return _lookup(KEYS, word)


def section_for(word: str) -> str:
    """Our section for another trainer's; empty where it is in no table."""
    return _lookup(SECTIONS, word)


def value_for(word: str, choices: list[str]) -> str:
    """The one of `choices` for another trainer's value; empty where it is in no table."""
    return _lookup({choice: VALUES.get(choice, "") for choice in choices}, word)


def note_on(key: str) -> str:
    """What to say with `key` to someone who gave another trainer's word for it; empty where nothing is to be said."""
    return NOTES.get(key, "")


def _lookup(table: dict[str, str], word: str) -> str:
    return next((ours for ours, words in table.items() if _plain(word) in map(_plain, words.split())), "")


def _plain(word: str) -> str:
    """Without its case, and without the marks between its words."""
    return "".join(letter for letter in word.lower() if letter.isalnum() or letter == ".")
