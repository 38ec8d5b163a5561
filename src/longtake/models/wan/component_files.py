"""Where VAE and encoders lie: in a diffusers folder, an original release, or ComfyUI's `models`. Needs no torch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from longtake.errors import ModelError, Problem
from longtake.models.wan.component_kinds import ComponentKind, FoundComponent, find_component
from longtake.models.wan.headers import listed, read_header
from longtake.models.wan.variants import VARIANTS

_PLACES: dict[ComponentKind, tuple[str, ...]] = {
    "vae": ("vae",),
    "text_encoder": ("text_encoders", "text_encoder", "clip"),
    "image_encoder": ("clip_vision", "image_encoder"),
}
"""Folders of ComfyUI, beside the root itself, in which a component's file may be."""
_ENDINGS = (".safetensors", ".pth", ".pt")
_OF_MODELS = ("diffusion_models", "unet", "checkpoints")
"""ComfyUI's folders of transformers; beside them are those of the components."""
_REMEDY = (
    "give a diffusers folder, an original release or ComfyUI's folder models that has one, here or in model.components"
)


@dataclass(frozen=True)
class Component:
    """`path` is a component's diffusers folder, or the file in which `found` was."""

    path: Path
    found: FoundComponent | None


def locate_component(root: Path, kind: ComponentKind, variant: str = "") -> Component:
    """The component of `variant` (of any where that is no variant's name) under `root`, told by names and shapes.

    A folder with a config.json is taken first. Raises ModelError where there is none, and where there are several.
    """
    if (root / kind / "config.json").is_file():
        return Component(root / kind, None)
    unreadable: list[Problem] = []
    found = list(_candidates(root, kind, unreadable))
    fitting = [each for each in found if each.found is not None and _fits(each.found, variant)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        several = ", ".join(str(each.path.relative_to(root)) for each in fitting)
        remedy = "give a folder with links to the files that you mean in model.components"
        what = f"{len(fitting)} files are a {kind} of this model: {several}"
        raise ModelError(Problem(what, str(root), remedy, code="component-ambiguous"))
    reasons = [f"{each.path.name} is of {_users(each)}" for each in found]
    what = f"there is no {kind} (config.json) and no file of one{besides(unreadable, reasons)}"
    raise ModelError(Problem(what, str(root), _REMEDY, code="component-missing"))


def besides(unreadable: Sequence[Problem], reasons: Sequence[str] = ()) -> str:
    """In brackets, to end a line with: other `reasons`, and why files could not be read."""
    told = [*reasons, *(f"{Path(each.where).name}: {each.what}" for each in unreadable[:2])]
    return f" ({'; '.join(told)})" if told else ""


def holds_components(root: Path, unreadable: list[Problem]) -> bool:
    """Whether there is a folder of VAEs, or a file of one, for whichever model; adds why files cannot be read."""
    return (root / "vae").is_dir() or any(_candidates(root, "vae", unreadable))


def surrounding_components(path: Path, unreadable: list[Problem]) -> Path | None:
    """The folder of components that a model at `path` came with: its own, or ComfyUI's `models` around it.

    Adds to `unreadable` why files that may be a VAE's cannot be read.
    """
    own = path if path.is_dir() else path.parent
    if (path / "model_index.json").is_file():
        return path
    around = [parent.parent for parent in (own, *own.parents) if parent.name in _OF_MODELS][:1]
    return next((root for root in (own, *around) if holds_components(root, unreadable)), None)


def _candidates(root: Path, kind: ComponentKind, unreadable: list[Problem]) -> Iterator[Component]:
    for file in _files(root, kind):
        try:
            found = find_component(read_header(file))
        except ModelError as error:
            unreadable.append(error.problems[0])
            continue
        if found is not None and found.kind == kind and found.users:
            yield Component(file, found)


def _files(root: Path, kind: ComponentKind) -> Iterator[Path]:
    patterns = ["*", *(f"{folder}/{depth}" for folder in _PLACES[kind] for depth in ("*", "*/*"))]
    for pattern in patterns:
        for file in sorted(root.glob(pattern)):
            if file.suffix.lower() in _ENDINGS and file.is_file():
                yield file


def _fits(found: FoundComponent, variant: str) -> bool:
    return variant not in VARIANTS or variant in found.users


def _users(component: Component) -> str:
    return listed(component.found.users, 2) if component.found else ""
