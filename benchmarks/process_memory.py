"""Bytes that a training step takes of the operating system under each memory strategy, against a trace of the step.

    python benchmarks/process_memory.py

A small fp32 Wan transformer with a LoRA is trained for one step on the CPU, for each strategy in a process of its own
whose greatest resident size (VmHWM) is read. The prediction is the same step on fake tensors, which go through the
CPU's operators without values, counted by the ledger that counts the traces of large models. On the CPU, host and
device are one memory: only the disk tier, recomputation and slices make the process smaller.
"""

import argparse
import ctypes
import gc
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from longtake.config.schema import LoraConfig, MemoryStrategy, TrainingConfig
from longtake.distributed.backend import SingleDevice
from longtake.lora import attach
from longtake.memory.block_swap import swapped_blocks
from longtake.memory.copies import MetaCopies
from longtake.memory.strategy import apply
from longtake.memory_gauge import MemoryGauge
from longtake.models.spec import ModelSpec
from longtake.models.wan.conditioning import Conditioning
from longtake.models.wan.headers import read_headers
from longtake.models.wan.variants import variant
from longtake.models.weight_files import WeightFile, read_weights
from longtake.planner.ledger import Ledger
from longtake.training.batch import Batch, summed_loss
from longtake.training.optimizer import allocate_states, build_optimizer, trained_parameters

CPU, META = torch.device("cpu"), torch.device("meta")
TINY = variant("tiny-t2v")
HEAD_DIM = 64
LORA = LoraConfig(rank=8)
TOLERANCE = 0.05
"""Greatest difference of a measured number from the traced one, relative to that."""
AT_A_TIME = 2
"""Processes, of one thread each."""
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
"""Of a measured process. glibc maps every allocation from the threshold on, and unmaps it when it is freed."""


@dataclass(frozen=True)
class Size:
    """A model and its batch: `latents` are frames, height and width of each of `clips` clips; a token is 1 x 2 x 2."""

    layers: int
    heads: int
    latents: tuple[int, int, int]
    clips: int

    @property
    def spec(self) -> ModelSpec:
        """The tiny model's, but as wide as this one."""
        return replace(TINY.spec, heads=self.heads, head_dim=HEAD_DIM)

    @property
    def config(self) -> dict[str, Any]:
        """Arguments of WanTransformer3DModel."""
        dim = self.heads * HEAD_DIM
        wide = {"num_attention_heads": self.heads, "attention_head_dim": HEAD_DIM, "ffn_dim": 4 * dim}
        return TINY.transformer_config | wide | {"num_layers": self.layers}


LARGE = Size(layers=9, heads=6, latents=(5, 32, 32), clips=5)
WARM_UP = replace(LARGE, layers=4, latents=(5, 16, 16))
"""Run before bytes are counted: libraries load code and make buffers at the first call of a kernel, 11 MiB in all."""


def strategies(layers: int) -> dict[str, MemoryStrategy]:
    """By the names in the table; all others are compared with the first."""
    away: dict[str, Any] = {"activation_offload": "disk", "block_swap": layers, "block_swap_from": "disk"}
    return {
        "none": MemoryStrategy(gradient_checkpointing="none"),
        "block": MemoryStrategy(),
        "block, inputs on disk": MemoryStrategy(activation_offload="disk"),
        "block, inputs and weights on disk": MemoryStrategy(**away),
        "block_keep_attention, all of it on disk": MemoryStrategy(
            gradient_checkpointing="block_keep_attention", activation_offload="disk"
        ),
        "4 slices, 2 head groups": MemoryStrategy(slices=4, attention_head_groups=2),
        "4 slices, inputs and weights on disk": MemoryStrategy(slices=4, **away),
    }


@dataclass(frozen=True)
class Training:
    """What a step needs; `files` has where the frozen weights lie."""

    spec: ModelSpec
    transformer: Any
    files: dict[str, WeightFile]
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    batch: Batch


