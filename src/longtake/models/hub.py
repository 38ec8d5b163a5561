"""Models from the Hugging Face Hub (`owner/name`) and from ModelScope (`ms://owner/name`) as local folders."""

import shutil
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from longtake.errors import ModelError, Problem
from longtake.units import format_bytes

MODELSCOPE = "ms://"
"""What stands before the id of a model on ModelScope."""


def fetch(model_id: str, patterns: Sequence[str], report: Callable[[str], None]) -> Path:
    """The local folder of `model_id` with the files that match `patterns`; downloads what is not in the cache yet.

    The size is told to `report` beforehand, the libraries show the progress. HF_ENDPOINT, HF_HUB_OFFLINE and the
    cache's place are theirs. Raises ModelError where the model is unknown, gated, or cannot be reached.
    """
    if model_id.startswith(MODELSCOPE):
        return _from_modelscope(model_id.removeprefix(MODELSCOPE), patterns, report)
    return _from_hugging_face(model_id, patterns, report)


def _from_hugging_face(model_id: str, patterns: Sequence[str], report: Callable[[str], None]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        _report_size(model_id, patterns, report)
        return Path(snapshot_download(model_id, allow_patterns=list(patterns)))
    except GatedRepoError as error:
        remedy = "accept its terms on its page and log in with `hf auth login`"
        raise ModelError(Problem("this model is gated", model_id, remedy, code="model-gated")) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        remedy = "check the id (owner/name); a private model needs `hf auth login`; a local one is given as model.path"
        what = "there is no such model on the hub"
        raise ModelError(Problem(what, model_id, remedy, code="model-not-on-hub")) from error
    except (OSError, _transport_error()) as error:
        raise _unreachable(model_id, error, "check the network, HF_ENDPOINT and HF_HUB_OFFLINE") from error


def _report_size(model_id: str, patterns: Sequence[str], report: Callable[[str], None]) -> None:
    """Reports what is to be downloaded. Refusals are left to the download, since the cache may have everything."""
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        info = HfApi().model_info(model_id, files_metadata=True)
    except RepositoryNotFoundError:
        return
    except OfflineModeIsEnabled:
        report(f"{model_id}: offline, using the cache")
        return
    except (OSError, _transport_error()) as error:
        report(f"{model_id}: the hub cannot be reached ({_line(error)}), using the cache")
        return
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    wanted = _matching(sizes, patterns)
    if not wanted:
        what = "has none of the files of a Wan model in diffusers' or the original layout"
        remedy = "download the file that you mean and give it as model.path"
        raise ModelError(Problem(what, model_id, remedy, code="model-without-wan-files"))
    cached = {name for name in wanted if isinstance(try_to_load_from_cache(model_id, name, revision=info.sha), str)}
    missing = [name for name in wanted if name not in cached]
    if missing:
        _announce(model_id, [sizes[name] for name in missing], Path(constants.HF_HUB_CACHE), report)


def _from_modelscope(model_id: str, patterns: Sequence[str], report: Callable[[str], None]) -> Path:
    try:
        from modelscope import snapshot_download
        from modelscope.hub import errors
        from modelscope.hub.api import HubApi
    except ImportError as error:
        remedy = "pip install 'longtake[modelscope]'"
        what = "ModelScope's library is not installed"
        raise ModelError(Problem(what, MODELSCOPE + model_id, remedy, code="modelscope-not-installed")) from error
    refusals = (errors.NotExistError, errors.RequestError, errors.NotLoginException, errors.NoValidRevisionError)
    try:
        files = {file["Path"]: file["Size"] for file in HubApi().get_model_files(model_id, recursive=True)}
        sizes = [files[name] for name in _matching(files, patterns)]
        report(f"{MODELSCOPE}{model_id}: {len(sizes)} files, {format_bytes(sum(sizes))}, less what is in the cache")
        return Path(snapshot_download(model_id, allow_patterns=list(patterns)))
    except (OSError, ValueError, errors.FileDownloadError, *refusals) as error:
        raise _unreachable(MODELSCOPE + model_id, error, "check the id and the network") from error


def _transport_error() -> type[Exception]:
    """Root of the HTTP client's errors: httpx's, or from version 2 of the library on httpx2's."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__bases__[0]


def _matching(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _announce(model_id: str, sizes: Sequence[int], cache: Path, report: Callable[[str], None]) -> None:
    size, place = sum(sizes), cache
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if size > free:
        what = f"{format_bytes(size)} to download and {format_bytes(free)} free in {place}"
        remedy = "make room or set HF_HOME to a larger disk"
        raise ModelError(Problem(what, model_id, remedy, code="disk-too-small-for-download"))
    report(f"{model_id}: downloading {len(sizes)} files, {format_bytes(size)}, to {cache}")


def _unreachable(model_id: str, error: Exception, remedy: str) -> ModelError:
    what = f"cannot be fetched ({_line(error)}) and is not in the cache"
    return ModelError(Problem(what, model_id, remedy, code="model-not-fetched"))


def _line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200].rstrip(" .")
