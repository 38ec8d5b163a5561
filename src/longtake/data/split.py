"""Which clips are held out for the validation loss."""

import hashlib
from collections.abc import Sequence

from longtake.data.cache import Entry


def split(entries: Sequence[Entry], validation: float | str, seed: int) -> tuple[list[Entry], list[Entry]]:
    """(training entries, validation entries); a clip is in one of them with all its buckets.

    Where `validation` is a source of its own, its entries are marked so. Where it is a fraction, that share of the
    clips is drawn by `seed`, at least one when it is above zero and there are two.
    """
    if isinstance(validation, str):
        held = [entry for entry in entries if entry.split == "validation"]
        return [entry for entry in entries if entry.split == "train"], held
    clips = sorted({entry.clip for entry in entries}, key=lambda clip: _rank(clip, seed))
    count = round(validation * len(clips))
    if validation > 0 and len(clips) > 1:
        count = min(max(1, count), len(clips) - 1)
    chosen = set(clips[:count]) if len(clips) > 1 else set()
    training = [entry for entry in entries if entry.clip not in chosen]
    return training, [entry for entry in entries if entry.clip in chosen]


def _rank(clip: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:{clip}".encode()).digest()