def write_weights(size: Size, folder: Path) -> None:
    """A diffusers component folder with random weights."""
    torch.manual_seed(0)
    WanTransformer3DModel(**size.config).save_pretrained(folder)


def training(size: Size, strategy: MemoryStrategy, folder: Path) -> Training:
    """As `training.model.build_model` makes it: weights that are streamed from their file stay there, and on `meta`."""
    transformer = _transformer(size)
    headers = read_headers([*folder.glob("*.safetensors")])
    files = {name: WeightFile(each.file, each.start, each.nbytes, torch.float32) for name, each in headers.items()}
    wanted = {name: file for name, file in files.items() if not name.startswith(_away(size, strategy))}
    values = read_weights(wanted, lambda name: torch.empty(headers[name].shape), lambda _name, tensor: tensor)
    transformer.load_state_dict(values, strict=False, assign=True)
    transformer.rope = WanRotaryPosEmbed(HEAD_DIM, (1, 2, 2), transformer.config.rope_max_seq_len)
    attach(transformer, LORA, 0, CPU)
    plain = {name: name.replace(".base_layer.", ".") for name, _ in transformer.named_parameters()}
    return _training(size, transformer, {name: files[file] for name, file in plain.items() if file in files})


def step(given: Training) -> None:
    """Forward, loss, backward, clipping, AdamW: `training.trainer.Trainer._step` for one micro-batch."""
    backend = SingleDevice(given.transformer, given.parameters, given.optimizer, fp16=False)
    backend.backward(summed_loss(given.transformer, given.spec, given.batch))
    nn.utils.clip_grad_norm_([*given.parameters.values()], 1.0)  # unread: tensors may have no values
    backend.step(skip=False)


def tensors(given: Training) -> Iterator[Tensor]:
    """All that is there before a step."""
    yield from (*given.transformer.parameters(), *given.transformer.buffers())
    for state in given.optimizer.state.values():
        yield from state.values()
    batch = given.batch
    yield from (batch.latents, batch.noise, batch.sigma, batch.weights, batch.conditioning.prompt_embeds)


def traced_bytes(size: Size, strategy: MemoryStrategy) -> int:
    """Peak of a step, weights and all, without running it."""
    transformer = _transformer(size)
    attach(transformer, LORA, 0)  # on `meta`: peft moves modules in a way that fake tensors refuse
    ledger = Ledger("cpu", workspaces=False)
    with tempfile.TemporaryDirectory() as scratch, FakeTensorMode(allow_non_fake_inputs=True):
        _without_values(transformer, _away(size, strategy))
        given = _training(size, transformer, {})
        for state in given.optimizer.state.values():
            state["step"] = torch.tensor(0.0)  # which AdamW reads; a fake tensor's value is known if it was written out
        ledger.hold("held", tensors(given))
        copies = MetaCopies()  # what they call the host is not the ledger's device: away, as on a disk
        with ledger, apply(transformer, given.spec, strategy, Path(scratch), copies=copies):
            step(given)
    return ledger.peak.total()


def measured_bytes(name: str, root: Path) -> int:
    """VmHWM during a step of the strategy `name` in a new process, less its resident size before it built the model."""
    command = [sys.executable, __file__, "--child", name, "--root", str(root)]
    child = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=False)
    if child.returncode:
        raise RuntimeError(child.stderr)
    return int(child.stdout)


def write_all_weights(root: Path) -> None:
    """What `measured_bytes` reads from `root`."""
    write_weights(WARM_UP, root / "warm-up")
    write_weights(LARGE, root / "large")


def of_this_process(name: str, root: Path) -> int:
    """`measured_bytes` of this process, which must be new."""
    _run(WARM_UP, strategies(WARM_UP.layers)[name], root / "warm-up", None)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    gauge = MemoryGauge(CPU)
    _run(LARGE, strategies(LARGE.layers)[name], root / "large", gauge)
    return gauge.stage_peak()[0]


