"""The videos that a run has sampled while it trained, as the JSON beside each tells of them."""

import json
from collections.abc import Callable
from pathlib import Path


def run_samples(run: Path, say: Callable[[str], None]) -> tuple[tuple[str, str], ...]:
    """The videos of the last step that has some, relative to the run's folder, with their prompts.

    One of which the JSON does not tell is left out, and said.
    """
    found = sorted((run / "samples").glob("step-*-*.json"))
    told = [(path, *entry) for path in found if (entry := _told(path, say)) is not None]
    last = max((step for _, step, _ in told), default=None)
    videos = ((path.with_suffix(".mp4"), prompt) for path, step, prompt in told if step == last)
    return tuple((path.relative_to(run).as_posix(), prompt) for path, prompt in videos if path.is_file())


def _told(path: Path, say: Callable[[str], None]) -> tuple[int, str] | None:
    """Step and prompt, where they can be read."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        step, prompt = table["step"], table["prompt"]
        if type(step) is int and isinstance(prompt, str):
            return step, prompt
        why = "step is no number or prompt no text"
    except OSError as error:
        why = error.strerror or "it cannot be read"
    except (ValueError, KeyError, TypeError, RecursionError):
        why = "it is no JSON with step and prompt"
    say(f"{path}: the sample is left out of the model card: {why}")
    return None
