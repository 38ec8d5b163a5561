"""DeepSpeed's ZeRO stages 1, 2 and 3: optimiser states, gradients and weights shared out, as its own engine does it."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from longtake.config.schema import ParallelConfig
from longtake.distributed.backend import Held, Named
from longtake.distributed.loss_scale import LossScale
from longtake.distributed.pieces import Piece, Read, flat
from longtake.distributed.ranks import Ranks, connect_alone

BUCKET_VALUES = 2**24
"""Of gradients that are reduced at once; DeepSpeed's own 5e8 take 2 GB, or 4."""


class ZeRO:
    """One engine of DeepSpeed. Precision is not its affair: weights keep their types, and autocast is the trainer's.

    Its gradient clipping and loss scaling are driven from here, so that a step is the same under every engine: the norm
    is taken before the step, and what gradients are to be multiplied by is given to it as a loss scale of its own.
    """

    waits = True

    def __init__(
        self,
        transformer: Any,
        parameters: Named,
        optimizer_of: Callable[[Named], torch.optim.Optimizer],
        parallel: ParallelConfig,
        ranks: Ranks,
        fp16: bool,
    ) -> None:
        deepspeed = library()
        self.stage = int(parallel.strategy[-1])
        self.parameters = dict(parameters)
        self.optimizer = optimizer_of(parameters)
        engine, *_ = deepspeed.initialize(
            model=transformer,
            optimizer=self.optimizer,
            config=settings(parallel, transformer, self.parameters),
            dist_init_required=False,
        )
        assert engine.zero_optimization_stage() == self.stage
        assert engine.dp_world_size == ranks.world
        self.module = engine
        self.zero = engine.optimizer
        self.scale = LossScale(fp16, ranks.world)
        self.ranks = ranks
        self.factor = 1.0
        if parallel.offload == "none":
            self._share_memory()
        if self.stage == 3:
            _tell_of_adapters(deepspeed, transformer)

    def begin(self, last: bool) -> None:
        """Stages 2 and 3 reduce gradients in every micro-batch, stage 1 in the last."""
        self.module.set_gradient_accumulation_boundary(last)

    def backward(self, loss: Tensor) -> None:
        """DeepSpeed averages over the ranks what has to be summed up."""
        self.module.backward(loss * self.scale.value, scale_wrt_gas=False)

    def clip(self, clip_norm: float) -> float:
        """The norm is that of all parts; clipping itself is left to the step."""
        norm = self._norm() * self.scale.inverse
        self.factor = self.scale.inverse
        if 0 < clip_norm < norm + 1e-6:
            self.factor *= clip_norm / (norm + 1e-6)
        return norm

    def step(self, skip: bool) -> None:
        """Each rank updates its part; with `skip` DeepSpeed drops the gradients as after an overflow."""
        with _scaled(self.zero, 1 / self.factor), _overflowing(self.zero, self.stage) if skip else nullcontext():
            self.module.step()

    @contextmanager
    def tensors(self, write: bool = False) -> Iterator[Held]:
        """This rank's part of fp32 weights and states; weights that are computed with follow what is written."""
        held: Held = {"trained": [], "optimizer": []}
        for name, shape, start, partition, place in self._stretches():
            length = place.stop - place.start
            held["trained"].append(Piece(name, shape, start, partition.detach()[place]))
            for key, state in self.zero.optimizer.state.get(partition, {}).items():
                if state.ndim == 0:
                    held["optimizer"].append(Piece(f"{name}/{key}", (), 0, state.view(1), saved=start == 0))
                else:
                    assert state.numel() == partition.numel() >= length
                    held["optimizer"].append(Piece(f"{name}/{key}", shape, start, state.detach().view(-1)[place]))
        yield held
        if write:
            self._follow()

    def _share_memory(self) -> None:
        """Lets what DeepSpeed updates be the weights' own memory, which is fp32 already, in place of a copy of it.

        It means to for stage 3, but compares a device with its name (`_create_fp32_partitions`, stage3.py).
        """
        zero, rank = self.zero, self.ranks.rank
        if self.stage == 3:
            updated, weights = zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups_flat
        else:
            updated = zero.single_partition_of_fp32_groups
            weights = [parts[rank] for parts in zero.parallel_partitioned_bit16_groups]
        for copy, own in zip(updated, weights, strict=True):
            assert copy.dtype == own.dtype == torch.float32
            copy.data = own.data

    def _norm(self) -> float:
        if self.stage < 3:
            found = self.zero.scaled_global_norm()
        else:
            from deepspeed.runtime.utils import combine_grad_norm_groups

            found = combine_grad_norm_groups(self.zero._get_norm_groups())
        norm = float(found)
        return norm if norm >= 0 else float("inf")  # it writes -1 for what is not finite

    def _stretches(self) -> Iterator[tuple[str, tuple[int, ...], int, Tensor, slice]]:
        """(parameter, its shape, first value, flat fp32 tensor of this rank, where in it) of all that this rank has."""
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        return self._of_stage_3(names) if self.stage == 3 else self._of_stages_1_and_2(names)

    def _of_stages_1_and_2(self, names: dict[int, str]) -> Iterator[tuple[str, tuple[int, ...], int, Tensor, slice]]:
        """Parameters of a group lie in a row, of which each rank has an equal part."""
        zero, rank = self.zero, self.ranks.rank
        for group, partition in enumerate(zero.single_partition_of_fp32_groups):
            row = zero.bit16_groups_flat[group]
            begin = rank * partition.numel()
            for parameter in zero.bit16_groups[group]:
                first = (parameter.data_ptr() - row.data_ptr()) // row.element_size()
                start = max(0, begin - first)
                stop = min(parameter.numel(), begin + partition.numel() - first)
                if start < stop:
                    place = slice(first + start - begin, first + stop - begin)
                    yield names[id(parameter)], tuple(parameter.shape), start, partition, place

    def _of_stage_3(self, names: dict[int, str]) -> Iterator[tuple[str, tuple[int, ...], int, Tensor, slice]]:
        """Each parameter's values are in equal parts, the last of which is padded."""
        zero, rank = self.zero, self.ranks.rank
        for group, partition in enumerate(zero.fp32_partitioned_groups_flat):
            offset = 0
            for parameter in zero.fp16_groups[group]:
                size = parameter.partition_numel()
                start, stop = rank * size, min((rank + 1) * size, parameter.ds_numel)
                if start < stop:
                    place = slice(offset, offset + stop - start)
                    yield names[id(parameter)], tuple(parameter.ds_shape), start, partition, place
                offset += size

    @torch.no_grad()
    def _follow(self) -> None:
        """Weights that are computed with become those of the parts."""
        if self.stage < 3:
            self.zero.update_lp_params()
            return
        for group in range(len(self.zero.fp16_groups)):
            self.zero._reassign_or_swap_out_partitioned_parameters(group)
        if persistent := self.zero.persistent_parameters:
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)


