"""A stand-in for the hub on loopback:
files as hf_hub_download asks for them, rows as its dataset viewer serves them.
"""

import contextlib
import hashlib
import http.server
import json
import re
import threading
from urllib.parse import parse_qs, unquote, urlsplit

from huggingface_hub import constants


@contextlib.contextmanager
def serve(root):
    """Serves the folder root: ORG/REPOSITORY/FILE of models, datasets/ORG/REPOSITORY/FILE of data sets.

    asked    the files fetched so far
    failing  {repository: (status, code)}
    sets     {(repository, config, split): rows}
    moods    what becomes of the next requests for rows, None is well; see rows()
    pages    (offset, Authorization) of the requests for rows so far; retry_after goes with status 429
    """
    class Handler(http.server.BaseHTTPRequestHandler):
        asked, failing, sets, moods, pages, retry_after = set(), {}, {}, [], [], "7"

        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            if urlsplit(self.path).path == "/rows":
                return self.rows({name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()})
            self.answer(body=True)

        def answer(self, body):
            path = re.fullmatch(r"/(datasets/)?([^/]+)/([^/]+)/resolve/([^/]+)/(.+)", unquote(self.path.split("?")[0]))
            if not path:
                return self.refuse(404, "NotFound")
            kind, organisation, repository, revision, name = path.groups()
            file = root.joinpath(kind or "", organisation, repository, name)
            if repository in self.failing:
                return self.refuse(*self.failing[repository])
            if not file.parent.is_dir():
                return self.refuse(401, "RepoNotFound")
            if not file.is_file():
                return self.refuse(404, "EntryNotFound")
            content = file.read_bytes()
            self.send_response(200)
            commit = "c" * 40 if revision == "main" else revision
            for header in (("ETag", f'"{hashlib.sha256(content).hexdigest()}"'),
                           ("X-Repo-Commit", commit),
                           ("Content-Length", str(len(content)))):
                self.send_header(*header)
            self.end_headers()
            if body:
                self.asked.add(f"{repository}/{name}")
                self.wfile.write(content)

        def rows(self, query):
            """A mood is a status, `cut` in the middle, `dropped` before the start, a URL to redirect to,
            or a change of the reply.
            """
            self.pages.append((int(query["offset"]), self.headers.get("Authorization")))
            mood = self.moods.pop(0) if self.moods else None
            everything = self.sets.get((query["dataset"], query["config"], query["split"]))
            if mood == "dropped":
                return
            if isinstance(mood, str) and mood.startswith("http"):
                return self.refuse(307, "Moved", Location=mood + self.path)
            if isinstance(mood, int) or everything is None:
                return self.refuse(mood or 404, "ResponseNotReady",
                                   **{"Retry-After": self.retry_after} if mood == 429 else {})
            first, length = int(query["offset"]), int(query["length"])
            if length > 100:
                return self.refuse(422, "InvalidParameter")
            reply = {"features": [], "num_rows_total": len(everything), "num_rows_per_page": 100, "partial": False,
                     "rows": [{"row_idx": n, "row": row, "truncated_cells": []}
                              for n, row in enumerate(everything[first:first + length], first)]}
            content = json.dumps(mood(reply) if callable(mood) else reply).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("X-Revision", "r" * 40)
            self.end_headers()
            self.wfile.write(content[:len(content) // 2] if mood == "cut" else content)

        def refuse(self, status, code, **headers):
            self.send_response(status)
            for header in {"X-Error-Code": code, "Content-Length": "0", **headers}.items():
                self.send_header(*header)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever,
                     args=(0.01,), daemon=True).start()  # shutdown() waits that many seconds
    Handler.url, Handler.root = f"http://127.0.0.1:{server.server_port}", root
    yield Handler
    server.shutdown()
    server.server_close()


def connect(monkeypatch, hub, cache):
    """huggingface_hub pointed at the stand-in, with an empty cache, and no pauses between its tries;
    returns those it would make.
    """
    pauses = []
    # the environment of a machine without network may say otherwise
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("time.sleep", pauses.append)
    return pauses
