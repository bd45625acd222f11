"""Where a checkpoint's and a data set's files come from: a local folder, or the Hugging Face hub, one file at a time.

Fetching by file gets exactly what a task needs, and works from a warm cache with HF_HUB_OFFLINE=1.
"""

import re
from pathlib import Path

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from . import InputError


def find(source, name, required=True):
    """Path of file `name` of `source`, a folder or a hub id; None if it is not there and not required, InputError otherwise."""
    folder, offline = Path(source).expanduser(), False
    if folder.is_dir():
        file = folder / name if (folder / name).is_file() else None
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        file, offline = download(str(source), name), constants.HF_HUB_OFFLINE
    else:
        raise InputError(f"{source} is not a folder, nor a hub id like Qwen/Qwen3-1.7B: give one that holds a checkpoint")
    if file is None and required:
        raise unreachable(source, name, "HF_HUB_OFFLINE is set and it is not in the cache") if offline else InputError(
            f"{source} has no {name}: a checkpoint in the released layout needs it; fetch the folder again")
    return file


def data_file(repository, name, revision=None):
    """Path of file `name` of a data set on the hub; a revision that is a commit needs no network once it is in the cache."""
    if file := download(repository, name, repo_type="dataset", revision=revision):
        return file
    raise unreachable(repository, name, "HF_HUB_OFFLINE is set and it is not in the cache" if constants.HF_HUB_OFFLINE
                      else "the repository has no such file", "dataset")


def download(repository, name, repo_type="model", revision=None):
    """A file of a hub repository through huggingface_hub's cache; None where it has none of that name (offline: none cached)."""
    try:
        return Path(hf_hub_download(repository, name, repo_type=repo_type, revision=revision))
    except GatedRepoError as e:
        raise InputError(f"{repository} is gated: accept its terms on its page on the hub, then log in with `hf auth login` "
                         "or HF_TOKEN") from e
    except RepositoryNotFoundError as e:
        raise InputError(f"{repository} is not on the hub, or private and closed to you: check its name, and HF_TOKEN") from e
    except LocalEntryNotFoundError as e:
        if constants.HF_HUB_OFFLINE:
            return None
        raise unreachable(repository, name, "no connection to the hub", repo_type) from e
    except EntryNotFoundError:
        return None
    except Exception as e:  # whatever else the network stack raises: it is told, not a traceback
        raise unreachable(repository, name, (str(e) or type(e).__name__).splitlines()[0], repo_type) from e


def unreachable(repository, name, why, repo_type="model"):
    instead = "folder with --checkpoint; --style" if repo_type == "model" else "file of the same columns; --dataset"
    return InputError(f"{name} of {repository} cannot be fetched ({why}): check the network, or give a local {instead} tiny runs offline")
