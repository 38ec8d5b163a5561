"""How alike two names are: for the nearest key, value or model to one that does not exist."""

import re
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher

ALIKE = 0.7
"""From this on a name is taken for a misspelling: one letter of four differs, or one word of two to three."""
BROKEN_OFF = 0.5
"""From this on a name is taken for the beginning of a longer one: it has a third of its letters."""


def squeezed(name: str) -> str:
    """Its letters and digits alone, all small: `learningRate`, `Learning-Rate` and `learning_rate` are one."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def likeness(name: str, known: str) -> float:
    """From 0 to 1: the greater of the share of letters in the same order and of the share of words they have both."""
    letters = SequenceMatcher(None, squeezed(name), squeezed(known), autojunk=False).ratio()
    ours, theirs = _words(name), _words(known)
    shared = 2 * len(ours & theirs) / (len(ours) + len(theirs)) if ours and theirs else 0.0
    # where one of the two is the same for several names the other decides
    return max(letters, shared) * 0.99 + min(letters, shared) * 0.01


def nearest(name: str, known: Iterable[str], alike: float = ALIKE) -> Sequence[str]:
    """Those of `known` that are most like `name`, several where they are equally so, none where all are unlike it.

    What begins with `name` comes before what is as like it in its midst: `wan2.1-i2v-14b` is no `wan2.1-t2v-14b`.
    """
    scores = {each: likeness(name, each) for each in known}
    longer = {each: score for each, score in scores.items() if squeezed(each).startswith(squeezed(name))}
    if max(longer.values(), default=0.0) >= BROKEN_OFF:
        scores, alike = longer, BROKEN_OFF
    best = max(scores.values(), default=0.0)
    return [each for each, score in scores.items() if score == best >= alike]


def only_with_words(name: str, known: Iterable[str]) -> Sequence[str]:
    """The one of `known` that has all words of `name`, or whose words `name` has all; none where there are several."""
    found = [each for each in known if _words(each) <= _words(name) or _words(name) <= _words(each)]
    return found if len(found) == 1 else []


def _words(name: str) -> set[str]:
    """`{"train", "step"}` of `trainingSteps`: small, without plural and -ing."""
    parts = re.split(r"[^A-Za-z0-9]+|(?<=[a-z0-9])(?=[A-Z])", name)
    return {re.sub(r"(?<=\w{3})(s|ing)$", "", part.lower()) for part in parts if part}
