"""What the model libraries say of their own accord, kept off the terminal of someone who runs a command."""

from diffusers.utils import logging as diffusers_logging
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars
from transformers.utils import logging as transformers_logging


def quiet_libraries() -> None:
    """For the whole process: no bars and no advice from diffusers and transformers; downloads keep their bars.

    Call it before the modules that use the two are imported: some of the advice is given on import.
    """
    silenced = are_progress_bars_disabled()
    for logging in (transformers_logging, diffusers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    if not silenced:  # transformers has switched off those of downloads, too
        enable_progress_bars()
