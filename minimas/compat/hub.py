"""Files of a repository on the Hugging Face hub, and what went wrong if they cannot be had.

Whatever the client and the network raise becomes an error message that names the cause: the name, the token, the cache,
the disk, the endpoint, or the network.
"""

import errno
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from json import JSONDecodeError
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    DisabledRepoError,
    DryRunError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session

from ..common import InputError, local_path

HUB = "https://huggingface.co"
INSTEAD = {
    "model": "give a folder with --checkpoint; --style tiny runs offline",
    "dataset": "give a local file of the same columns; --dataset tiny runs offline",
}
FULL = {errno.ENOSPC, errno.EDQUOT}
NOT_WRITABLE = {  # errors of files; those of sockets have other numbers
    errno.EACCES,
    errno.EEXIST,
    errno.EIO,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
}


def download(
    repository: str, patterns: Iterable[str], repo_type: str = "model", **options: Any
) -> Any:
    """The folder in huggingface_hub's cache with the files of a repository that match the patterns.

    options  revision; with dry_run=True nothing is downloaded, and files are listed with filename, file_size and
             will_download; with local_files_only=True nothing is asked

    Raises InputError if it cannot be had, with what is wrong and what to do.
    """
    try:
        found = snapshot_download(
            repository, repo_type=repo_type, allow_patterns=list(patterns), **options
        )
    except Exception as e:  # whatever the network stack raises becomes an error message
        raise InputError(hub_message(repository, repo_type, options.get("revision"), e)) from e
    return found if isinstance(found, list) else Path(found)


def is_reachable(seconds: float = 4) -> bool:
    """Whether anything answers where the hub should be. The client's own requests have no time-out."""
    answers = []

    def ask() -> None:
        with suppress(Exception):  # whatever the network stack raises
            answers.append(get_session().head(constants.ENDPOINT, timeout=seconds))

    asking = Thread(target=ask, daemon=True)  # looking up a name may take longer than any time-out
    asking.start()
    asking.join(seconds)
    return bool(answers)


def names_in_repository(repository: str) -> list[str]:
    """The names of all files of a repository; none if the hub does not tell."""
    try:
        return [file.filename for file in download(repository, ["*"], dry_run=True)]
    except InputError:
        return []


def hub_message(repository: str, repo_type: str, revision: str | None, error: Exception) -> str:
    """What is wrong with a repository that cannot be had, and what to do."""
    cause = root_cause(error)
    if isinstance(cause, GatedRepoError):
        return f"{repository} is gated: accept its terms on its page, then use `hf auth login` or HF_TOKEN"
    if isinstance(cause, RepositoryNotFoundError):
        return f"{repository} is not on the hub, or private and closed to you: check its name and HF_TOKEN"
    why, advice = diagnosis(cause, revision)
    return f"{repository} cannot be fetched from the hub ({why}): {advice}, or {INSTEAD[repo_type]}"


def root_cause(error: Exception) -> BaseException:
    """What an error of the client stands for. It says "not in the cache" of all that kept it from asking the hub."""
    wrapped = isinstance(error, (LocalEntryNotFoundError, DryRunError))
    return error.__cause__ if wrapped and error.__cause__ is not None else error


def diagnosis(cause: BaseException, revision: str | None) -> tuple[str, str]:
    """(what is wrong, what to do) for what kept a repository from being fetched."""
    why = (str(cause).strip() or type(cause).__name__).splitlines()[0]
    if isinstance(cause, RevisionNotFoundError):
        return f"it has no revision {revision or 'main'}", "check the revision on its page"
    if isinstance(cause, DisabledRepoError):
        return "it has been disabled", "choose another repository"
    if isinstance(cause, HFValidationError):
        return (
            f"no repository can have this name: {why}",
            "correct it to OWNER/NAME as its page shows it",
        )
    if isinstance(cause, HfHubHTTPError):
        return of_status(cause.response.status_code, why)
    file = file_in_the_way()
    if file is not None:
        return (
            f"its cache is {constants.HF_HUB_CACHE}, but {file} is a file",
            f"set {cache_variable()} to a folder",
        )
    if constants.HF_HUB_OFFLINE or isinstance(cause, OfflineModeIsEnabled):
        name = offline_variable()
        return f"{name} is set and it is not in the cache", f"unset {name} to fetch it"
    local = of_files(cause, why)
    if local is not None:
        return local
    return of_connection(cause, why)


