"""Mixed precision: autocast around the forward pass, with the modules that must stay fp32 kept out of it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from longtake.config.schema import Precision
from longtake.models.spec import ModelSpec

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@contextmanager
def compute_in(
    transformer: nn.Module, spec: ModelSpec, precision: Precision, device: torch.device, keep_casts: bool = True
) -> Iterator[None]:
    """Inside the context `transformer` computes in `precision`, fp32 islands excepted; nothing around it does.

    The backward pass belongs inside too: checkpointing computes blocks again there, which must save the same types.
    `spec.keep_fp32` names the islands: without them autocast would embed timesteps in bf16, which tells 294 of 1000
    apart. So are RMS norms whose weight is in the compute type: since torch 2.12 autocast on CUDA casts them to fp32
    (pytorch/pytorch#188955), which costs 2.5 GiB in a 14B model's block at 51,480 tokens; their sums are fp32 anyway.
    peft's cast of a LoRA's input to fp32 is switched off, because autocast takes it back at once. Autocast keeps what
    it has cast of fp32 weights until the forward pass ends, unless `keep_casts` is false: of weights that an engine
    gathers block by block it would keep the whole model.
    """
    if precision == "fp32":
        yield
        return
    dtype = DTYPES[precision]
    kept = [module for name, module in transformer.named_modules() if name.split(".")[-1] in spec.keep_fp32]
    norms = [module for module in transformer.modules() if isinstance(module, nn.RMSNorm)]
    islands = [*kept, *(norm for norm in norms if norm.weight is not None and norm.weight.dtype == dtype)]
    casting = [module for module in transformer.modules() if getattr(module, "cast_input_dtype_enabled", False)]
    for module in islands:
        module.forward = _under(module.forward, torch.autocast(device.type, enabled=False))
    for module in casting:
        module.cast_input_dtype_enabled = False  # type: ignore[assignment]  # an attribute of peft's layers
    transformer.forward = _under(transformer.forward, torch.autocast(device.type, dtype, cache_enabled=keep_casts))
    try:
        yield
    finally:
        for module in (transformer, *islands):
            del module.forward
        for module in casting:
            module.cast_input_dtype_enabled = True  # type: ignore[assignment]


def _under(forward: Callable[..., Any], autocast: torch.autocast) -> Callable[..., Any]:
    def run(*arguments: Any, **keywords: Any) -> Any:
        with autocast:
            return forward(*arguments, **keywords)

    return run
