"""The HTTP side of `daybreak serve`: Starlette for the routes, uvicorn for the socket.

It listens on loopback unless a key is set (network.py). It allows no other origin (CORS) and reads only JSON bodies,
so no other page's script gets an answer.
"""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from daybreak.images.codec import Codec
from daybreak.interop import Model
from daybreak.report.page import NO_FRAME, policy_of
from daybreak.report.watch import LOOPBACK, address, network_key
from daybreak.serve.adapters import Adapters, with_adapters
from daybreak.serve.chat import ChatAnswer, parse_chat
from daybreak.serve.completions import Answer, Completion, Refused, check_model, parse
from daybreak.serve.network import MOST_OPEN, PATIENCE, Connection, Guard, listen, refusal
from daybreak.serve.pictures import DrawingAnswer, parse_drawing
from daybreak.serve.writer import MAX_REQUESTS, Job, News, Writer

MAX_BODY = 1 << 20  # bytes
GRACE = 20  # seconds that open requests have at the end
POLL = 0.5  # seconds after which the server notices that a client has left
PAGE = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
NONE: Mapping[str, Path] = {}
log = logging.getLogger("daybreak")
Chunk = dict[str, Any]


class Service:
    """The endpoints, for one model under its name, and the same with adapters under theirs."""

    def __init__(
        self, model: Model, name: str, queue: int = MAX_REQUESTS, folders: Mapping[str, Path] = NONE,
        codec: Codec | None = None,
    ) -> None:  # fmt: skip
        self.served, self.name, self.codec = with_adapters(model, name, folders), name, codec
        self.created = int(time.time())
        self.writer = Writer(model.engine, queue, Adapters(model.engine, folders).use)

    def app(self, key: str, names: Sequence[str]) -> ASGIApp:
        """The application. Clients must send the key; if it is empty, their Host header must be one of `names`."""

        @asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            loop = asyncio.get_running_loop()
            loop.set_exception_handler(lambda _, what: log.warning("serve: %s", what["message"]))
            self.writer.start()
            yield
            await asyncio.to_thread(self.writer.stop)

        async def refused(_: Request, error: Exception) -> Response:
            if isinstance(error, HTTPException):
                there = "/v1/models, /v1/completions, /v1/chat/completions, /v1/images/generations and /health"
                return refusal(Refused(error.status_code, f"{error.detail}; there are {there}."), error.headers)
            if isinstance(error, ClientDisconnect):
                return Response(status_code=499)  # nobody reads it
            return refusal(error if isinstance(error, Refused) else Refused(500, "a bug; the server's log says more."))

        routes = [
            Route("/", self.page),
            Route("/v1", self.page),
            Route("/health", self.health),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.models),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/images/generations", self.images, methods=["POST"]),
        ]
        handlers: dict[Any, Any] = dict.fromkeys((Refused, HTTPException, ClientDisconnect, Exception), refused)
        return Guard(Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan), key, names)

    async def page(self, _: Request) -> Response:
        """The page for a browser."""
        return HTMLResponse(PAGE, headers={"Content-Security-Policy": policy_of(PAGE) + NO_FRAME})

    async def health(self, _: Request) -> Response:
        """The answer for a load balancer: 200 while requests can be served."""
        if not self.writer.is_alive():
            raise Refused(503, "the model is not running; restart the server.")
        return JSONResponse({"status": "ok"})

    async def models(self, request: Request) -> Response:
        """All models as a list, or one."""
        cards = {name: {"id": name, "object": "model", "created": self.created, "owned_by": "daybreak",
                        "max_model_len": engine.T, "chat": template is not None, "draws": self.codec is not None}
                 for name, (engine, _, template) in self.served.items()}  # fmt: skip
        asked = request.path_params.get("name")
        if asked is not None:
            check_model({"model": asked}, *cards)
        return JSONResponse(cards[asked] if asked else {"object": "list", "data": list(cards.values())})

    async def completions(self, request: Request) -> Response:
        """Answer a request for completions, whole or as a stream."""
        return await self._answer(request, Answer, lambda body, name, model: parse(
            body, name, model.tokenizer, model.engine.T, model.engine.cfg.V))  # fmt: skip

    async def chat(self, request: Request) -> Response:
        """Answer a request for chat completions, in the same ways."""
        return await self._answer(request, ChatAnswer, lambda body, name, model: parse_chat(
            body, name, model.tokenizer, model.template, model.engine.T, model.engine.cfg.V))  # fmt: skip

    async def images(self, request: Request) -> Response:
        """Answer a request for pictures."""
        return await self._answer(
            request, DrawingAnswer, lambda body, name, model: parse_drawing(body, name, model, self.codec)
        )

    async def _answer(
        self, request: Request, form: type[Answer], parse: Callable[[Any, str, Model], Completion]
    ) -> Response:
        body = await _body(request)
        busy = Refused(429, "too many requests are waiting; try again later.", None, "rate_limit_exceeded")
        if self.writer.full:
            raise busy

        def read() -> tuple[str, Completion]:
            given = _json(body)
            if isinstance(given, dict):
                check_model(given, *self.served)
            name = given["model"] if isinstance(given, dict) else self.name
            return name, parse(given, name, self.served[name])

        name, asked = await asyncio.to_thread(read)  # in a thread, so that others are answered meanwhile
        answer = form(asked, name)
        queue, loop = asyncio.Queue[News](), asyncio.get_running_loop()

        def tell(news: News) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, news)

        job = Job(
            asked.texts("" if name == self.name else name), tell, score=asked.echo and asked.how.logprobs is not None
        )
        if not self.writer.submit(job):
            raise busy
        chunks = _chunks(request, job, queue, answer)
        if asked.stream:
            at_once = {"X-Accel-Buffering": "no"}  # nginx would hold back a stream until it has 4 KiB of it
            return StreamingResponse(_events(chunks, answer, asked), headers=at_once, media_type="text/event-stream")
        async for _ in chunks:
            pass
        return JSONResponse(await asyncio.to_thread(answer.whole))  # pictures take time


