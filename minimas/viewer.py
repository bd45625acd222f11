"""Rows of a data set that the hub holds as Parquet only, through its dataset viewer and the standard library.

GET {server}/rows?dataset=&config=&split=&offset=&length=100 (huggingface.co/docs/dataset-viewer/rows). A page, once whole, is
a file under HF_HOME/minimas/datasets: a fetch that was broken off goes on where it stopped, and a finished set needs no
network, nor is it asked for again; delete its folder to fetch it anew. HF_DATASETS_SERVER names another server.
"""

import http.client
import json
import os
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.utils import build_hf_headers

from . import InputError, __version__

SERVER = "https://datasets-server.huggingface.co"
PAGE, TRIES, LONGEST_WAIT = 100, 6, 60  # rows, requests for a page, seconds between two of them


def viewer_rows(repository, config, split):
    """The rows of a split as dicts, in their order, page by page: who stops early has fetched no more than was looked at.

    Raises InputError where the set is closed to the user, served in part, changed on the way, or cannot be reached.
    """
    folder = Path(constants.HF_HOME) / "minimas" / "datasets" / repository.replace("/", "--") / config / split
    first, offset = None, 0
    while first is None or offset < first["num_rows_total"]:
        page = read_page(folder / f"{offset}.json", repository, config, split, offset)
        first = first or page
        if any(page[name] != first[name] for name in ("num_rows_total", "revision")):
            shutil.rmtree(folder)
            raise InputError(f"{repository} changed on the hub while it was fetched: its pages are thrown away, run again")
        yield from page["rows"]
        offset += PAGE


def read_page(file, repository, config, split, offset):
    """{"num_rows_total", "revision", "rows"} of the page that starts at row `offset`: from its file, or fetched into it."""
    if file.is_file():
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except ValueError as e:
            raise InputError(f"{file} is damaged ({e}): delete it, and it is fetched again") from e
    if constants.HF_HUB_OFFLINE:
        raise InputError(f"{repository} cannot be fetched: HF_HUB_OFFLINE is set and row {offset} is not in {file.parent}; "
                         "go online once, or give a local file of the same columns")
    query = {"dataset": repository, "config": config, "split": split, "offset": offset, "length": PAGE}
    server = os.environ.get("HF_DATASETS_SERVER") or SERVER
    reply, revision = get(f"{server.rstrip('/')}/rows?{urllib.parse.urlencode(query)}", repository)
    page = checked(reply, repository, offset) | {"revision": revision}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(page), encoding="utf-8")
        os.replace(part, file)  # at once: who reads beside us sees all of it or nothing
    except OSError as e:
        raise InputError(f"{file} cannot be written ({e.strerror}): set HF_HOME to a folder with room that is yours") from e
    return page


def checked(reply, repository, offset):
    """{"num_rows_total", "rows"} of a reply that holds just the rows asked for, all of them whole."""
    try:
        total, sent = reply["num_rows_total"], reply["rows"]
        expected, numbers = list(range(offset, min(offset + PAGE, total))), [row["row_idx"] for row in sent]
        rows, columns = [row["row"] for row in sent], {name for row in sent for name in row["truncated_cells"]}
    except (KeyError, TypeError) as e:
        raise InputError(f"the dataset viewer's reply for {repository} is not one of /rows ({e!r}): check HF_DATASETS_SERVER") from e
    if reply.get("partial"):
        raise InputError(f"the dataset viewer holds only a part of {repository}: download the set and give a local file")
    if columns:
        raise InputError(f"the dataset viewer cut cells of {repository} short ({', '.join(sorted(columns))}): download the set and "
                         "give a local file")
    if numbers != expected:
        raise InputError(f"the dataset viewer sent {len(rows)} rows of {repository} from row {offset} on, but says the set has {total}: "
                         "try again later, or give a local file")
    return {"num_rows_total": total, "rows": rows}


def get(url, repository):
    """The JSON object at a URL and the revision that it tells of; busy servers and cut connections are asked again, with pauses."""
    request = urllib.request.Request(url)
    for name, value in build_hf_headers(library_name="minimas", library_version=__version__).items():
        request.add_unredirected_header(name, value)  # the token is for this host, not for where it may send us
    for attempt in range(TRIES):
        wait = 2 ** attempt
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return json.loads(reply.read()), reply.headers.get("X-Revision")
        except urllib.error.HTTPError as e:
            refuse(e.code, repository)
            trouble, after = f"status {e.code}", e.headers.get("Retry-After", "")
            wait = int(after) if after.isdecimal() else wait
        except (OSError, http.client.HTTPException, ValueError) as e:  # no connection, one that was cut, half a reply
            trouble = str(e) or type(e).__name__
        if attempt + 1 < TRIES:
            time.sleep(min(wait, LONGEST_WAIT))
    raise InputError(f"{repository} cannot be fetched ({trouble}, {TRIES} times): check the network and try again, what came is kept; "
                     "or give a local file of the same columns; --dataset tiny runs offline")


def refuse(status, repository):
    """Raise what no second try would mend."""
    if status in (401, 403):
        raise InputError(f"{repository} is gated, or private and closed to you: accept its terms on its page on the hub, then log in "
                         "with `hf auth login` or HF_TOKEN")
    if status != 429 and status < 500:
        raise InputError(f"the dataset viewer has no {repository} for you (status {status}): check its name, accept its terms on its "
                         "page on the hub if it is gated, and set HF_TOKEN; or give a local file of the same columns")
