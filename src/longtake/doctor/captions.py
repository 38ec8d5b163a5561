"""How long captions are: by the model's tokenizer where it is on this machine, else by their size."""

from pathlib import Path
from typing import Any

from longtake.config.schema import ModelConfig
from longtake.errors import ModelError

BYTES_A_TOKEN = 4
"""About what UMT5 makes of text, in English as in Chinese, where a character has three bytes of UTF-8."""


class CaptionLengths:
    """Tokens of captions of up to `limit`; the tokenizer is loaded for the first that might be too long."""

    def __init__(self, model: ModelConfig, limit: int) -> None:
        self.model = model
        self.limit = limit
        self._tokenizer: Any = None
        self._looked = False

    def excess(self, caption: str) -> str:
        """What there is to say of a caption that is too long, of which the end is cut; else empty."""
        nbytes = len(caption.encode("utf-8", "replace"))
        if nbytes + 2 <= self.limit:  # a token has a byte at least, and one each is for the beginning and the end
            return ""
        tokenizer = self._load()
        count = nbytes // BYTES_A_TOKEN if tokenizer is None else len(tokenizer(" ".join(caption.split())).input_ids)
        if count <= self.limit:
            return ""
        length = f"{count} tokens" if tokenizer is not None else f"{len(caption)} characters, about {count} tokens"
        return f"the caption has {length}: what goes beyond {self.limit} is cut"

    def _load(self) -> Any:
        if not self._looked:
            self._looked = True
            self._tokenizer = _tokenizer(self.model)
        return self._tokenizer


def _tokenizer(model: ModelConfig) -> Any:
    """The tokenizer in the folder of the model or its components; None where there is none here."""
    given = [Path(text).expanduser() for text in (model.components, model.path) if text]
    roots = [path for path in given if path.exists()]
    if not roots:
        return None
    from longtake.models.libraries import quiet_libraries

    quiet_libraries()
    from longtake.models.wan.component_files import locate_component, surrounding_components
    from longtake.models.wan.tokenizer_files import find_tokenizer, load_tokenizer

    root = roots[0] if model.components else surrounding_components(roots[0], [])
    try:
        return None if root is None else load_tokenizer(find_tokenizer(root, locate_component(root, "text_encoder")))
    except ModelError:
        return None  # prepare says what is wrong with it; here lengths are told without