def library() -> Any:
    """DeepSpeed, imported so that it compiles nothing and says nothing, over the ranks that have met."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")  # it asks no further where a process is alone
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # of what it calls and imports
    warnings.filterwarnings("ignore", "`torch.distributed.* is deprecated", FutureWarning)
    warnings.filterwarnings("ignore", "`torch.jit.* is deprecated", DeprecationWarning)
    import deepspeed

    # else a module for shared memory is built at the first collective, for two minutes and with a compiler
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # importing it has set another
    connect_alone()
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_init_required=False, verbose=False)
    return deepspeed


def settings(parallel: ParallelConfig, transformer: Any, parameters: Named) -> dict[str, Any]:
    """DeepSpeed's config. Batch sizes are not its affair either: the trainer says which micro-batch is the last."""
    stage = int(parallel.strategy[-1])
    cuda = torch.cuda.is_available()
    sizes = [getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters.values()]
    zero: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        "overlap_comm": cuda,
        "reduce_bucket_size": max(1, min(max(BUCKET_VALUES, *sizes), sum(sizes))),
        "allgather_bucket_size": max(1, min(max(BUCKET_VALUES, *sizes), sum(sizes))),
    }
    host = {"device": "cpu", "pin_memory": cuda}
    if parallel.offload != "none":
        zero["offload_optimizer"] = host
    if stage == 3:
        block = _block_values(transformer)
        zero |= {"stage3_prefetch_bucket_size": block, "stage3_max_reuse_distance": 1}
        # each layer gathers so much ahead of it: without a limit, 1e9 values are soon there
        zero["stage3_max_live_parameters"] = 2 * block
        # weights gathered together are copied out of one buffer, which stays until the last of them is used
        zero["stage3_allgather_sequential"] = True
        zero["memory_efficient_linear"] = False  # it would replace torch's for good
        if parallel.offload == "parameters":
            zero["offload_param"] = host
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # any of torch's is
        "zero_force_ds_cpu_optimizer": False,  # it would be compiled first; torch's AdamW has a kernel for the host too
        "steps_per_print": 2**31,
    }


