"""`daybreak watch`: the report's page, live, from a server on this machine.

It answers two addresses, the page and its data, to loopback only unless another host is asked for: then a key from the
environment is needed. The Host header is checked (a page elsewhere whose name is made to point here gets nothing), no
other origin is allowed in, and the policy lets the page run its own two scripts only.
"""

from __future__ import annotations

import hmac
import os
import threading
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from daybreak.errors import ConfigError
from daybreak.report.page import page_data, render, to_json
from daybreak.report.series import Follower

LOOPBACK = ("127.0.0.1", "localhost", "::1")
KEY = "DAYBREAK_KEY"


class Watch(ThreadingHTTPServer):
    """A server for `runs`. Raises ConfigError where it may not or cannot listen."""

    daemon_threads = True

    def __init__(self, paths: Sequence[str], host: str = "127.0.0.1", port: int = 0) -> None:
        self.runs = [Follower(path) for path in paths]
        self.key = "" if host in LOOPBACK else os.environ.get(KEY, "")
        if host not in LOOPBACK and len(self.key) < 16:
            raise ConfigError(f"--host {host} lets others in: set {KEY} to a secret of 16 or more characters first.")
        self.reading = threading.Lock()
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            raise ConfigError(f"{host}:{port} cannot be listened on ({error.strerror}); try another --port.") from None
        self.hosts = {f"{name}:{self.server_port}" for name in ("127.0.0.1", "localhost", "[::1]", host)}
        self.url = f"http://{host}:{self.server_port}/" + (f"?key={self.key}" if self.key else "")

    def data(self, version: str | None = None) -> dict[str, Any]:
        """What the page shows, read anew; empty if that is `version` already."""
        with self.reading:
            for run in self.runs:
                run.update()
            known = version == str(sum(run.offset for run in self.runs))
            return {} if known else page_data(self.runs, live=True)


class _Handler(BaseHTTPRequestHandler):
    server: Watch
    server_version, sys_version = "daybreak", ""
    timeout = 30

    def do_GET(self) -> None:
        """/ is the page, /data its data."""
        url = urlsplit(self.path)
        query = parse_qs(url.query)
        if self.headers.get("Host", "") not in self.server.hosts:
            self._send(HTTPStatus.FORBIDDEN, "text/plain", "this is not the host that you asked for\n")
        elif not hmac.compare_digest(query.get("key", [""])[0].encode(), self.server.key.encode()):
            self._send(HTTPStatus.UNAUTHORIZED, "text/plain", "the key is missing or wrong: ?key=...\n")
        elif url.path == "/":
            self._send(HTTPStatus.OK, "text/html; charset=utf-8", *render(self.server.data()))
        elif url.path == "/data":
            data = self.server.data(query.get("v", [None])[0])
            status = HTTPStatus.OK if data else HTTPStatus.NO_CONTENT
            self._send(status, "application/json", to_json(data) if data else "")
        else:
            self._send(HTTPStatus.NOT_FOUND, "text/plain", "there is only /\n")

    def _send(self, status: HTTPStatus, kind: str, text: str, policy: str = "default-src 'none'") -> None:
        body = text.encode()
        self.send_response(status)
        headers = {
            "Content-Type": kind, "Content-Length": str(len(body)), "Content-Security-Policy": policy,
            "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-store",
            "Cross-Origin-Resource-Policy": "same-origin",
        }  # fmt: skip
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a line a poll is noise."""
