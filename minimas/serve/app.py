"""The routes: who may ask, how long a request may be, and how a response is sent."""

import asyncio
import hmac
import logging
import signal
import socket
import threading
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Collection,
    Generator,
    Iterable,
)
from contextlib import aclosing, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from uvicorn.server import HANDLED_SIGNALS

from ..common import InputError, parse_json
from . import protocol
from .batches import Batches
from .job import Item, Job
from .protocol import Refused

MAX_BODY = 1 << 20  # bytes
LOOPBACK = ("127.0.0.1", "localhost", "::1")
DRAIN = 6  # seconds in which requests are answered after a signal; then they are refused
LEAVE = 8  # seconds after which their connections are closed
PAGE = Path(__file__).with_name("page.html")


class App:
    """What the routes do.

    key      that a client must have; None asks for none
    origins  of pages that browsers may let ask, besides our own; "*" is any
    hosts    names under which it may be asked, in any case; None is any
    """

    def __init__(
        self,
        batches: Batches,
        key: str | None = None,
        origins: Iterable[str] = (),
        hosts: Collection[str] | None = None,
    ) -> None:
        self.batches = batches
        self.key = key
        self.origins = [origin.rstrip("/") for origin in origins]
        self.hosts: list[str] | None = None
        if hosts is not None:
            self.hosts = list(dict.fromkeys(name.lower() for name in hosts))

    def starlette(self) -> Starlette:
        """The ASGI application."""
        middleware = []
        if self.origins:
            allowed: Any = {"allow_methods": ["*"], "allow_headers": ["*"]}
            middleware.append(Middleware(CORSMiddleware, allow_origins=self.origins, **allowed))
        return Starlette(
            routes=[
                Route("/", self.page),
                Route("/traces/{name}", self.trace),
                Route("/v1/models", self.models),
                Route("/v1/models/{model}", self.model),
                Route(
                    "/v1/chat/completions", partial(self.complete, is_chat=True), methods=["POST"]
                ),
                Route("/v1/completions", partial(self.complete, is_chat=False), methods=["POST"]),
            ],
            middleware=middleware,
            exception_handlers={
                Refused: answer_refused,
                HTTPException: answer_refused,
                Exception: answer_fault,
            },
            lifespan=self.lifespan,
        )

    @asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        """While the server runs, so does the thread that answers."""
        self.batches.start()
        yield
        self.batches.stop()

    def check(self, request: Request, key: bool = True) -> None:
        """Refused if the server was reached by a name that is not its own, or if the key is wrong.

        A page of somebody else could reach it on 127.0.0.1 by a name of its own that leads there.
        """
        host = host_of(request)
        if self.hosts is not None and host not in self.hosts:
            raise Refused(403, f"the host is {host!r}, expected {', '.join(self.hosts)}")
        if key and self.key is not None:
            given = request.headers.get("authorization", "").encode("latin-1")
            if not hmac.compare_digest(given, b"Bearer " + self.key.encode()):
                message = "the API key is missing or wrong: send the server's as a bearer token"
                raise Refused(401, message, code="invalid_api_key")

    # Routes

    async def page(self, request: Request) -> Response:
        """The page for people. It holds nothing that is secret."""
        self.check(request, key=False)
        return HTMLResponse(PAGE.read_bytes())

    async def trace(self, request: Request) -> Response:
        """The trace of an answer, if it is one of the latest."""
        self.check(request)
        html = self.batches.traces.get(request.url.path)
        if html is None:
            raise Refused(404, "there is no such trace: only the latest are kept")
        return HTMLResponse(html)

    async def models(self, request: Request) -> Response:
        """All models."""
        self.check(request)
        data = [model_object(name) for name in self.batches.served]
        return JSONResponse({"object": "list", "data": data})

    async def model(self, request: Request) -> Response:
        """One model."""
        self.check(request)
        name = request.path_params["model"]
        protocol.served_as(name, self.batches.served)
        return JSONResponse(model_object(name))

    async def complete(self, request: Request, is_chat: bool) -> Response:
        """Check a request, let it wait for its turn, and answer it."""
        self.check(request)
        body = await json_of(request)
        # In a thread, since a long text takes long to encode
        asked = await asyncio.to_thread(protocol.read, body, self.batches.served, is_chat)
        job = Job(asked)
        self.batches.add(job)
        items = items_of(job, request)
        first = await anext(items, None)
        if isinstance(first, str):
            headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
            events = events_from(first, items)
            return StreamingResponse(events, headers=headers, media_type="text/event-stream")
        await items.aclose()
        if isinstance(first, Refused):
            raise first
        if first is None:  # the client has left
            return Response(status_code=499)
        return JSONResponse(first)


def host_of(request: Request) -> str | None:
    """The name by which the server was reached, in lower case."""
    host = request.headers.get("host", "")
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError as e:  # such as a bracket that is never closed
        raise Refused(400, f"the host is {host!r:.80}, which is no address") from e


def model_object(name: str) -> dict[str, Any]:
    """What the protocol says of a model."""
    return {"id": name, "object": "model", "created": 0, "owned_by": "minimas"}


# A request and its response


async def json_of(request: Request) -> Any:
    """The body of a request; Refused if it is no JSON or too long.

    A browser asks us before it sends JSON for a page of somebody else. It would not ask for other types.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refused(415, f"the Content-Type is {kind!r:.80}, expected application/json")
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > MAX_BODY:
                raise Refused(413, f"the body is too long: expected at most {MAX_BODY} bytes")
        return parse_json(bytes(body), "the body")
    except ClientDisconnect as e:
        raise Refused(400, "the body has no end") from e
    except InputError as e:
        raise Refused(400, str(e)) from e


async def items_of(job: Job, request: Request) -> AsyncGenerator[Item, None]:
    """What a job's connection sends, until the client goes away or no more is wanted."""
    watch = asyncio.create_task(leave_with(request, job))
    try:
        while (item := await job.queue.get()) is not None:
            yield item
    finally:
        job.over = True
        watch.cancel()


async def leave_with(request: Request, job: Job) -> None:
    """Let a job's client leave as soon as its connection is closed."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    job.leave()


async def events_from(first: str, others: AsyncGenerator[Item, None]) -> AsyncIterator[str]:
    """The events of a stream. An error ends it: its status is sent already, so the error comes as an event."""
    async with aclosing(others):
        yield first
        async for item in others:
            if isinstance(item, Refused):
                yield protocol.event(item.body())
                return
            assert isinstance(item, str), "the job of a stream has nothing but events"
            yield item


# Errors


async def answer_refused(request: Request, error: Exception) -> Response:
    """The error object of a request that is refused, by us or by the router."""
    headers = {}
    if isinstance(error, HTTPException):
        headers = dict(error.headers or {})
        error = Refused(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
    assert isinstance(error, Refused), "the handler is registered for both"
    if error.status == 429:
        headers["retry-after"] = "1"
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error.body(), error.status, headers)


async def answer_fault(request: Request, error: Exception) -> Response:
    """The error object of a fault of ours, which Starlette raises again for the log."""
    fault = Refused(500, "an error inside the server, which has logged it")
    return JSONResponse(fault.body(), fault.status)


# The server


class Server(uvicorn.Server):
    """uvicorn, which also says when it is ready, and refuses what cannot be answered in time when it ends."""

    def __init__(self, config: uvicorn.Config, app: App, ready: Callable[[], object]) -> None:
        super().__init__(config)
        self.app = app
        self.ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().call_later(DRAIN, self.app.batches.stop)
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Within, SIGINT, SIGTERM and SIGHUP end the server, but one that the process ignores stays ignored."""
        ignored = [one for one in HANDLED_SIGNALS if signal.getsignal(one) is signal.SIG_IGN]
        with super().capture_signals():
            for one in ignored:
                if signal.getsignal(one) is not signal.SIG_IGN:  # it is, in a thread
                    signal.signal(one, signal.SIG_IGN)
            with self.capture_hangup():
                yield

    @contextmanager
    def capture_hangup(self) -> Generator[None, None, None]:
        """Within, SIGHUP ends the server. uvicorn leaves it out, but raises again whatever `handle_exit` was given."""
        number = getattr(signal, "SIGHUP", None)  # it is not everywhere
        in_main_thread = threading.current_thread() is threading.main_thread()
        if number is None or not in_main_thread or signal.getsignal(number) is signal.SIG_IGN:
            yield
            return
        before = signal.signal(number, self.handle_exit)
        try:
            yield
        finally:
            signal.signal(number, before)


def is_no_noise(record: logging.LogRecord) -> bool:
    """A filter for asyncio's logger, without which it warns of each event for a client that has left its stream."""
    return record.getMessage() != "socket.send() raised exception."


def serve_on(sock: socket.socket, app: App, ready: Callable[[], object]) -> None:
    """Serve on a socket until SIGINT, SIGTERM or SIGHUP, which is raised again when all is done."""
    config = uvicorn.Config(
        app.starlette(),
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="on",
        timeout_graceful_shutdown=LEAVE,
    )
    logging.getLogger("asyncio").addFilter(is_no_noise)
    Server(config, app, ready).run([sock])
