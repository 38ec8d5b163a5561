"""Low-rank adapters: attached with peft, read and written in every format, reduced, merged into full weights."""

from longtake.lora.adapter import Adapter, trained_adapter
from longtake.lora.files import read_adapter, save_adapter
from longtake.lora.layers import adapter_state, attach, attach_adapter, load_adapter_state
from longtake.lora.merging import check_fits, check_shapes, merge, merged
from longtake.lora.reduction import Reduced, reduced
from longtake.lora.start import begin_from

__all__ = [
    "Adapter",
    "Reduced",
    "adapter_state",
    "attach",
    "attach_adapter",
    "begin_from",
    "check_fits",
    "check_shapes",
    "load_adapter_state",
    "merge",
    "merged",
    "read_adapter",
    "reduced",
    "save_adapter",
    "trained_adapter",
]
