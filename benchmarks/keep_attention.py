"""Times a LoRA training step that keeps attention's output against one that computes attention again, on the CPU.

Both checkpoint every block. The steps of a pair follow each other in one process, in turns which comes first; what
counts is the median of the pairs' ratios. The ratio of processor time tells, on a machine that others use too, what the
time would be without them.

    python benchmarks/keep_attention.py
    python benchmarks/keep_attention.py --frames 33 --heads 8
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from longtake.config.schema import LoraConfig, MemoryStrategy, TrainingConfig
from longtake.lora import attach
from longtake.memory.strategy import apply
from longtake.models.spec import ModelSpec
from longtake.models.wan.conditioning import Conditioning
from longtake.models.wan.variants import variant
from longtake.training.batch import Batch, summed_loss
from longtake.training.optimizer import build_optimizer, trained_parameters

SIZE = (832, 480)
HEAD_DIM = 128
AGAIN = MemoryStrategy(gradient_checkpointing="block")
KEPT = MemoryStrategy(gradient_checkpointing="block_keep_attention")


@dataclass(frozen=True)
class Bench:
    """A model with frozen weights and a LoRA in fp32, its optimiser, and one clip without meaning."""

    spec: ModelSpec
    transformer: Any
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    batch: Batch

    def step(self) -> tuple[float, float]:
        """Seconds of one step, on the clock and of processor time."""
        started, used = time.perf_counter(), time.process_time()
        self.optimizer.zero_grad(set_to_none=True)
        summed_loss(self.transformer, self.spec, self.batch).backward()
        self.optimizer.step()
        return time.perf_counter() - started, time.process_time() - used

    def gradients(self) -> list[Tensor]:
        """What the trained parameters have, copied."""
        return [parameter.grad.clone() for parameter in self.parameters.values() if parameter.grad is not None]


def build(heads: int, blocks: int, num_frames: int, rank: int) -> Bench:
    """A text-to-video model with the 14B model's proportions: heads of 128, a feed-forward 2.7 times as wide."""
    dim = heads * HEAD_DIM
    entry = variant("tiny-t2v")
    spec = replace(entry.spec, heads=heads, head_dim=HEAD_DIM)
    changes = {"num_layers": blocks, "num_attention_heads": heads, "attention_head_dim": HEAD_DIM}
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(**(entry.transformer_config | changes | {"ffn_dim": 27 * dim // 10}))
    attach(transformer, LoraConfig(rank=rank, alpha=rank), 0)
    for key, parameter in transformer.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(parameter, std=0.02)
    transformer.train()
    parameters = trained_parameters(transformer)
    shape = (1, *spec.latent_shape(num_frames, SIZE[1], SIZE[0]))
    conditioning = Conditioning(torch.randn(1, spec.text_tokens, spec.text_dim), None, None, None)
    batch = Batch(torch.randn(shape), torch.randn(shape), torch.tensor([0.6]), torch.ones(1), conditioning)
    return Bench(spec, transformer, parameters, build_optimizer(parameters, TrainingConfig()), batch)


@contextmanager
def applied(bench: Bench, strategy: MemoryStrategy) -> Iterator[None]:
    """Inside the context the model runs under `strategy`."""
    with (
        tempfile.TemporaryDirectory() as scratch,
        apply(bench.transformer, bench.spec, strategy, Path(scratch)),
    ):
        yield


def seconds(bench: Bench, strategy: MemoryStrategy) -> tuple[float, float]:
    """Of one step under `strategy`."""
    with applied(bench, strategy):
        return bench.step()


def same_gradients(bench: Bench) -> bool:
    """Whether both strategies give the same bits; runs each once, which also warms them up."""
    found = []
    for strategy in (AGAIN, KEPT):
        with applied(bench, strategy):
            bench.optimizer.zero_grad(set_to_none=True)
            summed_loss(bench.transformer, bench.spec, bench.batch).backward()
        found.append(bench.gradients())
    return all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def main() -> None:
    """Reads the command line and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--frames", type=int, default=21, help=f"of {SIZE[0]}x{SIZE[1]}")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()
    bench = build(options.heads, options.blocks, options.frames, options.rank)
    tokens = bench.spec.tokens(options.frames, SIZE[1], SIZE[0])
    print(f"{options.blocks} blocks {options.heads * HEAD_DIM} wide, {tokens} tokens, LoRA r{options.rank}, fp32, CPU,")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}; gradients equal: {same_gradients(bench)}\n")
    print("| pair | attention again, s | attention kept, s | ratio | of processor time |")
    print("|--:|--:|--:|--:|--:|")
    ratios = []
    for pair in range(options.pairs):
        order = (AGAIN, KEPT) if pair % 2 == 0 else (KEPT, AGAIN)
        took = {strategy.gradient_checkpointing: seconds(bench, strategy) for strategy in order}
        (again, again_used), (kept, kept_used) = took["block"], took["block_keep_attention"]
        ratios.append((kept / again, kept_used / again_used))
        print(f"| {pair + 1} | {again:.2f} | {kept:.2f} | {ratios[-1][0]:.3f} | {ratios[-1][1]:.3f} |", flush=True)
    medians = [statistics.median(column) for column in zip(*ratios, strict=True)]
    print(f"\nmedian ratio {medians[0]:.3f}, of processor time {medians[1]:.3f}")


if __name__ == "__main__":
    main()
