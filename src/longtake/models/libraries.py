"""What the model libraries say of their own accord, kept off the terminal of someone who runs a command."""

import logging
import os

import torch
from diffusers.utils import logging as diffusers_logging
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars
from transformers.utils import logging as transformers_logging


def quiet_libraries() -> None:
    """For the whole process: no bars and no advice from diffusers and transformers; downloads keep their bars.

    Call it before the modules that use the two are imported: some of the advice is given on import. Both import
    torchao where it is installed, which warns of kernels that are not for this machine.
    """
    if not torch.cuda.is_available():  # else DeepSpeed, which transformers imports where it is installed, warns of it
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    silenced = are_progress_bars_disabled()
    for library in (transformers_logging, diffusers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    if not silenced:  # transformers has switched off those of downloads, too
        enable_progress_bars()
