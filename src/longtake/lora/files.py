"""LoRA files: written so that a name never holds half a file, read in whatever format they are."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from math import isfinite
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from longtake import __version__
from longtake.config.schema import LoraFormat
from longtake.errors import ModelError, Problem, RunError
from longtake.files import write_file
from longtake.lora.adapter import MAGNITUDE, Adapter
from longtake.lora.formats import Entry, looks_like_lora, named, parse
from longtake.lora.peft_metadata import adapter_metadata
from longtake.models.wan.peft_alphas import metadata_alphas


def save_adapter(path: Path, adapter: Adapter, format: LoraFormat) -> None:
    """Writes `adapter` in `format`, with ranks, alphas and its metadata in the header; equal inputs, equal bytes.

    `path` is replaced only by a file that was synced, opened again and found to hold the same finite tensors. Raises
    RunError where it cannot be written, or a weight is not finite.
    """
    tensors = {key: tensor.detach().contiguous() for key, tensor in named(adapter, format).items()}
    content = _serialised(tensors, _header(adapter, format) | adapter.metadata)
    write_file(path, lambda staged: _write_checked(staged, content, tensors, path), len(content))


def read_adapter(path: Path) -> Adapter:
    """The LoRA in `path`, whose format is told by its keys, in our own names.

    Without alpha a layer's scale is 1. Raises ModelError for a file that is damaged, no LoRA, or the LoRA of another
    model.
    """
    if not path.is_file():
        raise ModelError(Problem("there is no such file", str(path), code="lora-file-missing"))
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            entries = _entries(list(file.keys()), path)
            tensors = {entry: file.get_tensor(key) for key, entry in entries.items()}
            metadata = {key: value for key, value in (file.metadata() or {}).items() if key != "format"}
    except (SafetensorError, OSError) as error:
        if _is_another_kind(path):
            what = "this is not a safetensors file"
            raise ModelError(Problem(what, str(path), code="weights-not-safetensors")) from error
        remedy = "download or export it again"
        what = f"the safetensors file is damaged ({error})"
        raise ModelError(Problem(what, str(path), remedy, code="lora-file-damaged")) from error
    return _adapter(tensors, metadata, path)


def _is_another_kind(path: Path) -> bool:
    """Whether a file has no brace where the header of a safetensors file begins; one cut off before it is damaged."""
    with path.open("rb") as file:
        return file.read(9)[8:] not in (b"{", b"")


def _entries(keys: list[str], path: Path) -> dict[str, Entry]:
    parsed = {key: parse(key) for key in keys}
    entries = {key: entry for key, entry in parsed.items() if entry is not None}
    if not looks_like_lora(keys):
        what = "this is no LoRA"
        raise ModelError(Problem(what, str(path), "its tensors have none of a LoRA's names", code="lora-not-a-lora"))
    if not any(entry.module.startswith("blocks.") for entry in entries.values()):
        what = "this is a LoRA of another model"
        raise ModelError(Problem(what, str(path), f"its first layer is {min(keys)}", code="lora-of-another-model"))
    if unknown := sorted(parsed.keys() - entries.keys()):
        what = f"{len(unknown)} of {len(keys)} tensors are no plain LoRA of this model, first {unknown[0]}"
        remedy = "use a LoRA without LoKr, LoHa or full differences"
        raise ModelError(Problem(what, str(path), remedy, code="lora-kind-unsupported"))
    if len(set(entries.values())) < len(entries):
        what = "more than one LoRA is in the file"
        raise ModelError(Problem(what, str(path), "keep one adapter a file", code="lora-several-adapters"))
    return entries


def _adapter(tensors: Mapping[Entry, Tensor], metadata: dict[str, str], path: Path) -> Adapter:
    modules = tuple(dict.fromkeys(entry.module for entry in sorted(tensors, key=lambda entry: entry.module)))
    state: dict[str, Tensor] = {}
    ranks = {}
    for module in modules:
        down, up, lengths = (tensors.get(Entry(module, part)) for part in ("lora_A", "lora_B", MAGNITUDE))
        where = f"{path}: {module}"
        down, up = _pair(down, up, where)
        ranks[module] = down.shape[0]
        state |= {f"{module}.lora_A.weight": down.float(), f"{module}.lora_B.weight": up.float()}
        if lengths is not None:
            state[f"{module}.{MAGNITUDE}.weight"] = _lengths(lengths, up.shape[0], where)
    return Adapter(state, _alphas(tensors, metadata, ranks, path), metadata)


def _pair(down: Tensor | None, up: Tensor | None, where: str) -> tuple[Tensor, Tensor]:
    remedy = "download or export it again"
    if down is None or up is None:
        what = "only one half of the layer's LoRA is in the file"
        raise ModelError(Problem(what, where, remedy, code="lora-half-missing"))
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1] or not down.numel() or not up.numel():
        what = f"the halves' shapes {list(down.shape)} and {list(up.shape)} do not go together"
        raise ModelError(Problem(what, where, remedy, code="lora-halves-differ"))
    if not (down.isfinite().all() and up.isfinite().all()):
        raise ModelError(Problem("the LoRA holds values that are not finite", where, remedy, code="lora-not-finite"))
    return down, up


def _lengths(tensor: Tensor, rows: int, where: str) -> Tensor:
    """A DoRA's lengths [out], whether they are [out] or [out, 1] in the file."""
    if tensor.numel() != rows or tensor.shape[0] != rows:
        what = f"this is a DoRA whose lengths {list(tensor.shape)} are not those of the layer's {rows} rows"
        remedy = "train it with lengths of rows (LyCORIS: wd_on_output)"
        raise ModelError(Problem(what, where, remedy, code="lora-dora-lengths-differ"))
    if not tensor.isfinite().all():
        what = "the DoRA's lengths are not finite"
        raise ModelError(Problem(what, where, "download or export it again", code="lora-not-finite"))
    return tensor.float().reshape(rows)


