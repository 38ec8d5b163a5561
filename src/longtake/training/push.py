"""A run on the Hugging Face Hub: its adapters, or its trained transformer, with a model card and the last samples."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longtake.config.schema import RunConfig
from longtake.errors import ConfigError, LongtakeError, Problem, RunError
from longtake.lora import read_adapter
from longtake.models.wan.variants import VARIANTS, WanVariant
from longtake.training.card import FILE, Card, is_foreign, write_card
from longtake.training.model import find_model
from longtake.training.results import read_run
from longtake.training.sampled import run_samples

_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Destination:
    """A repository of the hub, as `owner/name`, and its branch; one that is made is `private` or not."""

    repo: str
    private: bool = False
    revision: str = ""


def push(run: Path, to: Destination, say: Callable[[str], None]) -> str:
    """Uploads what the finished `run` left, in one commit, and gives its address; the repository is made if need be.

    Raises ConfigError where there is nothing to upload or no such repository can be, RunError where the hub refuses or
    cannot be reached.
    """
    if not _NAME.fullmatch(to.repo):
        raise ConfigError(_no_name(to))
    config = read_run(run)
    names = _results(run, config)
    variant = _variant(run, config, names[0], say)
    samples = run_samples(run, say)
    if is_foreign(run / FILE):
        say(f"{run / FILE} is kept as it is: it is not one of longtake's")
    else:
        whole = config.lora is None
        write_card(run, Card(config, variant, _shown(names), whole, samples, "diffusers" if whole else "comfyui"))
    wanted = [FILE, *(path for path, _ in samples)]
    wanted += [name if (run / name).is_file() else f"{name}/*" for name in names]
    try:
        return _uploaded(run, wanted, to, say)
    except Exception as error:
        raise _in_words(error, to) from error


def _results(run: Path, config: RunConfig) -> tuple[str, ...]:
    if config.lora is None:
        found = [name for name in ("transformer", "transformer_2") if (run / name / "config.json").is_file()]
    else:
        found = sorted(path.name for path in run.glob("adapter*.safetensors"))
    if not found:
        raise ConfigError(
            Problem("the run is not finished", str(run), "continue it with --resume", code="run-unfinished")
        )
    return tuple(found)


def _variant(run: Path, config: RunConfig, name: str, say: Callable[[str], None]) -> WanVariant:
    """The trained model's, from the adapter if there is one: for that no model has to be fetched."""
    told = "" if config.lora is None else read_adapter(run / name).metadata.get("longtake.model", "")
    return VARIANTS[told] if told in VARIANTS else find_model(config, say).variant


def _shown(names: tuple[str, ...]) -> tuple[str, ...]:
    """Those that the card tells how to load: of an adapter in several formats, ComfyUI's, which all programs read."""
    plain = tuple(name for name in names if not any(form in name for form in ("-diffusers", "-kohya")))
    return plain or names


def _uploaded(run: Path, wanted: list[str], to: Destination, say: Callable[[str], None]) -> str:
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(to.repo, private=to.private, exist_ok=True)
    if to.revision:
        api.create_branch(to.repo, branch=to.revision, exist_ok=True)
    say(f"uploading {', '.join(wanted)} to {to.repo}")
    commit: Any = api.upload_folder(
        repo_id=to.repo,
        folder_path=run,
        allow_patterns=wanted,
        revision=to.revision or None,
        commit_message=f"Upload {run.name}",
    )
    return str(commit.commit_url)


def _in_words(error: Exception, to: Destination) -> LongtakeError | Exception:
    """What the hub's library raised, in one line; anything else as it is."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    where = f"--repo {to.repo}"
    if isinstance(error, HFValidationError):
        return ConfigError(_no_name(to))
    if isinstance(error, OfflineModeIsEnabled):
        return RunError(Problem("the hub's library is offline", where, "unset HF_HUB_OFFLINE", code="push-offline"))
    if isinstance(error, LocalTokenNotFoundError):
        return RunError(Problem("you are not logged in", where, "run `hf auth login`", code="push-not-logged-in"))
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        return RunError(_refusal(error.response.status_code, error, where))
    if isinstance(error, (OSError, *HfHubHTTPError.__bases__)):
        return RunError(
            Problem(
                f"the hub cannot be reached ({_line(error)})",
                where,
                "check network and HF_ENDPOINT",
                code="push-unreachable",
            )
        )
    return error


def _no_name(to: Destination) -> Problem:
    return Problem("this is no name of a repository", f"--repo {to.repo}", "write owner/name", code="push-name-wrong")


def _refusal(status: int, error: Exception, where: str) -> Problem:
    if status == 401:
        return Problem(
            "the hub does not know you",
            where,
            "run `hf auth login` with a token that may write",
            code="push-token-refused",
        )
    if status == 403:
        return Problem(
            "you may not write there",
            where,
            "use a repository of yours and a token that may write",
            code="push-forbidden",
        )
    if status == 404:
        return Problem(
            "there is no such repository, or you may not see it",
            where,
            "check owner and name",
            code="push-repository-missing",
        )
    return Problem(f"the hub refused it ({_line(error)})", where, "try again later", code="push-refused")


def _line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200].rstrip(" .")
