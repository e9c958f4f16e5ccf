"""`daybreak serve` as a process of its own, and a browser that a test can work with."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ranks
from patience import PATIENCE, until

KEY = "open-sesame-0123"


def told(args: list[str]) -> int:
    """`daybreak ARGS[1:]` after the Python of ARGS[0]."""
    exec(args[0], {"__name__": "__main__"})
    return ranks.daybreak(args[1:])


@contextmanager
def serving(folder: Path, *argv: str, before: str = "", **env: str) -> Iterator[tuple[ranks.Forked, int]]:
    """The server on a free port, with the file of its stderr. `before`: Python that its process runs first."""
    with TemporaryDirectory() as place:
        out, err = Path(place) / "out", Path(place) / "err"
        process = ranks.Forked(told, [before, "serve", *argv, "--port", "0"], folder, out, os.environ | env, err)
        try:
            until(lambda: out.is_file() and "\n" in out.read_text(), process, lambda: err.read_text())
            line = out.read_text()
            assert "/v1" in line, err.read_text()
            process.stderr = err.open()
            yield process, int(line.rsplit(":", 1)[1].removesuffix("/v1\n"))
        finally:
            process.kill()


def raw(port: int, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, Any, Any]:
    """Status, JSON (or bytes) and headers of one answer; its headers are those that every answer has."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    given = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json", **headers}
    connection.request(method, path, body, {k.replace("_", "-"): v for k, v in given.items() if v})
    answer = connection.getresponse()
    assert not [name for name in answer.headers if name.lower().startswith("access-control")]
    assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'")  # of refusals too
    data = answer.read()
    connection.close()
    return answer.status, json.loads(data) if data.startswith(b"{") else data, answer.headers


class Browser:
    """Chromium, led through a pipe with its DevTools protocol."""

    def __init__(self, program: str, folder: Path) -> None:
        (theirs, self.out), (self.into, ours) = os.pipe(), os.pipe()
        command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe",
                   f"--user-data-dir={folder}"]  # fmt: skip
        # The protocol reads at 3 and writes at 4.
        shell = ["bash", "-c", f'exec 3<&{theirs} 4>&{ours}; exec "$@"', "sh", *command]
        self.process = subprocess.Popen(shell, pass_fds=(theirs, ours), stderr=subprocess.DEVNULL)
        os.close(theirs)
        os.close(ours)
        self.sent, self.held = 0, b""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}

    session: dict[str, str] = {}  # noqa: RUF012

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of one call."""
        self.sent += 1
        os.write(self.out, json.dumps({"id": self.sent, "method": method, "params": params, **self.session}).encode())
        os.write(self.out, b"\0")
        while True:
            while b"\0" not in self.held:
                more = os.read(self.into, 1 << 16)
                assert more, "the browser has ended"
                self.held += more
            message, _, self.held = self.held.partition(b"\0")
            answer = json.loads(message)
            if answer.get("id") == self.sent:
                assert "error" not in answer, answer
                return dict(answer["result"])

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        said = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in said, said
        return said["result"].get("value")

    def until(self, script: str) -> None:
        """Wait until an expression is true."""
        until(lambda: self.run(script), self.process, lambda: f"The page: {self.run('document.body.innerText')}", 0.05)

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()
        os.close(self.out)
        os.close(self.into)