def offline_variable() -> str:
    """The environment variable that forbids the network; the client obeys either."""
    if os.environ.get("TRANSFORMERS_OFFLINE") and not os.environ.get("HF_HUB_OFFLINE"):
        return "TRANSFORMERS_OFFLINE"
    return "HF_HUB_OFFLINE"


def cache_variable() -> str:
    """The environment variable that says where the cache is: the narrower one, if it is set, hides HF_HOME."""
    return "HF_HUB_CACHE" if os.environ.get("HF_HUB_CACHE") else "HF_HOME"


def of_status(status: int, why: str) -> tuple[str, str]:
    """(what is wrong, what to do) for an HTTP status that the hub answered with."""
    if status == 401:
        return (
            "the hub does not accept your token",
            "make a new one with `hf auth login`, or correct or unset HF_TOKEN",
        )
    if status == 403:
        return (
            f"your token may not read it: {why}",
            "give the token read access to this repository on the hub's page of tokens, or use another in HF_TOKEN",
        )
    if status == 407:
        return "the proxy asks for a password", "correct HTTPS_PROXY"
    if status == 429:
        return (
            "the hub limits how often you may ask",
            "wait some minutes, or log in with `hf auth login`",
        )
    if status >= 500:
        return f"the hub is in trouble: {why}", "try again later, or check the network"
    if constants.ENDPOINT != HUB:
        return (
            f"{constants.ENDPOINT} answers {status} to what the hub knows",
            "correct HF_ENDPOINT, or unset it",
        )
    return why, "check its name"


def of_files(cause: BaseException, why: str) -> tuple[str, str] | None:
    """(what is wrong, what to do) if the cache on this machine is to blame, else None."""
    cache = local_path(constants.HF_HUB_CACHE)
    number = cause.errno if isinstance(cause, OSError) else None
    in_text = re.search(r"os error (\d+)", why)  # as the client's part in Rust says it
    if number is None and in_text:
        number = int(in_text[1])
    if number in FULL:
        return (
            f"the disk of its cache {cache} is full",
            f"free some space, or set {cache_variable()} to a folder on another disk",
        )
    if number not in NOT_WRITABLE:
        return None
    return (
        f"its cache {cache} cannot be written: {why}",
        f"set {cache_variable()} to a folder that you can write to",
    )


def file_in_the_way() -> Path | None:
    """The file that stands where the cache needs a folder. Whatever else failed, nothing can be fetched then."""
    cache = local_path(constants.HF_HUB_CACHE)
    return next((path for path in (cache, *cache.parents) if path.is_file()), None)


def of_connection(cause: BaseException, why: str) -> tuple[str, str]:
    """(what is wrong, what to do) if no answer came, or one that the client could not read."""
    endpoint = constants.ENDPOINT
    own = endpoint != HUB  # one that the user named
    if isinstance(cause, (httpx.UnsupportedProtocol, httpx.InvalidURL)) or not is_url(endpoint):
        return (
            f"HF_ENDPOINT is {endpoint!r}, which is no URL",
            f"correct it to one like {HUB}, or unset it",
        )
    if isinstance(cause, (httpx.LocalProtocolError, UnicodeEncodeError)):
        return (
            "the token has a character that no token has, such as a line break",
            "correct or unset HF_TOKEN, or make a new token with `hf auth login`",
        )
    if isinstance(cause, httpx.ProxyError):
        return f"the proxy does not let it through: {why}", "correct or unset HTTPS_PROXY"
    if "CERTIFICATE" in why.upper():
        return (
            f"its certificate is not accepted: {why}",
            "check the clock of this machine, and name your proxy's certificate in SSL_CERT_FILE",
        )
    if isinstance(cause, (JSONDecodeError, FileMetadataError)):
        advice = "check the network: a login page may answer for it"
        if own:
            advice = "correct or unset HF_ENDPOINT"
        return f"what answers at {endpoint} is not the hub", advice
    if isinstance(cause, (httpx.TransportError, LocalEntryNotFoundError)) or is_closed(cause):
        why = f"no connection to {endpoint}" if own else "no connection"
    advice = "check HF_ENDPOINT and the network" if own else "check the network"
    return why, advice


def is_closed(cause: BaseException) -> bool:
    """Whether a thread of the client found its connection closed by another that had failed before it."""
    return isinstance(cause, AttributeError) or "client has been closed" in str(cause)


def is_url(endpoint: str) -> bool:
    """Whether an endpoint begins as a URL does and names a host."""
    return re.match(r"https?://[^/\s]", endpoint) is not None
