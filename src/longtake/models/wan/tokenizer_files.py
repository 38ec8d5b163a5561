"""Where UMT5's tokenizer lies, and loading it: a folder, or SentencePiece's model, alone or in the encoder's file."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from longtake.errors import ModelError, Problem
from longtake.models.wan.component_files import Component
from longtake.models.wan.component_kinds import TOKENIZER
from longtake.models.wan.headers import TensorHeader, read_header
from longtake.models.wan.sentencepiece import build_tokenizer, parse_model

TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "spiece.model", "special_tokens_map.json")
"""Files of a tokenizer, which may lie beside others."""

_FOLDERS = ("tokenizer", "google/umt5-xxl", "umt5-xxl", ".")
_TOKENS: dict[str, Any] = {
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "model_max_length": 512,
    "model_input_names": ["input_ids", "attention_mask"],
    "clean_up_tokenization_spaces": False,
}


def find_tokenizer(root: Path, text_encoder: Component) -> Path | TensorHeader:
    """The folder of the tokenizer of `text_encoder` under `root`, or the tensor in the encoder's file that is it.

    Raises ModelError where there is neither.
    """
    if text_encoder.found is None:
        return _with_config(root / "tokenizer")
    embedded = read_header(text_encoder.path).get(TOKENIZER)
    if embedded is not None:
        return embedded
    places = [place / folder for place in (text_encoder.path.parent, root) for folder in _FOLDERS]
    for folder in places:
        if any((folder / name).is_file() for name in ("tokenizer.json", "spiece.model")):
            return folder
    what = f"there is no tokenizer (google/umt5-xxl, tokenizer, tokenizer.json or spiece.model) for {text_encoder.path}"
    remedy = "put the folder google/umt5-xxl of the original release there, or use ComfyUI's file, which has it within"
    raise ModelError(Problem(what, str(root), remedy, code="tokenizer-missing"))


def load_tokenizer(place: Path | TensorHeader) -> Any:
    """The tokenizer at a place that `find_tokenizer` gave; raises ModelError where it is damaged."""
    where = place if isinstance(place, Path) else place.file
    try:
        if isinstance(place, TensorHeader):
            return _of_sentencepiece(read_bytes(place))
        if (place / "tokenizer_config.json").is_file():
            return AutoTokenizer.from_pretrained(str(place), local_files_only=True, trust_remote_code=False)
        if (place / "tokenizer.json").is_file():
            return PreTrainedTokenizerFast(tokenizer_file=str(place / "tokenizer.json"), **_TOKENS)
        return _of_sentencepiece((place / "spiece.model").read_bytes())
    except Exception as error:
        what = f"the tokenizer cannot be loaded: {error}"
        raise ModelError(Problem(what, str(where), "download the component again", code="tokenizer-damaged")) from error


def read_bytes(header: TensorHeader) -> bytes:
    """A tensor's bytes."""
    with header.file.open("rb") as file:
        file.seek(header.start)
        return file.read(header.nbytes)


def _of_sentencepiece(model: bytes) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=build_tokenizer(parse_model(model)), **_TOKENS)


def _with_config(folder: Path) -> Path:
    if not (folder / "tokenizer_config.json").is_file():
        remedy = "give a diffusers folder, or one that has it in model.components"
        what = "there is no tokenizer (tokenizer_config.json)"
        raise ModelError(Problem(what, str(folder.parent), remedy, code="tokenizer-missing"))
    return folder
