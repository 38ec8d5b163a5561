"""Steps of tiny transformers, for tests that compare one with another: models, inputs, losses and gradients."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from longtake.config.schema import LoraConfig, ModelConfig
from longtake.lora import attach
from longtake.models.wan.conditioning import Conditioning, dit_inputs
from longtake.models.wan.tiny import bundled
from longtake.models.wan.variants import variant
from longtake.models.wan.weights import load_transformer, locate

MODELS = ("tiny-t2v", "tiny-i2v", "tiny-flf2v", "tiny-ti2v")
TOKENS = 12
CPU = torch.device("cpu")
Gradients = dict[str, Tensor]
Load = Callable[[str, bool], Any]
Loaded = Callable[[str, LoraConfig | None], Any]


def load(root: Path, name: str, lora: LoraConfig | None, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny transformer to train: whole, or through a LoRA that is not the identity."""
    files = locate(ModelConfig(path=str(root), name=name), bundled, print)
    model = load_transformer(files, "transformer", dtype, CPU)
    model.requires_grad_(True)
    if lora is not None:
        attach(model, lora, 0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            for key, parameter in model.named_parameters():
                if "lora_B" in key:
                    nn.init.normal_(parameter, std=0.05)
    return model.train()


def loaded_once(tiny_root: Callable[[str], Path]) -> Loaded:
    """Makes `of(name, lora)`, which loads each model once, under an adapter or whole."""
    built: dict[tuple[str, LoraConfig | None], Any] = {}

    def of(name: str, lora: LoraConfig | None) -> Any:
        if (name, lora) not in built:
            built[name, lora] = load(tiny_root(name), name, lora)
        return built[name, lora]

    return of


def loader(tiny_root: Callable[[str], Path]) -> Load:
    """Makes `of(name, lora)`, which loads each model once, under a LoRA of rank 2 or whole."""
    once = loaded_once(tiny_root)
    return lambda name, lora: once(name, LoraConfig(rank=2) if lora else None)


def inputs(name: str, seed: int = 5) -> dict[str, Tensor]:
    """Two samples for the model, the same at every call; the global random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _inputs(name)


def _inputs(name: str) -> dict[str, Tensor]:
    spec = variant(name).spec
    noisy = torch.randn(2, spec.latent_channels, 3, 4, 4)
    conditioning = Conditioning(
        prompt_embeds=torch.randn(2, 512, spec.text_dim),
        image_embeds=torch.randn(2, spec.image_tokens, spec.image_dim) if spec.image_tokens else None,
        condition=torch.randn(2, 20, 3, 4, 4) if spec.task in ("i2v", "flf2v") else None,
        first_latents=torch.randn(2, spec.latent_channels, 1, 4, 4) if spec.task == "ti2v" else None,
    )
    return dit_inputs(spec, noisy, torch.tensor([0.3, 0.8]), conditioning)


def loss_of(model: Any, name: str, seed: int = 5) -> Tensor:
    """Loss of the two samples of `seed`; dropout is drawn the same at every call."""
    given = inputs(name, seed)
    torch.manual_seed(seed)
    return model(**given, return_dict=False)[0].float().square().mean()  # type: ignore[no-any-return]


def gradients_of(model: Any, backward: Callable[[], object]) -> Gradients:
    """What `backward` adds to the gradients of the trained parameters."""
    model.zero_grad()
    backward()
    return {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}


def step(model: Any, name: str, seeds: tuple[int, ...] = (5,)) -> tuple[Tensor, Gradients]:
    """Losses and summed gradients of a micro-batch for each seed."""
    losses = []

    def backward() -> None:
        for seed in seeds:
            loss = loss_of(model, name, seed)
            loss.backward()
            losses.append(loss.detach())

    gradients = gradients_of(model, backward)
    return torch.stack(losses), gradients


def accumulated(model: Any, name: str) -> tuple[Tensor, Gradients]:
    """A step of two micro-batches."""
    return step(model, name, (5, 6))


def different(found: Gradients, expected: Gradients) -> list[str]:
    """Names of the gradients that differ in a bit, or are in one alone."""
    lacking = found.keys() ^ expected.keys()
    return [*lacking, *(key for key in found.keys() & expected.keys() if not torch.equal(found[key], expected[key]))]


def farthest(found: Gradients, expected: Gradients) -> float:
    """The greatest norm of a difference, relative to the tensor's norm."""
    assert found.keys() == expected.keys()
    return max(float((found[key] - value).norm() / value.norm()) for key, value in expected.items())


def assert_equal(found: tuple[Tensor, Gradients], plain: tuple[Tensor, Gradients], bound: float, label: str) -> None:
    """Equal to the bit, or for a `bound` above 0 as near as that, relative to each tensor's norm."""
    if bound:
        assert farthest(*({"loss": loss, **gradients} for loss, gradients in (found, plain))) <= bound, label
    else:
        assert torch.equal(found[0], plain[0]), label
        assert not different(found[1], plain[1]), label


@contextmanager
def dropout(model: Any, share: float) -> Iterator[None]:
    """Adapters with dropout inside the context."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer.lora_dropout["default"] = nn.Dropout(share)
    try:
        yield
    finally:
        for layer in layers:
            layer.lora_dropout["default"] = nn.Identity()
