"""What quantised frozen weights cost in accuracy and save in bytes, on the bundled trained tiny models.

    python benchmarks/quantization.py

For held-out windows of shots that no bundled weight was trained on, in fp32: the relative error of the matrices,
of the predicted velocity at several sigmas (norm of the difference over norm), and the change of the validation loss.
Then the bytes of a large layer of the 14B models, and how long it takes to make it whole.
"""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longtake.config.load import load_config
from longtake.config.schema import MemoryStrategy, ModelConfig, RunConfig
from longtake.data.cache import Cache, Entry
from longtake.data.encode import component_root, prepare
from longtake.data.loader import EntryReader, Visit
from longtake.data.split import split
from longtake.demo.demo import write_demo
from longtake.memory.flattened import inner_tensors
from longtake.memory.quantization import QuantizedWeight, dequantized, quantize
from longtake.models.wan.conditioning import dit_inputs
from longtake.progress import Reporter
from longtake.training.batch import collate
from longtake.training.flow_matching import Draw, add_noise, generator_for
from longtake.training.model import TrainedModel, build_model, find_model
from longtake.training.samples import Sample
from longtake.training.validation import Validation

CPU = torch.device("cpu")
MODELS = ("tiny-t2v", "tiny-i2v")
KINDS = ("int8", "fp8", "nf4")
SIGMAS = (0.1, 0.5, 0.9)
LAYER = (5120, 13824)
"""`ffn.net.2` of the 14B models: [out, in]."""


@dataclass(frozen=True)
class Scene:
    """A model's held-out clips, encoded."""

    config: RunConfig
    held: list[Entry]
    validation: Validation


def scene(name: str, demo: RunConfig, folder: Path) -> Scene:
    """The demo's clips in the cache of the model `name`."""
    data = demo.data.model_copy(update={"cache": str(folder / name)})
    config = demo.model_copy(update={"model": ModelConfig(name=name, dtype="fp32"), "data": data})
    files = find_model(config, print)
    root = component_root(files.root, "model.components")
    manifest = prepare(config, files.variant.spec, root, CPU, Reporter(quiet=True), (0, 1))
    assert manifest is not None
    _, held = split(manifest.entries, data.validation, config.training.seed)
    reader = EntryReader(Cache(Path(data.cache)), manifest.empty_text)
    return Scene(config, held, Validation(config, held, reader, root, CPU))


def built(config: RunConfig, kind: str) -> TrainedModel:
    """As training has it before its first step: an adapter that changes nothing, on weights of `kind`."""
    memory = MemoryStrategy.model_validate({"gradient_checkpointing": "none", "quantization": kind})
    config = config.model_copy(update={"memory": memory})
    model = build_model(config, find_model(config, print), CPU)
    model.transformer.eval()
    return model


@torch.no_grad()
def velocities(model: TrainedModel, scene: Scene, sigma: float) -> Tensor:
    """[clips, channels, frames, height, width]."""
    found = []
    for entry in scene.held:
        tensors = scene.validation.reader.read(entry)
        noise = torch.randn(tensors.latents.shape, generator=generator_for(f"noise:{entry.latents}:{sigma}"))
        sample = Sample(Visit(entry, 0, 0), tensors, Draw(noise, sigma, drop_caption=False))
        batch = collate([sample], model.spec, scene.config.training, CPU)
        noisy = add_noise(batch.latents, batch.noise, batch.sigma)
        inputs = dit_inputs(model.spec, noisy, batch.sigma, batch.conditioning)
        found.append(model.transformer(**inputs, return_dict=False)[0])
    return torch.cat(found)


def matrices(model: TrainedModel) -> list[Tensor]:
    """Values of the blocks' frozen matrices."""
    layers = [module for module in model.transformer.blocks.modules() if isinstance(module, nn.Linear)]
    frozen = [layer.weight for layer in layers if not layer.weight.requires_grad]
    return [dequantized(w, torch.float32) if isinstance(w, QuantizedWeight) else w.detach() for w in frozen]


def error(found: Tensor, reference: Tensor) -> float:
    """Norm of the difference over norm."""
    return float((found - reference).norm() / reference.norm())


def rows(scene: Scene, name: str) -> None:
    """A line of the table for each kind."""
    plain = built(scene.config, "none")
    weights, loss = matrices(plain), scene.validation.loss([plain])
    moving = {sigma: velocities(plain, scene, sigma) for sigma in SIGMAS}
    print(f"| {name} | fp32 | 0 | " + " | ".join("0" for _ in SIGMAS) + f" | {loss:.5f} | |")
    for kind in KINDS:
        model = built(scene.config, kind)
        flat = [torch.cat([tensor.flatten() for tensor in found]) for found in (matrices(model), weights)]
        errors = [error(velocities(model, scene, sigma), moving[sigma]) for sigma in SIGMAS]
        changed = scene.validation.loss([model])
        shown = " | ".join(f"{100 * value:.2f} %" for value in (error(*flat), *errors))
        print(f"| {name} | {kind} | {shown} | {changed:.5f} | {100 * (changed / loss - 1):+.2f} % |", flush=True)


def layer_rows() -> None:
    """Bytes of a large layer, and the time to make it whole in bf16 on this machine."""
    weight = (torch.randn(LAYER, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    print(f"\n| {LAYER[0]}x{LAYER[1]} | bytes | MiB | bytes a weight | error | made whole in |")
    print("|---|--:|--:|--:|--:|--:|")
    print(f"| bf16 | {weight.nbytes} | {weight.nbytes / 2**20:.1f} | 2 | 0 | |")
    for kind in KINDS:
        quantised: Any = quantize(weight, kind)  # type: ignore[arg-type]
        nbytes = sum(inner.nbytes for inner in inner_tensors(quantised))
        started = time.perf_counter()
        whole = dequantized(quantised, torch.bfloat16)
        seconds = time.perf_counter() - started
        each = nbytes / weight.numel()
        wrong = 100 * error(whole.float(), weight.float())
        print(
            f"| {kind} | {nbytes} | {nbytes / 2**20:.1f} | {each:.4f} | {wrong:.2f} % | {seconds:.2f} s |", flush=True
        )


def main() -> None:
    """Prints both tables."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        demo = load_config(write_demo(folder, Reporter(quiet=True)))
        print("| model | weights | matrices | " + " | ".join(f"velocity, sigma {sigma}" for sigma in SIGMAS), end="")
        print(" | validation loss | change |\n|---|---|--:|" + "--:|" * (len(SIGMAS) + 2))
        for name in MODELS:
            rows(scene(name, demo, folder), name)
    layer_rows()
    print(f"\ntorch {torch.__version__}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
