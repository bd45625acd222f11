"""What tests of the server share, and no test: a server that runs in a thread of this process."""

import socket
import threading
from contextlib import contextmanager

import uvicorn

from minimas.serve.app import LOOPBACK, App, Server
from minimas.serve.batches import Batches
from minimas.serve.protocol import Served
from minimas.settings import Settings


@contextmanager
def running(system, batch_size=8, wait=0.01, limit=256, settings=None, **options):
    """The address of a server of `system`, as model tiny. settings: of requests that ask for none; options: of App."""
    settings = Settings(batch_size=batch_size, **settings or {})
    app = App(
        Batches({"tiny": Served(system, settings)}, batch_size, wait, limit),
        hosts=LOOPBACK,
        **options,
    )
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    config = uvicorn.Config(app.starlette(), log_level="warning", access_log=False, lifespan="on")
    ready = threading.Event()
    server = Server(config, app, ready.set)
    thread = threading.Thread(target=server.run, args=([sock],))
    thread.start()
    try:
        assert ready.wait(20)
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