async def _chunks(request: Request, job: Job, queue: asyncio.Queue[News], answer: Answer) -> AsyncIterator[Chunk]:
    """The answer piece by piece. Generation ends when the client has left."""
    left, asked = len(job.texts), time.monotonic()
    try:
        while left:
            news = None
            with suppress(TimeoutError):
                news = await asyncio.wait_for(queue.get(), POLL)
            if time.monotonic() - asked > POLL:
                asked = time.monotonic()
                if await request.is_disconnected():
                    raise ClientDisconnect
            if news is None:
                continue
            if news.done == "error":
                raise Refused(500, "writing failed; the server's log says why.")
            left -= bool(news.done)
            yield answer.chunk(news)
    finally:
        job.cancelled = True


async def _events(chunks: AsyncIterator[Chunk], answer: Answer, asked: Completion) -> AsyncIterator[str]:
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


async def _body(request: Request) -> bytes:
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "the body must be JSON; send Content-Type: application/json.")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise Refused(413, f"the body must be at most {MAX_BODY} bytes.")
    return bytes(body)


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not JSON ({error}).") from None


def serve(model: Model, name: str, *, host: str, port: int, queue: int = MAX_REQUESTS,
          folders: Mapping[str, Path] = NONE, names: Sequence[str] = (), codec: Codec | None = None,
          ready: Callable[[str], None] = lambda url: None) -> None:  # fmt: skip
    """Serve until SIGTERM or Ctrl-C; open requests then have GRACE seconds. `ready` is called with the address.

    folders: of adapters, by name, for which the engine has room. port: 0 takes a free one. queue: the most open
    requests. names: further host names that clients may use. codec: of the model's pictures, if it draws. The key is
    taken from the environment. Raises ConfigError for a host other than loopback without a key, and for an address that
    cannot be used.
    """
    key, sock = network_key(host), listen(host, port)
    config = uvicorn.Config(
        Service(model, name, queue, folders, codec).app(key, [*LOOPBACK, host, *names]), http=Connection, ws="none",
        lifespan="on", log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=GRACE,
        timeout_keep_alive=PATIENCE, timeout_notify=1, backlog=MOST_OPEN // 2,
    )  # fmt: skip
    server = uvicorn.Server(config)

    async def every_second() -> None:
        for connection in [*server.server_state.connections]:
            connection.check()  # type: ignore[union-attr]  # of our own class

    config.callback_notify = every_second
    # From here on a signal ends the server. uvicorn raises it once more when it has restored these handlers.
    before = {s: signal.signal(s, server.handle_exit) for s in (signal.SIGTERM, signal.SIGINT)}
    ready(address(host, sock.getsockname()[1]))
    try:
        server.run([sock])
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
