"""A local server that speaks as much of the Hugging Face Hub's protocol as downloading data sets needs, with faults.

Written from the Hub's API, not from our client: /api/datasets/NAME[/revision/REV], /api/datasets/NAME/tree/REV/PATH,
/datasets/NAME/resolve/REV/FILE with HEAD, GET, Range, ETag, X-Repo-Commit, X-Linked-Size.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Files of repositories; `faults` maps a file name to the faults of its next downloads, in order.

    drop: the connection closes half way; short: half of the file with a length that says so is all; html: a web page;
    429: too many requests; 500: server error; flip: right size, one byte wrong.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.cards: dict[str, dict[str, Any]] = {}
        self.faults: dict[str, list[str]] = {}
        self.gets: Counter[str] = Counter()
        self.ranges: list[str] = []
        self.asked: list[str] = []  # paths
        self.token = ""  # without it nothing is to be seen
        self.url = ""

    def add(self, name: str, files: dict[str, bytes], card: dict[str, Any] | None = None) -> None:
        self.repos[name], self.cards[name] = files, card or {}


def entry(path: str, data: bytes) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
    if path.endswith((".parquet", ".bin")):
        found["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return found


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, code: int, body: bytes, kind: str = "application/json", **headers: str) -> None:
        self.send_response(code)
        for key, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        self.hub.asked.append(path)
        if self.hub.token and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self.answer(401, b'{"error": "Invalid credentials"}', X_Error_Code="GatedRepo")
        for name, files in self.hub.repos.items():
            if path.startswith(f"/datasets/{name}/resolve/"):
                return self.resolve(files, path.split("/resolve/")[1].partition("/")[2])
            if path.startswith(f"/api/datasets/{name}/tree/"):
                under = path.split("/tree/")[1].partition("/")[2]
                found = [entry(p, d) for p, d in files.items() if p.startswith(f"{under}/" if under else "")]
                return self.answer(200 if found else 404, json.dumps(found).encode())
            if path == f"/api/datasets/{name}" or path.startswith(f"/api/datasets/{name}/revision/"):
                info = {"id": name, "sha": COMMIT, "cardData": self.hub.cards[name], "siblings": [], "tags": []}
                return self.answer(200, json.dumps(info).encode())
        return self.answer(404, b'{"error": "Repository not found"}', X_Error_Code="RepoNotFound")

    def resolve(self, files: dict[str, bytes], name: str) -> None:
        if name not in files:
            return self.answer(404, b"", X_Error_Code="EntryNotFound")
        data = files[name]
        digest = hashlib.sha256(data).hexdigest()
        common = {"ETag": f'"{digest}"', "X_Repo_Commit": COMMIT, "Accept_Ranges": "bytes"}
        if self.command == "HEAD":
            return self.answer(200, data, "application/octet-stream", X_Linked_Size=str(len(data)), **common)
        self.hub.gets[name] += 1
        fault = self.hub.faults[name].pop(0) if self.hub.faults.get(name) else ""
        if fault in ("429", "500"):
            return self.answer(int(fault), b"slow down", "text/plain", Retry_After="1")
        if fault == "html":
            return self.answer(
                200, b"<!DOCTYPE html><p>Sign in to this network".ljust(len(data)), "text/html", **common
            )
        if fault == "flip":
            data = data[:-1] + bytes([data[-1] ^ 1])
        start = 0
        if wanted := self.headers.get("Range"):
            self.hub.ranges.append(wanted)
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
            common["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        part = data[start:]
        if fault == "short":
            part = part[: len(part) // 2]
        if fault == "drop":
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            self.wfile.write(part[: len(part) // 2])
            self.wfile.flush()
            self.close_connection = True
            return None
        return self.answer(206 if start else 200, part, "application/octet-stream", **common)


@contextmanager
def serve() -> Iterator[Hub]:
    """A Hub on a loopback port until the block ends; point HF_ENDPOINT at `url`."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
