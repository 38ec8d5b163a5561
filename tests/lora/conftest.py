"""Small random transformers, and adapters whose B is not zero, so that they change the output."""

from collections.abc import Callable

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from longtake.config.schema import LoraConfig
from longtake.lora import adapter_state, attach, load_adapter_state
from longtake.models.wan.variants import variant

Build = Callable[..., WanTransformer3DModel]


@pytest.fixture
def build() -> Build:
    """`build("tiny-t2v")` is that transformer with two blocks, always the same random weights, in evaluation mode."""

    def make(name: str, dtype: torch.dtype = torch.float32) -> WanTransformer3DModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            transformer = WanTransformer3DModel(**variant(name).transformer_config | {"num_layers": 2})
        return transformer.eval().to(dtype)

    return make


@pytest.fixture
def trained(build: Build) -> Callable[..., WanTransformer3DModel]:
    """A transformer with an adapter whose halves are both random, as after training."""

    def make(name: str, lora: LoraConfig) -> WanTransformer3DModel:
        transformer = build(name)
        attach(transformer, lora, seed=3)
        generator = torch.Generator().manual_seed(4)
        state = {
            key: torch.randn(value.shape, generator=generator) * 0.2
            for key, value in adapter_state(transformer).items()
        }
        load_adapter_state(transformer, state)
        return transformer

    return make


@pytest.fixture
def velocity() -> Callable[..., Tensor]:
    """The transformer's output for inputs that are always the same."""

    def run(transformer: WanTransformer3DModel, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
        config = transformer.config
        generator = torch.Generator().manual_seed(5)
        draw = lambda *shape: torch.randn(shape, generator=generator).to(dtype)  # noqa: E731
        image = draw(1, 17, config.image_dim) if config.image_dim else None
        with torch.set_grad_enabled(grad):
            return transformer(
                hidden_states=draw(1, config.in_channels, 2, 4, 4),
                timestep=torch.tensor([500.0]),
                encoder_hidden_states=draw(1, 512, config.text_dim),
                encoder_hidden_states_image=image,
            ).sample

    return run
