"""The rows of a data set that the hub has as Parquet only, from its dataset viewer, with the standard library alone.

GET {server}/rows?dataset=&config=&split=&offset=&length=100 (huggingface.co/docs/dataset-viewer/rows). Each complete
page becomes a file in HF_HOME/minimas/datasets, so that an interrupted fetch continues where it stopped, and a complete
set needs no network. Delete its folder to fetch it anew. HF_DATASETS_SERVER names another server.
"""

import http.client
import json
import os
import time
from contextlib import suppress
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import Request, urlopen

from huggingface_hub import constants
from huggingface_hub.utils import build_hf_headers

from . import InputError, __version__
from .hub import unreachable

SERVER = os.environ.get("HF_DATASETS_SERVER") or "https://datasets-server.huggingface.co"
ROWS_A_PAGE = 100  # the most that the server gives
TRIES = 6  # for a page
LONGEST_WAIT = 60  # seconds between two tries


def viewer_rows(repository, config, split):
    """Yield the rows of a split as dicts, in their order; a page is fetched only when one of its rows is asked for.

    Raises InputError if the data set is closed to the user, not served whole, changes meanwhile, or cannot be reached.
    """
    folder = Path(constants.HF_HOME) / "minimas" / "datasets" / repository.replace("/", "--") / config / split
    first, offset = None, 0
    while first is None or offset < first["num_rows_total"]:
        page = read_page(folder / f"{offset}.json", repository, config, split, offset)
        first = first or page
        if any(page[name] != first[name] for name in ("num_rows_total", "revision")):
            raise InputError(f"{repository} changed on the hub since its first page was fetched: delete {folder}, "
                             "run again")
        yield from (served["row"] for served in page["rows"])
        offset += ROWS_A_PAGE


def read_page(file, repository, config, split, offset):
    """The viewer's reply for the page that starts at row `offset`, with its revision; from its file if that is whole.

    Otherwise it is fetched into the file. Raises InputError if it is incomplete or cannot be fetched.
    """
    with suppress(FileNotFoundError, ValueError, RecursionError):  # there is none, or none that is JSON
        page = json.loads(file.read_text(encoding="utf-8"))
        if is_whole(page, offset) and "revision" in page:
            return page
    if constants.HF_HUB_OFFLINE:
        why = f"HF_HUB_OFFLINE is set and it is not in {file.parent}"
        raise unreachable(repository, f"row {offset}", why, "dataset")
    query = {"dataset": repository, "config": config, "split": split, "offset": offset, "length": ROWS_A_PAGE}
    page, revision = fetch(f"{SERVER.rstrip('/')}/rows?{urlencode(query)}", repository)
    if not is_whole(page, offset):
        raise InputError(f"the dataset viewer does not give {repository} whole from row {offset} on (rows are missing "
                         "or cut short): try again later, or download the set and give a local file with its columns")
    page["revision"] = revision
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(page), encoding="utf-8")
    os.replace(part, file)  # in one step: another process sees the whole page or none
    return page


def is_whole(page, offset):
    """Whether a JSON value is a page from row `offset` on, with all its rows uncut."""
    with suppress(TypeError, KeyError):  # if it is of another shape
        rows = [served["row_idx"] for served in page["rows"]
                if not served["truncated_cells"] and isinstance(served["row"], dict)]
        return not page["partial"] and rows == list(range(offset, min(offset + ROWS_A_PAGE, page["num_rows_total"])))


def fetch(url, repository):
    """The JSON value at a URL, and its revision; tried again after a pause if the server is busy or the reply is cut.

    Raises InputError if the data set is closed to the user, or if every try fails.
    """
    request = Request(url)
    for name, value in build_hf_headers(library_name="minimas", library_version=__version__).items():
        request.add_unredirected_header(name, value)  # the token is for this host only, not for one it redirects to
    for attempt in range(1, TRIES + 1):
        try:
            with urlopen(request, timeout=60) as reply:
                return json.loads(reply.read()), reply.headers.get("X-Revision")
        except (OSError, http.client.HTTPException, ValueError) as e:  # a status, no or a cut connection, half a reply
            status, after = (e.code, e.headers.get("Retry-After", "")) if isinstance(e, HTTPError) else (None, "")
            if status and status < 500 and status != 429:
                raise InputError(f"{repository} is gated, closed to you or unknown (status {status}): accept its terms "
                                 "on its page on the hub, then log in with `hf auth login` or HF_TOKEN; or give a "
                                 "local file") from e
            if attempt == TRIES:
                raise unreachable(repository, "a page", f"{e!r}, {TRIES} times; what came is kept", "dataset") from e
            time.sleep(min(int(after) if after.isdecimal() else 2 ** (attempt - 1), LONGEST_WAIT))
