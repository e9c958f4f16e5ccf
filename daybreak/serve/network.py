"""The network's rules for `daybreak serve`: keys, host names, time limits, and the form of every refusal."""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import resource
import socket
from collections.abc import Mapping, Sequence

import h11
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from daybreak.errors import ConfigError
from daybreak.report.watch import HEADERS, known_host
from daybreak.serve.completions import Refused

PATIENCE = 20  # seconds for a client to send a request
FILES = resource.getrlimit(resource.RLIMIT_NOFILE)[0]  # -1: any number
MOST_OPEN = 256 if FILES < 0 else min(256, FILES // 3)  # connections at a time, beside those that begin or end
OPEN = ("/", "/v1", "/health")  # paths that need no key


def refusal(error: Refused, headers: Mapping[str, str] | None = None) -> Response:
    """The answer to a request that is refused."""
    more = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}.get(error.status, {})
    return Response(json.dumps(error.body()), error.status, {**(headers or {}), **more}, "application/json")


class Guard:
    """Lets requests through that send the key. Without a key, their Host header must be one of `names`."""

    def __init__(self, app: ASGIApp, key: str, names: Sequence[str]) -> None:
        self.app, self.key, self.names = app, key, names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                for name, value in HEADERS.items():
                    MutableHeaders(scope=message).setdefault(name, value)
            await send(message)

        try:
            if scope["type"] == "http":
                self._check(Headers(scope=scope), scope["path"])
        except Refused as error:
            await refusal(error)(scope, receive, sending)
        else:
            await self.app(scope, receive, sending)

    def _check(self, headers: Headers, path: str) -> None:
        host = headers.get("host", "")
        if not self.key and not known_host(host, self.names):
            said = f"the name {host[:100]!r} is not known here; start the server with --allow-host or DAYBREAK_KEY."
            raise Refused(400, said)
        given = headers.get("authorization", "").encode("latin-1")
        if self.key and path not in OPEN and not hmac.compare_digest(given, f"Bearer {self.key}".encode()):
            said = "the API key is missing or wrong; send Authorization: Bearer KEY."
            raise Refused(401, said, None, "invalid_api_key")


class Connection(H11Protocol):
    """HTTP/1.1 with one client.

    If too many connections are open, the oldest one without a request under way ends, so that idle ones block nobody.
    `check` ends a connection that has sent no whole request for PATIENCE seconds.
    """

    since = 0.0  # the time when the client came, or was answered last

    @property
    def busy(self) -> bool:
        """Whether a whole request is being answered."""
        return self.cycle is not None and not self.cycle.more_body and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Note when a client came, and make room for it."""
        super().connection_made(transport)
        self.since = self.loop.time()
        if len(self.connections) > MOST_OPEN:
            oldest = min((c for c in self.connections if isinstance(c, Connection)), key=lambda c: (c.busy, c.since))
            self.connections.discard(oldest)
            oldest.transport.abort()

    def on_response_complete(self) -> None:
        """Note when an answer was sent."""
        self.since = self.loop.time()
        super().on_response_complete()

    def check(self) -> None:
        """End a connection that is too slow. Called every second."""
        if not self.busy and self.loop.time() - self.since > PATIENCE:
            self._end(408, "Request Timeout", f"no whole request came within {PATIENCE} seconds.")

    def send_400_response(self, msg: str) -> None:
        """Refuse bytes that are not HTTP."""
        self._end(400, "Bad Request", msg)

    def _end(self, status: int, phrase: str, message: str) -> None:
        begun = self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE)
        if begun or self.transport.is_closing():
            return self.transport.abort()
        body = json.dumps(Refused(status, message).body())
        head = f"HTTP/1.1 {status} {phrase}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        self.transport.write(f"{head}\r\nConnection: close\r\n\r\n{body}".encode())
        return self.transport.close()


def listen(host: str, port: int) -> socket.socket:
    """A listening socket whose connections send without waiting. Raises ConfigError."""
    try:
        sock = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise ConfigError(f"--host {host} --port {port} cannot be used ({reason}); choose others.") from None
    # asyncio sets this only for sockets that name their protocol; connections inherit it from this one.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock
