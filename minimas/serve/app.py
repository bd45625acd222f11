"""The routes: who may ask, how long a request may be, and how a response is sent."""

import asyncio
import hmac
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Iterable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ..common import InputError, parse_json
from . import protocol
from .batches import Batches, Job
from .protocol import Asked, Refused

MAX_BODY = 1 << 20  # bytes
LOOPBACK = ("127.0.0.1", "localhost", "::1")
DRAIN = 6  # seconds in which requests are answered after SIGTERM; then they are refused
LEAVE = 8  # seconds after which their connections are closed
PAGE = Path(__file__).with_name("page.html")


class App:
    """What the routes do.

    key      that a client must have; None asks for none
    origins  of pages that browsers may let ask, besides our own; "*" is any
    hosts    names under which it may be asked; None is any
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
        self.origins = tuple(origins)
        self.hosts = hosts

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
                Route("/v1/models/{model:path}", self.model),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/completions", self.completions, methods=["POST"]),
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

    # Who may ask

    def check(self, request: Request, key: bool = True) -> None:
        """Refused if a browser asks for a page of somebody else's, or if the key is wrong.

        A page can send requests to 127.0.0.1 without being allowed to read the answers, and by a name of its own that
        leads there it could read them too.
        """
        host = address_of(f"//{request.headers.get('host', '')}").hostname
        if self.hosts is not None and host not in self.hosts:
            known = ", ".join(self.hosts)
            raise Refused(403, f"the host is {host!r}, expected {known}")
        origin = request.headers.get("origin")
        if origin is not None and not self.may_ask(origin, request.headers.get("host")):
            message = f"a page of {origin} may not ask: start the server with --allow-origin"
            raise Refused(403, message)
        if key and self.key is not None:
            given = request.headers.get("authorization", "").encode("latin-1")
            if not hmac.compare_digest(given, b"Bearer " + self.key.encode()):
                message = "the API key is missing or wrong: send the server's as a bearer token"
                raise Refused(401, message, code="invalid_api_key")

    def may_ask(self, origin: str, host: str | None) -> bool:
        """Whether a page of this origin may ask: ours, or one that was allowed."""
        return address_of(origin).netloc == host or not {origin, "*"}.isdisjoint(self.origins)

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

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        return await self.complete(request, is_chat=True)

    async def completions(self, request: Request) -> Response:
        """Answer prompts."""
        return await self.complete(request, is_chat=False)

    async def complete(self, request: Request, is_chat: bool) -> Response:
        """Check a request, let it wait for its turn, and answer it."""
        self.check(request)
        try:
            body = parse_json(await body_of(request), "the body")
        except InputError as e:
            raise Refused(400, str(e)) from e
        asked = protocol.read(body, self.batches.served, is_chat)
        job = Job(asked)
        self.batches.add(job)
        events = events_of(job, request)
        first = await anext(events)
        if asked.stream and first[0] not in ("error", "left"):
            headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
            pieces = stream(asked, first, events)
            return StreamingResponse(pieces, headers=headers, media_type="text/event-stream")
        async with aclosing(events):
            return await whole(asked, first, events)


def address_of(text: str) -> SplitResult:
    """The parts of an address that a header holds; Refused if it is none."""
    try:
        return urlsplit(text)
    except ValueError:  # such as a bracket that is never closed
        raise Refused(400, f"a header holds {text!r:.80}, which is no address") from None


def model_object(name: str) -> dict[str, Any]:
    """What the protocol says of a model."""
    return {"id": name, "object": "model", "created": 0, "owned_by": "minimas"}


# A request and its response


async def body_of(request: Request) -> bytes:
    """The body of a request; Refused if it is too long."""
    parts = []
    left = MAX_BODY
    try:
        async for part in request.stream():
            left -= len(part)
            if left < 0:
                raise Refused(413, f"the body is too long: expected at most {MAX_BODY} bytes")
            parts.append(part)
    except ClientDisconnect as e:
        raise Refused(400, "the body has no end") from e
    return b"".join(parts)


async def events_of(job: Job, request: Request) -> AsyncGenerator[tuple, None]:
    """The events of a job. Its client has left when the connection is closed, or when no more of them are wanted."""
    watch = asyncio.create_task(leave_with(request, job))
    try:
        while True:
            yield await job.events.get()
    finally:
        job.left = True
        watch.cancel()


async def leave_with(request: Request, job: Job) -> None:
    """Let a job's client leave as soon as its connection is closed."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    job.leave()


async def whole(asked: Asked, first: tuple, events: AsyncIterator[tuple]) -> Response:
    """The response in one piece."""
    choices = {}
    event = first
    while event[0] == "end":
        _, index, *rest = event
        choices[index] = protocol.choice(asked, index, *rest)
        event = await anext(events)
    if event[0] == "error":
        raise event[1]
    if event[0] == "left":
        return Response(status_code=499)
    ordered = [choices[index] for index in sorted(choices)]
    return JSONResponse(protocol.response(asked, ordered, event[1]))


async def stream(
    asked: Asked, first: tuple, events: AsyncGenerator[tuple, None]
) -> AsyncIterator[str]:
    """The response as server-sent events."""
    async with aclosing(events):
        if asked.is_chat:
            for index in range(asked.n):
                yield protocol.chunk(asked, index)
        event = first
        while event[0] in ("text", "end"):
            if event[0] == "text":
                yield protocol.chunk(asked, event[1], event[2])
            else:
                _, index, _, reason, own = event
                yield protocol.chunk(asked, index, reason=reason, own=own)
            event = await anext(events)
        if event[0] == "usage":
            yield protocol.last_chunk(asked, event[1])
        elif event[0] == "error":
            yield protocol.event(event[1].body())


# Errors


async def answer_refused(request: Request, error: Exception) -> Response:
    """The error object of a request that is refused, by us or by the router."""
    headers = {}
    if isinstance(error, HTTPException):
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


def serve_on(sock: socket.socket, app: App, ready: Callable[[], object]) -> None:
    """Serve on a socket until SIGINT or SIGTERM, which is raised again when all is done."""
    config = uvicorn.Config(
        app.starlette(),
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="on",
        timeout_graceful_shutdown=LEAVE,
    )
    Server(config, app, ready).run([sock])
