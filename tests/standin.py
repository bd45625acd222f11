"""A stand-in for the hub on loopback: what snapshot_download asks of its API, and the files."""

import contextlib
import hashlib
import http.server
import json
import re
import threading
from urllib.parse import unquote

from huggingface_hub import constants

API = re.compile(r"/api/(models|datasets)/([^/]+)/([^/]+)/(revision|tree)/(.+)")
FILE = re.compile(r"/(datasets/)?([^/]+)/([^/]+)/resolve/([^/]+)/(.+)")


@contextlib.contextmanager
def serve(root):
    """Serves the folder root: ORG/REPOSITORY/FILE of models, datasets/ORG/REPOSITORY/FILE of data sets.

    Every revision of a repository has the same files.
    asked      the files fetched so far
    revisions  (repository, revision) of each that was asked for by its name
    tokens     what came as Authorization
    failing    {repository: (status, code), or (status, code, message)}
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        asked, revisions, tokens, failing = set(), set(), set(), {}

        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, body):
            path = unquote(self.path.split("?")[0])
            if api := API.fullmatch(path):
                kind, organisation, repository, what, revision = api.groups()
                folder, name = (
                    root.joinpath(
                        "datasets" if kind == "datasets" else "", organisation, repository
                    ),
                    None,
                )
            elif file := FILE.fullmatch(path):
                kind, organisation, repository, revision, name = file.groups()
                folder = root.joinpath(kind or "", organisation, repository)
            else:
                return self.refuse(404, "NotFound")
            self.tokens.add(self.headers.get("Authorization"))
            if repository in self.failing:
                return self.refuse(*self.failing[repository])
            if not folder.is_dir():
                return self.refuse(401, "RepoNotFound")
            if name is None:
                return self.reply(self.listing(folder, what, revision), {}, body)
            if not (folder / name).is_file():
                return self.refuse(404, "EntryNotFound")
            content = (folder / name).read_bytes()
            if body:
                self.asked.add(f"{repository}/{name}")
            self.reply(
                content,
                {
                    "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
                    "X-Repo-Commit": commit(revision),
                },
                body,
            )

        def listing(self, folder, what, revision):
            """The reply of the API: what commit a revision is, or the files of a commit."""
            files = [
                (path.relative_to(folder).as_posix(), path.read_bytes())
                for path in sorted(folder.rglob("*"))
                if path.is_file()
            ]
            if what == "tree":
                return json.dumps(
                    [
                        {
                            "type": "file",
                            "path": name,
                            "size": len(content),
                            "oid": hashlib.sha256(content).hexdigest(),
                        }
                        for name, content in files
                    ]
                ).encode()
            self.revisions.add((folder.name, revision))
            return json.dumps(
                {
                    "id": f"{folder.parent.name}/{folder.name}",
                    "sha": commit(revision),
                    "siblings": [{"rfilename": name} for name, _ in files],
                }
            ).encode()

        def reply(self, content, headers, body):
            self.send_response(200)
            for header in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(*header)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def refuse(self, status, code, message=None):
            self.send_response(status)
            for header in ("X-Error-Code", code), ("Content-Length", "0"):
                self.send_header(*header)
            if message:
                self.send_header("X-Error-Message", message)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(
        target=server.serve_forever, args=(0.01,), daemon=True
    ).start()  # shutdown() waits that many seconds
    Handler.url, Handler.root = f"http://127.0.0.1:{server.server_port}", root
    yield Handler
    server.shutdown()
    server.server_close()


def commit(revision):
    """The commit of a revision: itself, or a made-up one for a branch."""
    return (
        revision
        if re.fullmatch("[0-9a-f]{40}", revision)
        else hashlib.sha1(revision.encode()).hexdigest()
    )


def connect(monkeypatch, hub, cache):
    """huggingface_hub pointed at the stand-in, with an empty cache, and no pauses between its tries;
    returns those it would make.
    """
    pauses = []
    # the environment of a machine without network may say otherwise
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        hub.url + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("time.sleep", pauses.append)
    return pauses