def partition(module: nn.Module, prefix: str, parallel: ParallelConfig, ranks: Ranks, read: Read) -> None:
    """Leaves each rank its part of the weights of `module`, whose names begin with `prefix`; those that have one stay.

    Values are the first rank's, which reads what is on `meta`: the others are sent theirs, weight by weight.
    """
    from deepspeed import zero

    missing: dict[str, tuple[int, Tensor]] = {}
    for name, owner, key, weight in [*_on_meta(module)]:
        real = torch.empty(weight.shape, dtype=weight.dtype)
        owner._parameters[key] = nn.Parameter(real, requires_grad=weight.requires_grad)
        missing[prefix + name] = (0, flat(real))
    if ranks.is_first:
        read(missing)
    config = settings(parallel, module, dict(module.named_parameters()))
    place = "cpu" if parallel.offload == "parameters" else None
    zero.Init(module, config_dict_or_path=config, remote_device=place, mem_efficient_linear=False)


def _tell_of_adapters(deepspeed: Any, transformer: Any) -> None:
    """Says that peft's layers look at a weight of a layer inside, for its type, and a DoRA's lengths at all of them.

    DeepSpeed finds out where the weight is not there then, and its order of gathering is no longer the recorded one.
    """
    for module in transformer.modules():
        for adapter in getattr(module, "lora_A", {}).values():
            deepspeed.zero.register_external_parameter(module, adapter.weight)
        for name, lengths in getattr(module, "lora_magnitude_vector", {}).items():
            for layer in (module.base_layer, module.lora_A[name], module.lora_B[name]):
                for weight in layer.parameters():
                    deepspeed.zero.register_external_parameter(lengths, weight)


def _on_meta(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    for path, owner in module.named_modules():
        for key, weight in owner.named_parameters(recurse=False):
            if weight.is_meta:
                yield f"{path}.{key}" if path else key, owner, key, weight


def _block_values(transformer: Any) -> int:
    """Values of the weights of a block, so that the next one is gathered beside the one that is computed."""
    lists = [module for module in transformer.modules() if isinstance(module, nn.ModuleList) and len(module)]
    return max((_values(each) // len(each) for each in lists), default=BUCKET_VALUES)


def _values(module: nn.Module) -> int:
    return sum(getattr(weight, "ds_numel", weight.numel()) for weight in module.parameters())


@contextmanager
def _scaled(zero: Any, scale: float) -> Iterator[None]:
    """Inside the context the step divides gradients by `scale`."""
    before = zero.custom_loss_scaler, zero.external_loss_scale
    zero.custom_loss_scaler, zero.external_loss_scale = True, scale
    try:
        yield
    finally:
        zero.custom_loss_scaler, zero.external_loss_scale = before


@contextmanager
def _overflowing(zero: Any, stage: int) -> Iterator[None]:
    """Inside the context the norm is not finite."""
    invalid = torch.tensor(-1.0)
    name = "scaled_global_norm" if stage < 3 else "_get_norm_groups"
    setattr(zero, name, lambda *_: invalid if stage < 3 else [invalid])
    try:
        yield
    finally:
        delattr(zero, name)
