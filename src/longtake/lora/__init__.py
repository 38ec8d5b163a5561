"""Low-rank adapters: attached with peft, read and written in every format, merged into full weights."""

from longtake.lora.files import Adapter, read_adapter, save_adapter
from longtake.lora.layers import adapter_state, attach, attach_adapter, load_adapter_state
from longtake.lora.merging import check_fits, merge

__all__ = [
    "Adapter",
    "adapter_state",
    "attach",
    "attach_adapter",
    "check_fits",
    "load_adapter_state",
    "merge",
    "read_adapter",
    "save_adapter",
]
