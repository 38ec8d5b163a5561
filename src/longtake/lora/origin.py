"""Of which model a LoRA is, where its file says so: matrices of other models may have the same shapes."""

from pathlib import Path

from longtake.errors import ModelError, Problem
from longtake.lora.adapter import Adapter
from longtake.models.spec import ModelSpec
from longtake.models.wan.variants import VARIANTS


def other_model(adapter: Adapter, path: Path, spec: ModelSpec) -> str:
    """A line where the file at `path` names another model than `spec` but of its task; empty where it names none.

    Raises ModelError where the model that it names is of another task.
    """
    name = adapter.metadata.get("longtake.model", "")
    if name in ("", spec.name):
        return ""
    named = VARIANTS.get(name)
    if named is not None and named.spec.task != spec.task:
        what = f"this is a LoRA of {name} ({named.spec.task}), the model is {spec.name} ({spec.task})"
        raise ModelError(Problem(what, str(path), "use one of the same task", code="lora-of-another-task"))
    return f"{path.name} is a LoRA of {name}, the model is {spec.name}"
