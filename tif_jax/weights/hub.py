"""Weights by their name on the Hugging Face hub, hf:OWNER/NAME[@REVISION]: a folder of the library's own cache.

The library (`huggingface_hub`, extra `hub`) downloads, resumes, caches, and knows the user's token; its variables hold
here, too: HF_HUB_OFFLINE, HF_HOME, HF_TOKEN, HF_ENDPOINT. Nothing that is downloaded is run.
"""

import errno
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tif_jax.errors import InputError, WorkError, is_shortage
from tif_jax.weights.folders import REDUCER, SHARDED, TORCH, WEIGHTS, weight_file

logger = logging.getLogger(__name__)

_NAME = re.compile(r"hf:(?P<repository>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[^@\s]+))?")
_COMMIT = re.compile("[0-9a-f]{40}")
_SAYING = ("config.json", "preprocessor_config.json", "processor_config.json")
_FILES = (*_SAYING, WEIGHTS, SHARDED, "model-?????-of-?????.safetensors", REDUCER)
LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


def is_name(source: Any) -> bool:
    """Whether this is the name of something on the hub, and no path."""
    return str(source).startswith("hf:")


def repository_of(name: str) -> tuple[str, str | None]:
    """OWNER/NAME and the revision, if the name says one. Raises InputError for what is no name."""
    if not (match := _NAME.fullmatch(name)):
        raise InputError(f"{name!r} is no name on the hub; it is hf:OWNER/NAME or hf:OWNER/NAME@REVISION")
    return match["repository"], match["revision"]


def pinned(name: str) -> str:
    """The name with the commit that its revision (by default: main) stands for now: hf:OWNER/NAME@COMMIT."""
    return f"hf:{repository_of(name)[0]}@{folder_of(name).name}"


def folder_of(name: str) -> Path:
    """The folder of the cache with the weights and what describes them, downloaded if need be; its name is the commit.

    Raises InputError for what is not there or may not be read, and where there is neither a connection nor a copy in the
    cache; WorkError where the download fails.
    """
    repository, revision = repository_of(name)
    folder = _downloaded(name, repository, revision, _FILES)
    if weight_file(folder) is None:
        folder = _downloaded(name, repository, folder.name, (*_FILES, TORCH))
    if weight_file(folder) is None:
        known = ", ".join((WEIGHTS, SHARDED, TORCH))
        raise InputError(
            f"{name} has no weights that are read here ({known}); download others by hand and load the file"
        )
    return folder


def library() -> Any:
    """The module huggingface_hub. Raises InputError where it is not installed."""
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError:
        raise InputError('names on the hub (hf:) need huggingface_hub: pip install "tif_jax[hub]"') from None
    return huggingface_hub


@contextmanager
def failures(name: str, page: str, writing: bool = False) -> Iterator[None]:
    """Around calls of the library: what was asked for in vain is an InputError, what the network did a WorkError; an
    InputError of one's own stays what it is.

    writing: whether what is asked for is to be written.
    """
    errors = library().errors
    try:
        yield
    except errors.HFValidationError:
        raise InputError(f"{name!r} is no name on the hub; it is hf:OWNER/NAME or hf:OWNER/NAME@REVISION") from None
    except errors.GatedRepoError:
        raise InputError(f"{name} is gated: accept its terms at {page}, then {LOGIN}") from None
    except errors.RepositoryNotFoundError:
        if writing:
            raise InputError(f"{name} may not be written by you: {LOGIN}, with a token that may write") from None
        raise InputError(
            f"there is no {name}, or it is private: check the name at {page}; if it is yours, {LOGIN}"
        ) from None
    except errors.RevisionNotFoundError:
        remedy = "give a branch, tag or commit of it, or leave @REVISION out for main"
        raise InputError(f"{name}: there is no such revision; {remedy}; they are listed at {page}/commits") from None
    except (InputError, errors.LocalEntryNotFoundError):
        raise
    except Exception as error:  # httpx, and the library's own, have many kinds
        if is_shortage(error) or getattr(error, "errno", None) in (errno.EACCES, errno.EROFS, errno.ENOSPC):
            raise
        response = getattr(error, "response", None)
        if response is not None and response.status_code in (401, 403):
            token = ", with a token that may write" if writing else ""
            raise InputError(f"{name}: the hub refuses it ({_first_line(error)}); {LOGIN}{token}") from None
        again = "" if writing else ": a download goes on where it stopped"
        raise WorkError(
            f"{name}: {_first_line(error)}; check the network, then run the same command again{again}"
        ) from error


def page_of(repository: str, kind: str = "") -> str:
    """The address of a repository's page. kind: '' of a model, 'datasets'."""
    return "/".join(part for part in (library().constants.ENDPOINT, kind, repository) if part)


def _downloaded(name: str, repository: str, revision: str | None, patterns: Sequence[str]) -> Path:
    hub, page = library(), page_of(repository)

    def snapshot(**options: Any) -> Path:
        with failures(name, page):
            found = hub.snapshot_download(repository, revision=revision, allow_patterns=list(patterns), **options)
        return Path(found)

    if revision and _COMMIT.fullmatch(revision):  # it does not change: nobody needs to be asked
        with suppress(hub.errors.LocalEntryNotFoundError):
            folder = snapshot(local_files_only=True)
            if _is_whole(folder):
                return folder
    logger.info("%s: looked up at %s; what is not in the cache yet is downloaded", name, page)
    try:
        return snapshot()
    except hub.errors.LocalEntryNotFoundError as error:
        raise InputError(_by_hand(name, repository, revision, page, error)) from None


def _is_whole(folder: Path) -> bool:
    """Whether all is there that decides on how the weights are read.

    A download that was cut short, or another library's, may have left a part. Without its config.json a file is read
    otherwise, and HF transformers write how images are prepared beside it.
    """
    if not all((folder / file).is_file() for file in (WEIGHTS, "config.json")):
        return False
    with suppress(ValueError, AttributeError):  # what is wrong with it is told where it is read
        if "model_type" in json.loads((folder / "config.json").read_text(encoding="utf-8")).keys():
            return any((folder / file).is_file() for file in _SAYING[1:])
    return True


def _by_hand(name: str, repository: str, revision: str | None, page: str, error: Exception) -> str:
    """What to do without a connection."""
    constants, cause = library().constants, error.__cause__
    response = getattr(cause, "response", None)
    if constants.HF_HUB_OFFLINE:
        why = "HF_HUB_OFFLINE is set"
    elif response is not None:
        why = f"{constants.ENDPOINT} answers {response.status_code}"
    else:
        why = f"no connection to {constants.ENDPOINT}"
    cache = os.path.join(constants.HF_HUB_CACHE, "models--" + repository.replace("/", "--"))
    partly = "only a part of it is" if os.path.isdir(os.path.join(cache, "snapshots")) else "it is not"
    return (
        f"{name} can not be downloaded ({why}), and {partly} in the cache: download config.json and {WEIGHTS} (if it is in "
        f"shards: {SHARDED} and the shards) from {page}/tree/{revision or 'main'} into a folder, and give its path; or copy "
        f"{cache} from a machine that has it"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
