"""`daybreak watch`: the report's page, live, from a server on this machine.

It answers two addresses, the page and its data. It listens on loopback unless another host is asked for, and that needs
a key from the environment. Without a key it checks the Host header, so that another page cannot read anything under a
name of its own that leads here. No other origin is allowed in, and the policy lets the page run only its own scripts.

`daybreak serve` imports the rules of the network (keys, names, headers) from here.
"""

from __future__ import annotations

import hmac
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote

from daybreak.errors import ConfigError, explained
from daybreak.report.page import page_data, render, to_json, version
from daybreak.report.series import Follower

LOOPBACK = ("127.0.0.1", "localhost", "::1")
KEYS = ("DAYBREAK_KEY", "DAYBREAK_API_KEY")  # the second is its name in 0.1.0
SHORTEST_KEY = 16
NOTHING = "default-src 'none'"
HEADERS = {
    "Content-Security-Policy": NOTHING, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer", "Cross-Origin-Resource-Policy": "same-origin",
}  # fmt: skip
MOST_OPEN, PATIENCE = 128, 60  # connections at a time, and seconds that one may last
log = logging.getLogger("daybreak")


def network_key(host: str) -> str:
    """The key that clients must send, from the environment; empty if none is set.

    Raises ConfigError for a short key, and for a host other than loopback without one.
    """
    name = next((name for name in KEYS if os.environ.get(name)), KEYS[0])
    key = os.environ.get(name, "").strip()
    if len(key) < SHORTEST_KEY and (key or host not in LOOPBACK):
        why = f"{name} is too short" if host in LOOPBACK else f"--host {host} lets others in"
        raise ConfigError(f"{why}: set {name} to a secret of {SHORTEST_KEY} or more characters first.")
    return key


def known_host(header: str, names: Sequence[str]) -> bool:
    """Whether a Host header, with or without a port, is one of `names`."""
    name = header if header.endswith("]") else header.rpartition(":")[0] or header
    return name.strip("[]").lower() in {known.strip("[]").lower() for known in names}


def address(host: str, port: int) -> str:
    """The URL of a server on `host`. It has this machine's own name if the server listens everywhere."""
    name = socket.gethostname() if host in ("0.0.0.0", "::") else host
    return f"http://{f'[{name}]' if ':' in name else name}:{port}/"


class Watch(ThreadingHTTPServer):
    """A server for runs. names: further host names that clients may use. Raises ConfigError if it may not or cannot
    listen."""

    daemon_threads = True

    def __init__(self, paths: Sequence[str], host: str = "127.0.0.1", port: int = 0, names: Sequence[str] = ()) -> None:
        self.runs, self.key = [Follower(path) for path in paths], network_key(host)
        self.names, self.reading = [*LOOPBACK, host, *names], threading.Lock()
        self.open: dict[Any, float] = {}  # connections, the oldest first, and since when
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with explained(ConfigError, f"cannot listen on {host}:{port}", "try another --port"):
            super().__init__((host, port), _Handler)
        self.url = address(host, self.server_port) + (f"?key={quote(self.key, safe='')}" if self.key else "")

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread. If too many connections are open, the oldest one ends."""
        self.open[request] = time.monotonic()
        self.service_actions()
        super().process_request(request, client_address)

    def service_actions(self) -> None:
        """End connections that take too long. Called twice a second."""
        for request, since in [*self.open.items()]:
            if len(self.open) > MOST_OPEN or time.monotonic() - since > PATIENCE:
                self.open.pop(request, None)
                with suppress(OSError):
                    request.shutdown(socket.SHUT_RDWR)

    def shutdown_request(self, request: Any) -> None:
        """Forget a connection that is over."""
        self.open.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log an error, unless it is that a client has left."""
        if not isinstance(sys.exception(), OSError):
            log.exception("watch: a request failed.")

    def data(self, known: str | None = None) -> dict[str, Any]:
        """The page's data, newly read; empty if their version is `known`."""
        with self.reading:
            for run in self.runs:
                run.update()
            return {} if known == version(self.runs) else page_data(self.runs, live=True)


class _Handler(BaseHTTPRequestHandler):
    server: Watch
    server_version, sys_version = "daybreak", ""
    timeout = 30  # seconds without a byte
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        """Answer / with the page, and /data with its data."""
        path, _, asked = self.path.partition("?")
        query = parse_qs(asked)
        if not self.server.key and not known_host(self.headers.get("Host", ""), self.server.names):
            self._send(HTTPStatus.FORBIDDEN, "text/plain", "this is not the host that you asked for\n")
        elif not hmac.compare_digest(query.get("key", [""])[0].encode(), self.server.key.encode()):
            self._send(HTTPStatus.UNAUTHORIZED, "text/plain", "the key is missing or wrong: ?key=...\n")
        elif path == "/":
            self._send(HTTPStatus.OK, "text/html; charset=utf-8", *render(self.server.data()))
        elif path == "/data":
            data = self.server.data(query.get("v", [None])[0])
            status = HTTPStatus.OK if data else HTTPStatus.NO_CONTENT
            self._send(status, "application/json", to_json(data) if data else "")
        else:
            self._send(HTTPStatus.NOT_FOUND, "text/plain", "there is only /\n")

    def _send(self, status: HTTPStatus, kind: str, text: str, policy: str = NOTHING) -> None:
        body = text.encode()
        self.send_response(status)
        more = {"Content-Type": kind, "Content-Length": str(len(body)), "Content-Security-Policy": policy}
        for name, value in (HEADERS | more).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: a line for every poll is noise."""
