"""Files of checkpoints and data sets: from a local folder, or from the Hugging Face hub, one file at a time.

Fetching single files gets exactly what a task needs, and works from a warm cache with HF_HUB_OFFLINE=1.
"""

import re
from pathlib import Path, PureWindowsPath

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from . import InputError

NOT_CACHED = "HF_HUB_OFFLINE is set and it is not in the cache"


def find(source, name, required=True):
    """Path of file `name` in `source`, a folder or a hub id. If there is none: None, or InputError if it is required.
    """
    path = PureWindowsPath(name)  # the stricter kind: both slashes, and drives
    if path.anchor or ".." in path.parts:
        raise InputError(f"a manifest of {source} names a file outside, {name!r}: expected a path within; fetch it again")
    folder, offline = Path(source).expanduser(), False
    if folder.is_dir():
        file = folder / name if (folder / name).is_file() else None
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        file, offline = download(str(source), name), constants.HF_HUB_OFFLINE
    else:
        raise InputError(f"{source} is not a folder, nor a hub id like Qwen/Qwen3-1.7B: give one that holds a checkpoint")
    if file is None and required:
        raise unreachable(source, name, NOT_CACHED) if offline else InputError(
            f"{source} has no {name}: a checkpoint in the released layout needs it; fetch the folder again")
    return file


def data_file(repository, name, revision=None):
    """Path of file `name` of a data set on the hub; if the revision is a commit, a cached file needs no network."""
    if file := download(repository, name, repo_type="dataset", revision=revision):
        return file
    why = NOT_CACHED if constants.HF_HUB_OFFLINE else "the repository has no such file"
    raise unreachable(repository, name, why, "dataset")


def download(repository, name, repo_type="model", revision=None):
    """A file of a hub repository, through huggingface_hub's cache; None if there is none (offline: none cached)."""
    try:
        return Path(hf_hub_download(repository, name, repo_type=repo_type, revision=revision))
    except GatedRepoError as e:
        raise InputError(f"{repository} is gated: accept its terms on its page on the hub, then log in with "
                         "`hf auth login` or HF_TOKEN") from e
    except RepositoryNotFoundError as e:
        raise InputError(f"{repository} is not on the hub, or private and closed to you: check its name, "
                         "and HF_TOKEN") from e
    except LocalEntryNotFoundError as e:
        if constants.HF_HUB_OFFLINE:
            return None
        raise unreachable(repository, name, "no connection to the hub", repo_type) from e
    except EntryNotFoundError:
        return None
    except Exception as e:  # whatever else the network stack raises becomes a sentence, not a traceback
        raise unreachable(repository, name, (str(e) or type(e).__name__).splitlines()[0], repo_type) from e


def unreachable(repository, name, why, repo_type="model"):
    """The InputError for a file that cannot be fetched."""
    problem = f"{name} of {repository} cannot be fetched ({why}): check "
    if repo_type == "model":
        return InputError(problem + f"the network and the name, for there is no folder {repository} here either, or give "
                                    "one with --checkpoint; --style tiny runs offline")
    return InputError(problem + "the network, or give a local file of the same columns; --dataset tiny runs offline")
