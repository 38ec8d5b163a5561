"""Memory strategies: losses and gradients to the bit, what is moved, and what is left behind: nothing."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from longtake.config.schema import LoraConfig, MemoryStrategy, ModelConfig
from longtake.errors import ConfigError, RunError
from longtake.lora import attach
from longtake.memory.strategy import apply
from longtake.models.wan.conditioning import Conditioning, dit_inputs
from longtake.models.wan.tiny import bundled
from longtake.models.wan.variants import variant
from longtake.models.wan.weights import load_transformer, locate

BLOCKS, DIM = 4, 160
PLAIN = MemoryStrategy(gradient_checkpointing="none")
STRATEGIES = {
    "block": MemoryStrategy(),
    "host": MemoryStrategy(activation_offload="host"),
    "half on the host": MemoryStrategy(activation_offload="host", activation_offload_fraction=0.5),
    "disk": MemoryStrategy(activation_offload="disk"),
    "half on disk": MemoryStrategy(activation_offload="disk", activation_offload_fraction=0.5),
}
MODELS = ("tiny-t2v", "tiny-i2v", "tiny-flf2v", "tiny-ti2v")
Load = Callable[[str, bool], Any]


@pytest.fixture(scope="module")
def load(tiny_root: Callable[[str], Path]) -> Load:
    """A tiny transformer to train: whole, or through a LoRA that is not the identity."""
    built: dict[tuple[str, bool], Any] = {}

    def of(name: str, lora: bool) -> Any:
        if (name, lora) not in built:
            files = locate(ModelConfig(path=str(tiny_root(name)), name=name), bundled, print)
            model = load_transformer(files, "transformer", torch.float32, torch.device("cpu"))
            model.requires_grad_(True)
            if lora:
                attach(model, LoraConfig(rank=2, dropout=0.2), 0)
                for key, parameter in model.named_parameters():
                    if "lora_B" in key:
                        nn.init.normal_(parameter, std=0.05)
            built[name, lora] = model.train()
        return built[name, lora]

    return of


def inputs(name: str) -> dict[str, Tensor]:
    """Two samples for the model, the same at every call."""
    spec = variant(name).spec
    torch.manual_seed(5)
    noisy = torch.randn(2, spec.latent_channels, 3, 4, 4)
    conditioning = Conditioning(
        prompt_embeds=torch.randn(2, 512, spec.text_dim),
        image_embeds=torch.randn(2, spec.image_tokens, spec.image_dim) if spec.image_tokens else None,
        condition=torch.randn(2, 20, 3, 4, 4) if spec.task in ("i2v", "flf2v") else None,
        first_latents=torch.randn(2, spec.latent_channels, 1, 4, 4) if spec.task == "ti2v" else None,
    )
    return dit_inputs(spec, noisy, torch.tensor([0.3, 0.8]), conditioning)


def step(model: Any, name: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one step."""
    model.zero_grad()
    given = inputs(name)
    torch.manual_seed(9)  # dropout
    loss = model(**given, return_dict=False)[0].square().mean()
    loss.backward()
    return loss.detach(), {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_the_plain_model_to_the_bit(
    load: Load, tmp_path: Path, name: str, lora: bool
) -> None:
    model, spec = load(name, lora), variant(name).spec
    with apply(model, spec, PLAIN, tmp_path):
        loss, gradients = step(model, name)
    assert len(gradients) == sum(parameter.requires_grad for parameter in model.parameters())
    assert all(gradient.any() for key, gradient in gradients.items() if "lora" in key)
    for label, strategy in STRATEGIES.items():
        with apply(model, spec, strategy, tmp_path):
            other_loss, other_gradients = step(model, name)
        assert torch.equal(other_loss, loss), label
        assert other_gradients.keys() == gradients.keys()
        different = [key for key, gradient in gradients.items() if not torch.equal(other_gradients[key], gradient)]
        assert not different, label


@pytest.mark.parametrize(("fraction", "moved"), [(1.0, 4), (0.5, 2), (0.25, 1), (0.0, 0)])
def test_the_early_blocks_hidden_states_are_moved_and_nothing_else(
    load: Load, tmp_path: Path, fraction: float, moved: int
) -> None:
    model, given = load("tiny-i2v", True), inputs("tiny-i2v")
    strategy = MemoryStrategy(activation_offload="disk", activation_offload_fraction=fraction)
    hidden_bytes = 2 * 3 * 2 * 2 * DIM * 4
    with apply(model, variant("tiny-i2v").spec, strategy, tmp_path):
        loss = model(**given, return_dict=False)[0].square().mean()
        assert [file.stat().st_size for file in tmp_path.rglob("*.bin")] == [hidden_bytes] * moved
        loss.backward()
        assert not [*tmp_path.rglob("*.bin")], "a file goes when its backward pass is over"


def test_the_strategy_is_gone_afterwards_even_after_a_failure(load: Load, tmp_path: Path) -> None:
    model, spec = load("tiny-t2v", True), variant("tiny-t2v").spec
    scratch = tmp_path / "scratch"

    def fail_inside() -> None:
        with apply(model, spec, STRATEGIES["disk"], scratch):
            model(**inputs("tiny-t2v"))
            assert model.is_gradient_checkpointing
            assert scratch.is_dir()
            raise ValueError

    with pytest.raises(ValueError):
        fail_inside()
    assert not scratch.exists()
    assert not model.is_gradient_checkpointing


def test_what_a_killed_run_left_is_removed_at_the_next_start(load: Load, tmp_path: Path) -> None:
    killed = (
        "import os, signal, sys, torch; from pathlib import Path\n"
        "from longtake.memory.activation_offload import activation_offload\n"
        "with activation_offload(Path(sys.argv[1])) as offload:\n"
        "    hidden = torch.ones(8, requires_grad=True)\n"
        "    with offload(hidden): kept = hidden.square()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run([sys.executable, "-c", killed, str(tmp_path)], env=os.environ, check=False)
    assert ended.returncode == -9
    assert len([*tmp_path.rglob("*.bin")]) == 1
    with apply(load("tiny-t2v", True), variant("tiny-t2v").spec, STRATEGIES["disk"], tmp_path):
        assert not [*tmp_path.rglob("*.bin")]
        assert len([*tmp_path.iterdir()]) == 1


def test_two_runs_in_one_scratch_folder_leave_each_other_theirs(load: Load, tmp_path: Path) -> None:
    other = tmp_path / "notes.txt"
    other.write_text("not ours")
    with apply(load("tiny-t2v", True), variant("tiny-t2v").spec, STRATEGIES["disk"], tmp_path):
        pass
    assert [*tmp_path.iterdir()] == [other]


def test_a_refusing_disk_is_an_error_that_says_so(load: Load, tmp_path: Path) -> None:
    model = load("tiny-t2v", True)
    with apply(model, variant("tiny-t2v").spec, STRATEGIES["disk"], tmp_path):
        (store,) = tmp_path.iterdir()
        store.rmdir()
        with pytest.raises(RunError, match="cannot offload 15360 bytes of activations"):
            model(**inputs("tiny-t2v"))


def test_checkpointing_keeps_a_fraction_of_what_the_plain_model_keeps(load: Load, tmp_path: Path) -> None:
    model, spec = load("tiny-t2v", False), variant("tiny-t2v").spec
    kept = {}
    for label, strategy in {"none": PLAIN, "block": STRATEGIES["block"]}.items():
        with apply(model, spec, strategy, tmp_path), _counting(model) as count:
            model(**inputs("tiny-t2v"), return_dict=False)[0].square().mean()
        kept[label] = count["bytes"]
    assert kept["block"] < kept["none"] / 4


@contextmanager
def _counting(model: nn.Module) -> Iterator[dict[str, int]]:
    """Bytes that autograd keeps for backward, weights left out and each storage counted once."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held: dict[int, Tensor] = {}  # kept alive, so that no address comes twice
    count = {"bytes": 0}

    def pack(tensor: Tensor) -> Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in weights and pointer not in held:
            held[pointer] = tensor.detach()
            count["bytes"] += tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield count


def test_what_cannot_work_is_refused(load: Load, tmp_path: Path) -> None:
    strategy = MemoryStrategy(gradient_checkpointing="none", activation_offload="disk")
    with (
        pytest.raises(ConfigError, match=r"memory\.activation_offload"),
        apply(load("tiny-t2v", True), variant("tiny-t2v").spec, strategy, tmp_path / "scratch"),
    ):
        pytest.fail("it was applied")
    assert not (tmp_path / "scratch").exists()
