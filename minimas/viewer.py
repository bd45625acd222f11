"""Rows of a data set that the hub holds as Parquet only, through its dataset viewer and the standard library.

GET {server}/rows?dataset=&config=&split=&offset=&length=100 (huggingface.co/docs/dataset-viewer/rows). A page, once whole,
is a file under HF_HOME/minimas/datasets: a fetch that was broken off goes on where it stopped, and a finished set needs no
network, nor is it asked for again; delete its folder to fetch it anew. HF_DATASETS_SERVER names another server.
"""

import http.client
import json
import os
import time
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import Request, urlopen

from huggingface_hub import constants
from huggingface_hub.utils import build_hf_headers

from . import InputError, __version__
from .hub import unreachable

SERVER = os.environ.get("HF_DATASETS_SERVER") or "https://datasets-server.huggingface.co"
ROWS_A_PAGE, TRIES, LONGEST_WAIT = 100, 6, 60  # the most that is given; requests for a page; seconds between two of them


def viewer_rows(repository, config, split):
    """The rows of a split as dicts, in their order, page by page: who stops early has fetched no more than was looked at.

    Raises InputError where the set is closed to the user, not served whole, changed on the way, or cannot be reached.
    """
    folder = Path(constants.HF_HOME) / "minimas" / "datasets" / repository.replace("/", "--") / config / split
    first, offset = None, 0
    while first is None or offset < first["num_rows_total"]:
        page = read_page(folder / f"{offset}.json", repository, config, split, offset)
        first = first or page
        if any(page[name] != first[name] for name in ("num_rows_total", "revision")):
            raise InputError(f"{repository} changed on the hub since its first page was fetched: delete {folder}, run again")
        yield from (sent["row"] for sent in page["rows"])
        offset += ROWS_A_PAGE


def read_page(file, repository, config, split, offset):
    """The viewer's reply for the page that starts at row `offset`, with its revision: from its file, or fetched into it."""
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))
    if constants.HF_HUB_OFFLINE:
        raise unreachable(repository, f"row {offset}", f"HF_HUB_OFFLINE is set and it is not in {file.parent}", "dataset")
    query = urlencode({"dataset": repository, "config": config, "split": split, "offset": offset, "length": ROWS_A_PAGE})
    page = fetch(f"{SERVER.rstrip('/')}/rows?{query}", repository)
    whole = [sent["row_idx"] for sent in page.get("rows", []) if not sent["truncated_cells"]]
    if page.get("partial", True) or whole != list(range(offset, min(offset + ROWS_A_PAGE, page["num_rows_total"]))):
        raise InputError(f"the dataset viewer does not give {repository} whole from row {offset} on (rows missing or "
                         "cut short): try again later, or download the set and give a local file of the same columns")
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(page), encoding="utf-8")
    os.replace(part, file)  # at once: who reads beside us sees all of it or nothing
    return page


def fetch(url, repository):
    """The JSON object at a URL, with its revision; busy servers and cut connections are asked again, after pauses."""
    request = Request(url)
    for name, value in build_hf_headers(library_name="minimas", library_version=__version__).items():
        request.add_unredirected_header(name, value)  # the token is for this host, not for where it may send us
    for attempt in range(1, TRIES + 1):
        try:
            with urlopen(request, timeout=60) as reply:
                return json.loads(reply.read()) | {"revision": reply.headers.get("X-Revision")}
        except (OSError, http.client.HTTPException, ValueError) as e:  # a status, no connection, a cut one, half a reply
            status, after = (e.code, e.headers.get("Retry-After", "")) if isinstance(e, HTTPError) else (None, "")
            if status and status < 500 and status != 429:
                raise InputError(f"{repository} is gated, closed to you or unknown (status {status}): accept its terms on "
                                 "its page on the hub, then log in with `hf auth login` or HF_TOKEN; or give a file") from e
            if attempt == TRIES:
                raise unreachable(repository, "a page", f"{e!r}, {TRIES} times; what came is kept", "dataset") from e
            time.sleep(min(int(after) if after.isdecimal() else 2 ** (attempt - 1), LONGEST_WAIT))
