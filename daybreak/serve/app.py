"""The HTTP side of `daybreak serve`: Starlette for the routes, uvicorn for the socket.

Network rules: loopback unless a key is set; the Host header is checked, so that no web page can reach the server under
a name of its own; nothing is said about CORS, and only JSON bodies are read, so no other page's script gets an answer.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from daybreak.data.tokenizer import Tokenizer
from daybreak.engine import Engine
from daybreak.errors import ConfigError
from daybreak.report.watch import LOOPBACK
from daybreak.serve.completions import Answer, Completion, Refused, parse
from daybreak.serve.writer import Job, News, Writer

MAX_BODY = 1 << 20  # bytes
GRACE = 20  # seconds that requests under way have at the end
Endpoint = Callable[[Request], Awaitable[Response]]


class Service:
    """The endpoints, for one model under one name."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, name: str, key: str) -> None:
        self.engine, self.tokenizer, self.name, self.key = engine, tokenizer, name, key
        self.created, self.writer = int(time.time()), Writer(engine)

    def app(self, hosts: Sequence[str]) -> Starlette:
        """The application, for requests whose Host header names one of `hosts`."""

        @asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            self.writer.start()
            yield
            await asyncio.to_thread(self.writer.stop)

        async def refused(_: Request, error: Exception) -> Response:
            if isinstance(error, HTTPException):
                error = Refused(error.status_code, f"{error.detail}; there are /v1/models and /v1/completions.")
            assert isinstance(error, Refused)
            headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else None
            return JSONResponse(error.body(), error.status, headers)

        routes = [
            Route("/v1/models", self._guarded(self.models)),
            Route("/v1/models/{name:path}", self._guarded(self.models)),
            Route("/v1/completions", self._guarded(self.completions), methods=["POST"]),
        ]
        checked = Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)
        handlers: dict[Any, Any] = {Refused: refused, HTTPException: refused}
        return Starlette(routes=routes, middleware=[checked], exception_handlers=handlers, lifespan=lifespan)

    def _guarded(self, endpoint: Endpoint) -> Endpoint:
        async def guarded(request: Request) -> Response:
            given = request.headers.get("authorization", "")
            if self.key and not hmac.compare_digest(given.encode(), f"Bearer {self.key}".encode()):
                said = "the API key is missing or wrong; send Authorization: Bearer KEY."
                raise Refused(401, said, None, "invalid_api_key")
            return await endpoint(request)

        return guarded

    async def models(self, request: Request) -> Response:
        """The one model, alone or as a list."""
        model = {"id": self.name, "object": "model", "created": self.created, "owned_by": "daybreak"}
        asked = request.path_params.get("name")
        if asked not in (None, self.name):
            raise Refused(404, f"model {asked!r} is not served here; use {self.name!r}.", "model", "model_not_found")
        return JSONResponse(model if asked else {"object": "list", "data": [model]})

    async def completions(self, request: Request) -> Response:
        """Texts that follow prompts."""
        asked = parse(await _json(request), self.name, self.tokenizer, self.engine.T, self.engine.cfg.V)
        head = {"id": f"cmpl-{uuid4().hex}", "object": "text_completion", "created": int(time.time())}
        answer = Answer(asked, self.tokenizer, {**head, "model": self.name})
        queue, loop = asyncio.Queue[News](), asyncio.get_running_loop()

        def tell(news: News) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, news)

        job = Job(asked.texts(self.tokenizer), tell, score=asked.echo and asked.how.logprobs is not None)
        if not self.writer.submit(job):
            raise Refused(429, "too many requests are waiting; try again later.", None, "rate_limit_exceeded")
        chunks = _chunks(request, job, queue, answer)
        if asked.stream:
            return StreamingResponse(_events(chunks, answer, asked), media_type="text/event-stream")
        try:
            async for _ in chunks:
                pass
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        return JSONResponse(answer.whole())


async def _chunks(
    request: Request, job: Job, queue: asyncio.Queue[News], answer: Answer
) -> AsyncIterator[dict[str, Any]]:
    """The answer piece by piece. Writing ends when the client has gone."""
    left = len(job.texts)
    try:
        while left:
            try:
                news = await asyncio.wait_for(queue.get(), 0.5)
            except TimeoutError:
                if await request.is_disconnected():
                    raise ClientDisconnect from None
                continue
            if news.done == "error":
                raise Refused(500, "writing failed; the server's log says why.")
            left -= bool(news.done)
            yield answer.chunk(news)
    finally:
        job.cancelled = True


async def _events(chunks: AsyncIterator[dict[str, Any]], answer: Answer, asked: Completion) -> AsyncIterator[str]:
    try:
        async for chunk in chunks:
            yield f"data: {json.dumps(chunk)}\n\n"
        if asked.usage:
            yield f"data: {json.dumps({**answer.head, 'choices': [], **answer.usage()})}\n\n"
    except ClientDisconnect:
        return
    except Refused as error:
        yield f"data: {json.dumps(error.body())}\n\n"
    yield "data: [DONE]\n\n"


async def _json(request: Request) -> Any:
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "the body must be JSON; send Content-Type: application/json.")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise Refused(413, f"the body must be at most {MAX_BODY} bytes.")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not JSON ({error}).") from None


def serve(engine: Engine, tokenizer: Tokenizer, name: str, *, host: str, port: int, key: str = "",
          names: Sequence[str] = (), ready: Callable[[str], None] = lambda url: None) -> None:  # fmt: skip
    """Serve until SIGTERM or Ctrl-C; requests under way then have GRACE seconds. `ready` is told the address.

    port 0 takes a free one; names: further values of the Host header. Raises ConfigError for a host other than loopback
    without a key, or an address that cannot be had.
    """
    if host not in LOOPBACK and not key:
        raise ConfigError(
            f"--host {host} is reachable from outside; set DAYBREAK_API_KEY, which clients must send then."
        )
    try:
        sock = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise ConfigError(f"--host {host} --port {port} cannot be used ({reason}); choose others.") from None
    app = Service(engine, tokenizer, name, key).app([*LOOPBACK, "[::1]", host, *names])
    config = uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=GRACE, lifespan="on",
        headers=[("Content-Security-Policy", "default-src 'none'")],
    )  # fmt: skip
    # uvicorn raises the signal that ended it once more, when it has put back the handlers it found.
    before = {s: signal.signal(s, lambda *_: None) for s in (signal.SIGTERM, signal.SIGINT)}
    ready(f"http://{f'[{host}]' if ':' in host else host}:{sock.getsockname()[1]}/v1")
    try:
        uvicorn.Server(config).run([sock])
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