def _alphas(
    tensors: Mapping[Entry, Tensor], metadata: Mapping[str, str], ranks: Mapping[str, int], path: Path
) -> dict[str, float]:
    """alpha of each module: its own tensor's, else by diffusers' metadata, else the rank (a scale of 1)."""
    try:
        listed = metadata_alphas(metadata, ranks, any(entry.part == MAGNITUDE for entry in tensors))
        own = {entry.module: float(tensor) for entry, tensor in tensors.items() if entry.part == "alpha"}
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        what = f"cannot read the LoRA's alpha: {error}"
        raise ModelError(Problem(what, str(path), code="lora-alpha-unreadable")) from error
    alphas = {module: own.get(module, listed.get(module, float(rank))) for module, rank in ranks.items()}
    if not all(isfinite(alpha) for alpha in alphas.values()):
        what = "the LoRA's alpha is not finite"
        raise ModelError(Problem(what, str(path), "download or export it again", code="lora-not-finite"))
    return alphas


def _header(adapter: Adapter, form: LoraFormat) -> dict[str, str]:
    ranks, alphas = set(adapter.ranks.values()), set(adapter.alphas.values())
    rank = adapter.rank if len(ranks) == 1 else f"{min(ranks)} to {max(ranks)}"
    return {
        "format": "pt",
        "ss_network_module": "networks.lora_wan",
        "ss_network_dim": str(adapter.rank),
        "ss_network_alpha": f"{max(alphas):g}",
        "ss_base_model_version": "wan",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "wan/lora",
        "modelspec.implementation": "https://github.com/Wan-Video/Wan2.1",
        "modelspec.title": f"{'DoRA' if adapter.is_dora else 'LoRA'} of rank {rank}",
        "longtake.version": __version__,
    } | (adapter_metadata(adapter) if form == "diffusers" else {})


def _serialised(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file with sorted metadata: the library orders it anew in each process, so bytes would differ."""
    plain = safetensors.torch.save(dict(tensors))
    start = 8 + int.from_bytes(plain[:8], "little")
    header = {"__metadata__": dict(sorted(metadata.items()))} | json.loads(plain[8:start])
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + plain[start:]


def _write_checked(staged: Path, content: bytes, tensors: Mapping[str, Tensor], path: Path) -> None:
    staged.write_bytes(content)
    if bad := [*_wrong_keys(staged, tensors)]:
        what = f"{len(bad)} tensors of the adapter are empty, not finite or were not written as they are"
        raise RunError(Problem(f"{what}, first {bad[0]}", str(path), "nothing was written", code="adapter-not-written"))


def _wrong_keys(written: Path, tensors: Mapping[str, Tensor]) -> Iterable[str]:
    with safe_open(written, framework="pt", device="cpu") as file:
        yield from sorted(set(file.keys()) ^ tensors.keys())
        for key, tensor in tensors.items():
            stored = file.get_tensor(key)
            if not stored.numel() or not stored.isfinite().all() or not torch.equal(stored, tensor.cpu()):
                yield key