@dataclass(frozen=True)
class Row:
    """Bytes of one strategy, and how much less than under the first one that is."""

    name: str
    traced: int
    measured: int
    traced_fall: int
    measured_fall: int

    @property
    def agrees(self) -> bool:
        """Whether bytes and fall are those traced, to TOLERANCE."""
        return (
            abs(self.measured - self.traced) <= TOLERANCE * self.traced
            and abs(self.measured_fall - self.traced_fall) <= TOLERANCE * self.traced_fall
        )

    def __str__(self) -> str:
        shown = " | ".join(f"{value / 2**20:.1f}" for value in (self.traced, self.measured))
        fell = " | ".join(f"{value / 2**20:.1f}" for value in (self.traced_fall, self.measured_fall))
        of_fall = f"{self.measured_fall / self.traced_fall:.3f}" if self.traced_fall else ""
        return f"| {self.name} | {shown} | {self.measured / self.traced:.3f} | {fell} | {of_fall} |"


def rows(names: Iterable[str], root: Path) -> Iterator[Row]:
    """One for each of the strategies `names`, the first of which the others are compared with."""
    names = [*names]
    write_all_weights(root)
    first: tuple[int, int] | None = None
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        children = [pool.submit(measured_bytes, name, root) for name in names]
        for name, child in zip(names, children, strict=True):
            traced, measured = traced_bytes(LARGE, strategies(LARGE.layers)[name]), child.result()
            first = first or (traced, measured)
            yield Row(name, traced, measured, first[0] - traced, first[1] - measured)


def _run(size: Size, strategy: MemoryStrategy, folder: Path, gauge: MemoryGauge | None) -> None:
    given = training(size, strategy, folder)
    with (
        tempfile.TemporaryDirectory(dir=folder) as scratch,
        apply(given.transformer, given.spec, strategy, Path(scratch), given.files),
    ):
        if gauge is not None:
            gauge.begin_stage()
        step(given)


def _transformer(size: Size) -> Any:
    with META:
        return WanTransformer3DModel(**size.config).requires_grad_(False).train()


def _away(size: Size, strategy: MemoryStrategy) -> tuple[str, ...]:
    """Prefixes of the names of weights that are streamed."""
    swapped = swapped_blocks(size.layers, strategy.block_swap) if strategy.block_swap else ()
    return tuple(f"blocks.{index}." for index in swapped)


def _without_values(transformer: nn.Module, away: tuple[str, ...]) -> None:
    """Makes fake CPU tensors of parameters and buffers, but for frozen weights that are `away`."""
    for path, module in transformer.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and (parameter.requires_grad or not f"{path}.{name}".startswith(away)):
                empty = torch.empty(parameter.shape, device=CPU)
                module._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            assert buffer is not None
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=CPU)


def _training(size: Size, transformer: Any, files: dict[str, WeightFile]) -> Training:
    parameters = trained_parameters(transformer)
    optimizer = build_optimizer(parameters, TrainingConfig())
    allocate_states(optimizer)
    shape = (size.clips, size.spec.latent_channels, *size.latents)
    conditioning = Conditioning(torch.randn(size.clips, size.spec.text_tokens, size.spec.text_dim))
    weights = torch.full((size.clips,), 1 / size.clips)
    batch = Batch(torch.randn(shape), torch.randn(shape), torch.rand(size.clips), weights, conditioning)
    return Training(size.spec, transformer, files, parameters, optimizer, batch)


def main() -> None:
    """Prints the table; the exit status is 1 where a strategy disagrees."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--child", help="print the bytes of this strategy in this process; needs --root")
    parser.add_argument("--root", type=Path, help="folder with the weights")
    options = parser.parse_args()
    if options.child:
        print(of_this_process(options.child, options.root))
        return
    print("| strategy | traced, MiB | measured, MiB | ratio | fall traced | fall measured | ratio |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    agree = True
    with tempfile.TemporaryDirectory() as root:
        for row in rows(strategies(LARGE.layers), Path(root)):
            print(row, flush=True)
            agree = agree and row.agrees
    print(f"\n{LARGE}, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}")
    sys.exit(not agree)


if __name__ == "__main__":
    main()
