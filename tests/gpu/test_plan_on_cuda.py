"""What was planned beside what a CUDA device measures; skipped without one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel

from longtake.config.schema import LoraConfig, MemoryStrategy, TrainingConfig
from longtake.lora import attach
from longtake.memory.strategy import apply
from longtake.memory_gauge import expand_segments
from longtake.models.wan.conditioning import Conditioning
from longtake.models.wan.variants import KEEP_FP32, variant
from longtake.planner.hardware import DEVICES, recognise
from longtake.planner.load import Load
from longtake.planner.meta_model import META, Subject, batch_tensors, meta_batch
from longtake.planner.timeline import simulate
from longtake.planner.tracer import Tracer
from longtake.training.batch import Batch, summed_loss
from longtake.training.optimizer import allocate_states, build_optimizer, trained_parameters
from longtake.training.precision import compute_in

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
MODEL, BUCKET = "wan2.1-t2v-1.3b", (33, 480, 832)
SUBJECT = Subject(variant(MODEL), LoraConfig(rank=32), TrainingConfig(global_batch_size=1))
HOST: dict[str, Any] = {"activation_offload": "host"}
STRATEGIES: dict[str, dict[str, Any]] = {
    "none": {"gradient_checkpointing": "none"},
    "block": {},
    "attention kept": {"gradient_checkpointing": "block_keep_attention"},
    "inputs to host, swapped": {**HOST, "block_swap": 30},
    "slices, all away": {**HOST, "block_swap": 30, "slices": 4, "attention_head_groups": 4},
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_reserved_bytes_and_seconds_are_those_planned(name: str, tmp_path: Path) -> None:
    strategy = MemoryStrategy(**STRATEGIES[name])
    load, tracer = Load(BUCKET, 1, False), Tracer(SUBJECT)
    device = recognise(torch.cuda.get_device_name()) or DEVICES["h100-sxm"]
    composed = tracer.composed(strategy, load)
    planned = composed.peak_bytes + tracer.slack_bytes(strategy, load, device.generation, expandable=True)
    seconds = simulate(composed.micro_batch, device).seconds
    allocated, reserved, measured = _measured(strategy, tmp_path)
    assert abs(allocated / composed.peak_bytes - 1) < 0.03
    assert abs(reserved / planned - 1) < 0.06
    assert abs(measured / seconds - 1) < 0.25


def _measured(strategy: MemoryStrategy, scratch: Path) -> tuple[int, int, float]:
    """(allocated, reserved bytes at the peak, seconds of forward and backward) of a second step."""
    expand_segments(CUDA)
    with META:
        transformer = WanTransformer3DModel(**SUBJECT.variant.transformer_config)
    for key, parameter in transformer.named_parameters():
        kept = any(part in KEEP_FP32 for part in key.split("."))
        parameter.data = parameter.data.to(torch.float32 if kept else torch.bfloat16)
    transformer = transformer.to_empty(device=CUDA).requires_grad_(False)
    assert SUBJECT.lora is not None
    attach(transformer, SUBJECT.lora, 0, CUDA)
    parameters = trained_parameters(transformer.train())
    optimizer = build_optimizer(parameters, SUBJECT.training, strategy)
    allocate_states(optimizer)
    batch = _on_cuda(meta_batch(SUBJECT.spec, BUCKET))
    seconds = 0.0
    with apply(transformer, SUBJECT.spec, strategy, scratch):
        for _ in range(3):
            torch.cuda.reset_peak_memory_stats()
            begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begun.record()
            with compute_in(transformer, SUBJECT.spec, "bf16", CUDA):
                summed_loss(transformer, SUBJECT.spec, batch).backward()
            ended.record()
            torch.nn.utils.clip_grad_norm_([*parameters.values()], 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            torch.cuda.synchronize()
            seconds = begun.elapsed_time(ended) / 1000
    return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved(), seconds


def _on_cuda(batch: Batch) -> Batch:
    given = {id(tensor): torch.rand(tensor.shape, device=CUDA) for tensor in batch_tensors(batch)}

    def there(value: Any) -> Any:
        return given.get(id(value), value)

    conditioning = Conditioning(**{name: there(value) for name, value in vars(batch.conditioning).items()})
    return Batch(there(batch.latents), there(batch.noise), there(batch.sigma), there(batch.weights), conditioning)
